"""Train three real sources (3,810 CT slices) as three centres: a table of settings x seeds.

    .venv/bin/python -m tests.benchmarks.real_ct [--configs 'central|tau 1'] [--seeds 1,2,3] [--workers 2]
    [--out DIR] [--speed]

Runs go through the client and server code of any run: they train on a centre's `train`, are selected on
`val` and touch `test` once, at the end. Finished runs stay in DIR/results and are not repeated; interrupted
runs are resumed. DIR/table.md is the table, README.md says what it shows.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import itertools
import json
import logging
import multiprocessing
import shutil
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from client.data.batch import Batch
from client.training.trainer import TrainSpec, train
from common.config.compose import compose_config
from common.modeling.model import make_model
from common.utils.errors import ConsiliumError
from server.ledger.ledger import Ledger
from server.rounds.run_lifecycle import resume_run, start_run
from server.run.records import CentreScores, RunResult, parse_result
from tests.benchmarks.measuring import format_header, format_row, time_result
from tests.benchmarks.real_ct_data import ROOT, find_data_folder, imagenet_override, prepare_federation
from tests.benchmarks.real_ct_settings import BASE, CENTRES, SETTINGS
from tests.in_process_federation import InProcess, sites

# --- runs


def make_run_id(setting: str, seed: int, overrides: list[str]) -> str:
    """A run's id; other overrides make it another run."""
    plain = "".join(character if character.isalnum() else "-" for character in setting)
    return f"{plain}-s{seed}-{hashlib.sha256(' '.join(overrides).encode()).hexdigest()[:8]}"


def write_result(path: Path, values: dict[str, Any]) -> None:
    """Write a result whole or not at all."""
    path.with_suffix(".part").write_text(json.dumps(values, indent=1))
    path.with_suffix(".part").replace(path)


def configure_worker(out: Path, run_id: str) -> None:
    """One thread, and a log with the run's id."""
    torch.set_num_threads(1)
    log_format = f"%(asctime)s {run_id}  %(message)s"
    logging.basicConfig(filename=out / "log.txt", format=log_format, level=logging.INFO, force=True)


@dataclass(frozen=True)
class Job:
    """One run: a setting with a seed."""

    setting: str
    seed: int
    data: Path
    out: Path

    @property
    def run_id(self) -> str:
        return make_run_id(self.setting, self.seed, [*BASE, *SETTINGS[self.setting]])

    @property
    def result_path(self) -> Path:
        return self.out / "results" / f"{self.run_id}.json"

    def list_overrides(self) -> list[str]:
        folders = [imagenet_override(self.data), f"federation.data_root={self.out}/federation"]
        return [*BASE, *folders, *SETTINGS[self.setting], f"seed={self.seed}"]


def execute_job(job: Job) -> str:
    """Run the job unless its result exists; return its line for the screen."""
    title = f"{job.setting:32} seed {job.seed}"
    if not job.result_path.exists():
        configure_worker(job.out, job.run_id)
        try:
            result, timing = time_result(lambda: continue_or_start(job))
        except ConsiliumError as error:  # the others go on
            return f"{title}  failed: {error}"
        values = {
            "setting": job.setting,
            "seed": job.seed,
            "val": compute_validation_aucs(result),
            "test": compute_aucs(result.test["covid"].centres),
            "seconds": timing.wall,
            "cpu_seconds": timing.cpu,
        }
        write_result(job.result_path, values)
    values = json.loads(job.result_path.read_text())
    test = "  ".join(f"{centre} {auc:.3f}" for centre, auc in values["test"].items())
    return f"{title}  {test}  val {values['val']['macro']:.3f}  {values['cpu_seconds']:.0f} CPU-s"


def continue_or_start(job: Job) -> RunResult:
    """Read the result of a finished run, resume an interrupted one, or start it."""
    runs_dir = job.out / "runs"
    run_dir = runs_dir / job.run_id
    ledger_path = runs_dir / f"{job.run_id}.db"
    if not (run_dir / "checkpoints").exists():  # new, or ended before there was anything to resume
        shutil.rmtree(run_dir, ignore_errors=True)
        ledger_path.unlink(missing_ok=True)
    metrics_path = run_dir / "metrics.json"
    if metrics_path.exists():
        return parse_result(json.loads(metrics_path.read_text()))
    ledger = Ledger(f"sqlite:///{ledger_path}")
    transport = InProcess(sites(len(CENTRES)))
    if run_dir.exists():
        return resume_run(job.run_id, transport, runs_dir, ledger)
    return start_run(compose_config(job.list_overrides()), transport, runs_dir, ledger, job.run_id)


def compute_validation_aucs(result: RunResult) -> dict[str, float]:
    """The validation AUCs of the best rounds: of the shared model, or each centre's own."""
    stage = result.stages[-1]
    scores = {}
    for centre in CENTRES:
        best = stage.best
        if stage.local_only:
            best = stage.best_by_centre.get(centre, stage.best_by_centre.get("pooled"))
        assert best is not None
        scores[centre] = stage.rounds[best.round].validation["covid"].centres[centre]
    return compute_aucs(scores)


def compute_aucs(scores: Mapping[str, CentreScores]) -> dict[str, float]:
    """{centre: AUC of the covid task}, with `macro` and `worst`."""
    aucs = {centre: float(scores[centre].metrics["auc"] or 0.0) for centre in CENTRES}
    return {**aucs, "macro": float(np.mean(list(aucs.values()))), "worst": min(aucs.values())}


# --- table


def make_table(out: Path, seeds: list[int]) -> str:
    """The Markdown table: mean ± standard deviation over the finished seeds, of test AUCs and val. macro."""
    columns = [*CENTRES, "macro", "worst"]
    lines = [format_header(["setting", *columns, "val. macro", "seeds"])]
    for setting in SETTINGS:
        paths = [Job(setting, seed, Path(), out).result_path for seed in seeds]
        results = [json.loads(path.read_text()) for path in paths if path.exists()]
        if results:
            cells = [
                format_mean_and_spread([result["test"][column] for result in results]) for column in columns
            ]
            validation = format_mean_and_spread([result["val"]["macro"] for result in results])
            lines.append(format_row([setting, *cells, validation, len(results)]))
    return "\n".join(lines) + "\n"


def format_mean_and_spread(numbers: list[float]) -> str:
    values = np.array(numbers)
    spread = f" ± {values.std(ddof=1):.3f}" if len(values) > 1 else ""
    return f"{values.mean():.3f}{spread}".replace("0.", ".")


# --- speed


def print_speed() -> None:
    """Print images a CPU-second of the training step on one thread, by size, precision and memory format.

    Medians of three, which take turns.
    """
    torch.set_num_threads(1)
    config = compose_config(BASE)
    tasks = {"covid": config.tasks["covid"]}
    precisions: tuple[Literal["fp32", "bf16"], ...] = ("fp32", "bf16")
    rates: dict[str, list[float]] = {}
    for _, size, precision, channels_last in itertools.product(
        range(3), (64, 96, 128), precisions, (True, False)
    ):
        stage = dataclasses.replace(config.stages["main"], precision=precision, channels_last=channels_last)
        model = make_model(config.backbone, tasks, 0, channels_last)
        slices = torch.randint(0, 255, (32, 1, size, size), dtype=torch.uint8)
        labels = torch.randint(0, 2, (32,)).double()
        batches = [Batch(slices, {"covid": labels})] * 4
        train(model, batches[:1], TrainSpec(stage, tasks))  # the first step chooses kernels
        start = time.process_time()
        train(model, batches, TrainSpec(stage, tasks, num_steps=4))
        rate = 4 * 32 / (time.process_time() - start)
        rates.setdefault(f"{size} px  {precision}  channels_last={channels_last}", []).append(rate)
    for name, values in rates.items():
        print(f"{name}: {np.median(values):.0f} images a CPU-second")


def parse_settings(text: str) -> list[str]:
    """Raises ConsiliumError for an unknown setting."""
    settings = [setting.strip() for setting in text.split("|")]
    for setting in settings:
        if setting not in SETTINGS:
            raise ConsiliumError(f"unknown setting '{setting}'; use one of: {'; '.join(SETTINGS)}")
    return settings


def make_folders(out: Path) -> None:
    for name in ("results", "runs"):
        (out / name).mkdir(parents=True, exist_ok=True)


def main() -> None:
    """Run the command that the module's docstring describes."""
    parser = argparse.ArgumentParser(
        description="Three real CT sources as three centres: test AUC by setting and seed."
    )
    parser.add_argument("--configs", default="|".join(SETTINGS), help="settings, separated by '|'")
    parser.add_argument("--seeds", default="1,2,3", help="separated by commas")
    parser.add_argument("--workers", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--speed", action="store_true", help="measure only the training step")
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "real_ct", help="folder of the results")
    arguments = parser.parse_args()
    if arguments.speed:
        print_speed()
        return
    settings = parse_settings(arguments.configs)
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    data = find_data_folder()
    out = arguments.out.resolve()
    make_folders(out)
    prepare_federation(data, out, arguments.workers)
    jobs = [Job(setting, seed, data, out) for seed, setting in itertools.product(seeds, settings)]
    with ProcessPoolExecutor(arguments.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for line in pool.map(execute_job, jobs):
            print(line, flush=True)
    table = make_table(out, seeds)
    (out / "table.md").write_text(table)
    print(table)


if __name__ == "__main__":
    try:
        main()
    except ConsiliumError as error:
        sys.exit(f"error: {error}")
