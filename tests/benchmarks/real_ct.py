"""Three real sources as three centres (3,810 CT slices).

A table of settings x seeds, through the client and server code that a run uses.

    .venv/bin/python -m tests.benchmarks.real_ct [--configs 'central|tau 1'] [--seeds 1,2,3] [--workers 2]
    [--out DIR] [--speed]

Every run trains on a centre's `train`, is chosen on `val` and touches `test` once at its end. What is
finished is kept in DIR/results and not done again; a run that was interrupted is resumed. DIR/table.md is the
table. What came out, and what it says: README.md here.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import logging
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch

from client.data.batch import Batch
from client.data.cohort import assign_split, save_cohort
from client.imaging.preprocess import preprocess_cohort
from client.imaging.slice_store import SliceStore
from client.site.config import Site
from client.training.trainer import TrainSpec, train
from common.config.compose import compose_config
from common.config.schema import PreprocessConfig
from common.modeling.model import make_model
from common.utils.errors import ConsiliumError
from server.ledger.ledger import Ledger
from server.rounds.run_lifecycle import resume_run, start_run
from server.run.records import CentreScores, RunResult, parse_result
from tests.in_process_federation import InProcess

ROOT = Path(__file__).resolve().parents[2]
CENTRES = {
    "ucsd": "ucsd_covidct",
    "soares": "soares_saopaulo",
    "mosmed": "mosmed",
}  # {centre: the manifest's source}
WINDOWS = {"mosmed": (75.0, 175.0)}  # squeezed 8-bit pictures; the others' own 0..255 is their window
PREPROCESS = PreprocessConfig(
    num_slices=1, image_size=96, crop="body"
)  # lungs as large as at 128 px without the crop
BASE = [
    "federation=folder",
    f"federation.centres=[{','.join(CENTRES)}]",
    "backbone=mobilenetv1_075",
    f"preprocess.num_slices={PREPROCESS.num_slices}",
    f"preprocess.image_size={PREPROCESS.image_size}",
    f"preprocess.crop={PREPROCESS.crop}",
    "stage.batch_size=32",
    "stage.local_steps_mode=equal",  # 27 steps a round at every centre, 81 pooled
    # 118 and 139 validation scans: an AUC's standard error is .05, choosing among rounds is choosing noise
    "evaluation.checkpoint_selection=last",
    "stage.optimiser.lr=3e-4",
]
COVID = ["stage.tasks=[covid]"]  # the source head off
PERSONAL = ["recipe=multisource_personal", "stages.main.rounds=6"]
SETTINGS: dict[str, list[str]] = {
    "central": ["federation.mode=central", *COVID],
    "local": ["federation.mode=local", *COVID],
    "tau 0 (FedAvg)": ["aggregation=fedavg", *COVID],
    "tau 0.5": ["aggregation.tau=0.5", *COVID],
    "tau 1": ["aggregation.tau=1", *COVID],
    "tau 0 + source head": ["aggregation=fedavg"],
    "tau 0.5 + source head": ["aggregation.tau=0.5"],
    "tau 1 + source head": ["aggregation.tau=1"],
    "tau 1 + FedBN": ["aggregation.tau=1", "stage.local_layers=[batch_norm]", *COVID],
    "tau 1, fp32": [
        "aggregation.tau=1",
        "aggregation.compression=fp32",
        *COVID,
    ],  # all above and below were run when changes travelled so
    "tau 1, fp32, NCHW": [
        "aggregation.tau=1",
        "aggregation.compression=fp32",
        "stage.channels_last=false",
        *COVID,
    ],  # other rounding, nothing else
    "tau 1, int8": ["aggregation.tau=1", "aggregation.compression=int8", *COVID],
    "tau 1, int4": ["aggregation.tau=1", "aggregation.compression=int4", *COVID],
    "tau 1, own pace": ["aggregation.tau=1", "stage.local_steps_mode=proportional", *COVID],
    "personal 6 + 2": [*PERSONAL, "stages.own.rounds=2"],  # 8 rounds like all above
    "personal 6 + 8": [
        *PERSONAL,
        "stages.own.rounds=8",
    ],  # a centre takes home what others taught, then trains as long as it would alone
    "local, 14 rounds": ["federation.mode=local", "stage.rounds=14", *COVID],
    "central, 14 rounds": ["federation.mode=central", "stage.rounds=14", *COVID],
}


def data_folder() -> Path:
    """The real data.

    `$CONSILIUM_REAL_DATA`, else `../shared/data` beside the repository. Raises ConsiliumError when there are
    none.
    """
    folder = (
        Path(os.environ.get("CONSILIUM_REAL_DATA") or ROOT.parent / "shared" / "data").expanduser().resolve()
    )
    if not (folder / "ct_multisource" / "manifest.csv").is_file():
        raise ConsiliumError(
            f"{folder} holds no ct_multisource/manifest.csv; set CONSILIUM_REAL_DATA to the folder of "
            "the real data"
        )
    return folder


def write_federation(data: Path, out: Path) -> Path:
    """One subfolder a source with its cohort.csv.

    Each slice gets a folder of its own, so that it is read as a CT of one slice, not as a radiograph, and its
    body is found. UCSD keeps its official split; the others are divided by the hash of the patient (soares:
    of the picture, for it names no patients, so that slices of one patient may stand on both sides).
    """
    manifest = pd.read_csv(data / "ct_multisource" / "manifest.csv", dtype=str)
    root = out / "federation"
    for centre, source in CENTRES.items():
        rows = manifest[manifest["source"] == source].reset_index(drop=True)
        places = []
        for file in rows["file"]:
            picture = data / "ct_multisource" / file
            place = root / centre / "scans" / hashlib.sha256(file.encode()).hexdigest()[:16]
            place.mkdir(parents=True, exist_ok=True)
            link = place / f"slice{picture.suffix}"
            if not link.is_symlink():
                link.symlink_to(picture)
            places.append(str(place))
        patients = rows["patient"].str.strip().fillna(rows["file"])
        splits = [
            given if isinstance(given, str) else assign_split(p)
            for p, given in zip(patients, rows["split"], strict=True)
        ]
        low, high = WINDOWS.get(centre, (np.nan, np.nan))
        table = {
            "scan": rows["file"],
            "path": places,
            "patient": patients,
            "source": centre,
            "split": splits,
            "covid": rows["label"],
        }
        save_cohort(
            pd.DataFrame({**table, "window_low": low, "window_high": high}), root / centre / "cohort.csv"
        )
    return root


def prepared(data: Path, out: Path, workers: int = 1) -> Path:
    """The federation's root, every picture preprocessed."""
    root = write_federation(data, out)
    for centre in CENTRES:  # once, before the runs look
        cohort = pd.read_csv(root / centre / "cohort.csv")
        _, skipped = preprocess_cohort(
            cohort, root / centre, PREPROCESS, SliceStore(root / centre / ".consilium" / "slices"), workers
        )
        print(f"{centre}: {len(cohort)} scans, {len(skipped)} skipped", flush=True)
    return root


def name_of(setting: str, seed: int, overrides: list[str]) -> str:
    """A run's id; other overrides make it another run."""
    plain = "".join(c if c.isalnum() else "-" for c in setting)
    return f"{plain}-s{seed}-{hashlib.sha256(' '.join(overrides).encode()).hexdigest()[:8]}"


def run_one(job: tuple[str, int, str, str]) -> str:
    """One (setting, seed, data, out), unless it is there already; returns its line for the screen."""
    setting, seed, data, folder = job[0], job[1], Path(job[2]), Path(job[3])
    overrides = [
        *BASE,
        f"backbone.weights={data}/weights/mobilenetv1_075_tfjs_imagenet.pth",
        f"federation.data_root={folder}/federation",
    ]
    overrides += [*SETTINGS[setting], f"seed={seed}"]
    run = name_of(setting, seed, [*BASE, *SETTINGS[setting]])
    kept = folder / "results" / f"{run}.json"
    if not kept.exists():
        torch.set_num_threads(1)
        logging.basicConfig(
            filename=folder / "log.txt",
            format=f"%(asctime)s {run}  %(message)s",
            level=logging.INFO,
            force=True,
        )
        runs = folder / "runs"
        transport = InProcess([Site(index=i, threads=1, device="cpu") for i in range(len(CENTRES))])
        began, cpu = time.perf_counter(), time.process_time()
        if not (runs / run / "checkpoints").exists():  # new, or ended before there was anything to resume
            shutil.rmtree(runs / run, ignore_errors=True)
            (runs / f"{run}.db").unlink(missing_ok=True)
        ledger = Ledger(f"sqlite:///{runs}/{run}.db")
        try:
            if (runs / run / "metrics.json").exists():
                result = parse_result(json.loads((runs / run / "metrics.json").read_text()))
            elif (runs / run).exists():
                result = resume_run(run, transport, runs, ledger)
            else:
                result = start_run(compose_config(overrides), transport, runs, ledger, run)
        except ConsiliumError as error:  # the others go on
            return f"{setting:32} seed {seed}  failed: {error}"
        spent = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
        facts = {
            "setting": setting,
            "seed": seed,
            "val": val_of(result),
            "test": auc_of(result.test["covid"].centres),
            **spent,
        }
        kept.with_suffix(".part").write_text(json.dumps(facts, indent=1))
        kept.with_suffix(".part").replace(kept)
    facts = json.loads(kept.read_text())
    test = "  ".join(f"{k} {v:.3f}" for k, v in facts["test"].items())
    return (
        f"{setting:32} seed {seed}  {test}  val {facts['val']['macro']:.3f}  {facts['cpu_seconds']:.0f} CPU-s"
    )


def val_of(result: RunResult) -> dict[str, float]:
    """The validation AUC of the best rounds: of the shared model, or each centre's own."""
    last = result.stages[-1]
    scores = {}
    for centre in CENTRES:
        best = last.best
        if last.local_only:
            best = last.best_by_centre.get(centre, last.best_by_centre.get("pooled"))
        assert best is not None
        scores[centre] = last.rounds[best.round].validation["covid"].centres[centre]
    return auc_of(scores)


def auc_of(scores: Mapping[str, CentreScores]) -> dict[str, float]:
    """{centre: AUC} with macro and worst, from each centre's scores of the covid task."""
    own = {centre: float(scores[centre].metrics["auc"] or 0.0) for centre in CENTRES}
    return {**own, "macro": float(np.mean(list(own.values()))), "worst": min(own.values())}


def table(out: Path, settings: list[str], seeds: list[int]) -> str:
    """The markdown table.

    Test AUC, mean +- standard deviation over the seeds that are finished, and the validation macro that
    chose.
    """
    columns = [*CENTRES, "macro", "worst"]
    lines = [f"| setting | {' | '.join(columns)} | val. macro | seeds |", "|---" * (len(columns) + 3) + "|"]
    for setting in settings:
        kept = [
            out / "results" / f"{name_of(setting, seed, [*BASE, *SETTINGS[setting]])}.json" for seed in seeds
        ]
        found = [json.loads(k.read_text()) for k in kept if k.exists()]
        if found:
            cells = [_cell([f["test"][c] for f in found]) for c in columns] + [
                _cell([f["val"]["macro"] for f in found])
            ]
            lines.append(f"| {setting} | {' | '.join(cells)} | {len(found)} |")
    return "\n".join(lines) + "\n"


def _cell(numbers: list[float]) -> str:
    values = np.array(numbers)
    spread = f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else ""
    return f"{values.mean():.3f}{spread}".replace("0.", ".")


def speed() -> None:
    """Images a CPU-second of the training step on one thread, by size, precision and memory format.

    Medians of three, interleaved.
    """
    torch.set_num_threads(1)
    config, found = compose_config(BASE), dict[str, list[float]]()
    tasks = {"covid": config.tasks["covid"]}
    precisions: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    for _, size, precision, channels_last in itertools.product(
        range(3), (64, 96, 128), precisions, (True, False)
    ):
        stage = dataclasses.replace(config.stages["main"], precision=precision, channels_last=channels_last)
        model = make_model(config.backbone, tasks, 0, channels_last)
        slices, labels = (
            torch.randint(0, 255, (32, 1, size, size), dtype=torch.uint8),
            torch.randint(0, 2, (32,)).double(),
        )
        batches = [Batch(slices, {"covid": labels})] * 4
        train(model, batches[:1], TrainSpec(stage, tasks))  # the first step chooses kernels
        began = time.process_time()
        train(model, batches, TrainSpec(stage, tasks, num_steps=4))
        found.setdefault(f"{size} px  {precision}  channels_last={channels_last}", []).append(
            4 * 32 / (time.process_time() - began)
        )
    for what, rates in found.items():
        print(f"{what}: {np.median(rates):.0f} images a CPU-second")


def main() -> None:
    """The command; see the module docstring."""
    parser = argparse.ArgumentParser(
        description="Three real CT sources as three centres: settings x seeds, test AUC."
    )
    parser.add_argument("--configs", default="|".join(SETTINGS), help="settings, '|' between")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--workers", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--speed", action="store_true", help="only measure the training step")
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "real_ct")
    given = parser.parse_args()
    if given.speed:
        return speed()
    settings = [s.strip() for s in given.configs.split("|")]
    seeds = [int(s) for s in given.seeds.split(",")]
    unknown = [s for s in settings if s not in SETTINGS]
    if unknown:
        raise ConsiliumError(f"setting '{unknown[0]}' is unknown; there are: {'; '.join(SETTINGS)}")
    data, out = data_folder(), given.out.resolve()
    for folder in ("results", "runs"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    prepared(data, out, given.workers)
    jobs = [(setting, seed, str(data), str(out)) for seed in seeds for setting in settings]
    with ProcessPoolExecutor(given.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for line in pool.map(run_one, jobs):
            print(line, flush=True)
    text = table(out, list(SETTINGS), seeds)
    (out / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    try:
        main()
    except ConsiliumError as error:
        sys.exit(f"error: {error}")
