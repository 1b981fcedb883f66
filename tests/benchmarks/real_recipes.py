"""The other four papers' recipes on real data, each against pooled training and its paper's own baseline
designs: a table of settings x seeds.

    .venv/bin/python -m tests.benchmarks.real_recipes [--recipes triage,transfer] [--seeds 1,2,3] [--workers
    2] [--out DIR]

What is finished is kept in DIR/results and not done again. DIR/<recipe>.md are the tables. What came out, and
what it says: README.md here. The data are found by `$CONSILIUM_REAL_DATA`, else `../shared/data`; derived
pictures stay in DIR.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from client.data.cohort import load_cohort, save_cohort
from client.data.loading import list_mask_columns
from client.imaging.preprocess import preprocess_cohort
from client.imaging.slice_store import SliceStore
from client.site.config import Site
from common.config.compose import compose_config
from common.utils.errors import ConsiliumError
from server.ledger.ledger import Ledger
from server.rounds.cross_validation import start_run_or_folds
from server.run.records import CrossValidationSummary
from tests.benchmarks.real_ct import ROOT, _cell, data_folder, name_of
from tests.benchmarks.real_sets import Rows, finegrained_data, prognosis_data, transfer_data, triage_data
from tests.in_process_federation import InProcess


@dataclass(frozen=True)
class Bench:
    """One recipe on its real data."""

    write: Callable[[Path, Path], Rows]
    base: list[str]
    settings: dict[str, list[str]]
    columns: dict[str, tuple[str, str, str]]  # {title: (task, centre or view, metric)}


MOBILENET = [
    "federation=folder",
    "backbone=mobilenetv1_075",
    "stage.optimiser.name=adamw",
    "stage.optimiser.schedule=cosine",
    "evaluation.checkpoint_selection=last",
]
# A fixed number of steps a round at every centre (pooled: their sum), so that settings with fewer labelled
# scans do not train less.
CXR = [
    *MOBILENET,
    "preprocess.image_size=96",
    "preprocess.crop=body",
    "stage.batch_size=16",
    "stage.optimiser.weight_decay=0.01",
]
BENCHES = {
    "prognosis": Bench(
        prognosis_data,
        [
            *CXR,
            "recipe=prognosis",
            "preprocess.crop=lungs",
            "federation.evaluation=kfold",
            "stages.main.rounds=14",
            "stage.local_steps=6",
            "stage.optimiser.head_lr_scale=10",
            "evaluation.patience=0",
        ],
        {
            "multi-dataset multi-task, federated": [],
            "the same, pooled": ["federation.mode=central"],
            "single task (outcome alone), federated": ["stage.tasks=[outcome]"],
            "fine-tuned (scores, then outcome), federated": [
                "stages.scores.rounds=5",
                "stages.main.tasks=[outcome]",
            ],
        },
        {
            "outcome accuracy": ("outcome", "pooled", "accuracy"),
            "F1": ("outcome", "pooled", "f1"),
            "G-mean": ("outcome", "pooled", "gmean"),
            "AUC pooled": ("outcome", "pooled", "auc"),
            "AUC hannover": ("outcome", "hannover", "auc"),
            "Brixia bin accuracy": ("brixia", "pooled", "accuracy"),
        },
    ),
    "finegrained": Bench(
        finegrained_data,
        [
            *CXR,
            "recipe=finegrained",
            "tasks.finding.classes=[covid,viral,bacterial,other]",
            "tasks.finding.prior=global",
            "tasks.infection.label_column=lung_mask",
            "stages.main.rounds=8",
            "stages.pretrain.rounds=4",
            "stage.local_steps=15",
            "backbone.decoder.channels=[128,64,32,16,8]",
            "stage.optimiser.lr=3e-4",
            "stages.pretrain.optimiser.lr=3e-4",
            "stage.optimiser.head_lr_scale=10",
        ],
        {
            "MoCo, then both tasks, federated": [],
            "the same, pooled": ["federation.mode=central"],
            "inpainting, then both tasks, federated": ["stages.pretrain.tasks=[inpainting]"],
            "ImageNet only, both tasks, federated": ["stages.pretrain.rounds=0"],
            "MoCo, then classification alone, federated": ["stages.main.tasks=[finding]"],
        },
        {
            "balanced accuracy": ("finding", "pooled", "balanced_accuracy"),
            "F1 (mean over classes)": ("finding", "pooled", "f1"),
            "accuracy": ("finding", "pooled", "accuracy"),
            "lung Dice": ("infection", "pooled", "dice"),
        },
    ),
    "triage": Bench(
        triage_data,
        [
            *MOBILENET,
            "recipe=triage",
            "preprocess.num_slices=1",
            "preprocess.image_size=96",
            "preprocess.crop=body",
            "backbone.decoder.channels=[128,64,32,16,8]",
            "stage.batch_size=16",
            "stage.local_steps=15",
            "stage.optimiser.lr=3e-4",
            "stages.main.rounds=8",
        ],
        {
            "head on the full-resolution map, federated": [],
            "the same, pooled": ["federation.mode=central"],
            "head on the latent features, federated": [
                "tasks.covid.head_input=features",
                "tasks.covid.hidden_dims=[]",
            ],
            "identification alone, federated": ["stage.tasks=[covid]", "stage.sampling_ratios={}"],
            "segmentation alone, federated": [
                "stage.tasks=[lesion]",
                "stage.sampling_ratios={}",
                "evaluation.task=lesion",
                "evaluation.metric=dice",
            ],
        },
        {
            "AUC mosmed_a": ("covid", "mosmed_a", "auc"),
            "AUC mosmed_b": ("covid", "mosmed_b", "auc"),
            "Dice semiseg": ("lesion", "semiseg", "dice"),
            "Spearman mosmed": ("lesion", "pooled", "spearman"),
        },
    ),
    "transfer": Bench(
        transfer_data,
        [
            "federation=folder",
            "backbone=mobilenetv1_075",
            "recipe=transfer",
            "preprocess.num_slices=1",
            "preprocess.image_size=96",
            "preprocess.crop=body",
            "stages.transition.rounds=6",
            "stages.target.rounds=20",
        ],
        {
            "ImageNet only": ["stages.transition.rounds=0"],
            "hard labels, federated": [],
            "hard labels, pooled": ["federation.mode=central"],
            "soft labels, federated": ["stages.transition.tasks=[soft]"],
        },
        {
            m: ("target", "ucsd", k)
            for m, k in (
                ("F1", "f1"),
                ("accuracy", "accuracy"),
                ("precision", "precision"),
                ("recall", "sensitivity"),
                ("AUC", "auc"),
            )
        },
    ),
}


def overrides_of(recipe: str, setting: str, out: Path, data: Path) -> list[str]:
    """A run's overrides; the ones that name places stand first and are no part of its id."""
    bench = BENCHES[recipe]
    cohorts = sorted(p.name for p in (out / recipe / "federation").iterdir())
    places = [f"federation.data_root={out}/{recipe}/federation", f"federation.centres=[{','.join(cohorts)}]"]
    return [
        *places,
        f"backbone.weights={data}/weights/mobilenetv1_075_tfjs_imagenet.pth",
        *bench.base,
        *bench.settings[setting],
    ]


def run_one(job: tuple[str, str, int, str, str]) -> str:
    """One (recipe, setting, seed, data, out), unless it is there already; returns its line for the screen."""
    recipe, setting, seed, data, out = job[0], job[1], job[2], Path(job[3]), Path(job[4])
    bench = BENCHES[recipe]
    run = name_of(
        f"{recipe}-{list(bench.settings).index(setting)}", seed, [*bench.base, *bench.settings[setting]]
    )
    kept = out / "results" / f"{run}.json"
    if not kept.exists():
        torch.set_num_threads(1)
        logging.basicConfig(
            filename=out / "log.txt", format=f"%(asctime)s {run}  %(message)s", level=logging.INFO, force=True
        )
        runs = out / "runs"
        for stale in [p for p in runs.glob(f"{run}*")]:
            shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
        began, cpu = time.perf_counter(), time.process_time()
        config = compose_config([*overrides_of(recipe, setting, out, data), f"seed={seed}"])
        transport = InProcess(
            [Site(index=i, threads=1, device="cpu") for i in range(len(config.federation.centres))]
        )
        try:
            outcome = start_run_or_folds(config, transport, runs, Ledger(f"sqlite:///{runs}/{run}.db"), run)
        except ConsiliumError as error:  # the others go on
            return f"{recipe}  {setting:44} seed {seed}  failed: {error}"
        spent = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
        result = outcome.total if isinstance(outcome, CrossValidationSummary) else outcome
        test = {}
        for task, scores in result.test.items():
            centres = {centre: centre_scores.metrics for centre, centre_scores in scores.centres.items()}
            test[task] = {"macro": scores.macro, "pooled": scores.pooled, "centres": centres}
        facts = {
            "recipe": recipe,
            "setting": setting,
            "seed": seed,
            "test": test,
            "classes": {task: len(fitted.classes) for task, fitted in result.fitted_tasks.items()},
        }
        kept.with_suffix(".part").write_text(json.dumps({**facts, **spent}, indent=1))
        kept.with_suffix(".part").replace(kept)
        for stale in [p for p in runs.glob(f"{run}*") if p.is_dir()]:
            shutil.rmtree(stale)  # checkpoints of hundreds of runs would fill the disk
    facts = json.loads(kept.read_text())
    shown = "  ".join(
        f"{title} {value:.3f}"
        for title, at in bench.columns.items()
        if (value := value_of(facts, *at)) is not None
    )
    return f"{recipe}  {setting:44} seed {seed}  {shown}  {facts['cpu_seconds']:.0f} CPU-s"


def value_of(facts: dict[str, Any], task: str, where: str, metric: str) -> float | None:
    """A test metric at a centre or over all of them; None where it is undefined."""
    views = facts["test"].get(task, {})
    values = views.get(where) if where in ("macro", "pooled") else views.get("centres", {}).get(where)
    value = (values or {}).get(metric)
    return None if value is None else float(value)


def table(recipe: str, out: Path, seeds: list[int]) -> str:
    """The markdown table: mean +- standard deviation over the seeds that are finished."""
    bench = BENCHES[recipe]
    lines = [f"| {recipe} | {' | '.join(bench.columns)} | seeds |", "|---" * (len(bench.columns) + 2) + "|"]
    for number, (setting, own) in enumerate(bench.settings.items()):
        kept = [
            out / "results" / f"{name_of(f'{recipe}-{number}', seed, [*bench.base, *own])}.json"
            for seed in seeds
        ]
        found = [json.loads(k.read_text()) for k in kept if k.exists()]
        if found:
            values = [
                [v for f in found if (v := value_of(f, *at)) is not None] for at in bench.columns.values()
            ]
            lines.append(
                f"| {setting} | {' | '.join(_cell(v) if v else '–' for v in values)} | {len(found)} |"
            )
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command; see the module docstring."""
    parser = argparse.ArgumentParser(description="Four recipes on real data: settings x seeds.")
    parser.add_argument("--recipes", default=",".join(BENCHES), help="comma between")
    parser.add_argument(
        "--settings", default="", help="numbers of the recipe's settings, comma between; empty: all"
    )
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--workers", type=int, default=2, help="runs side by side, one thread each")
    parser.add_argument("--out", type=Path, default=ROOT / "data" / "real_recipes")
    given = parser.parse_args()
    recipes, seeds = given.recipes.split(","), [int(s) for s in given.seeds.split(",")]
    unknown = [r for r in recipes if r not in BENCHES]
    if unknown:
        raise ConsiliumError(f"recipe '{unknown[0]}' is not one of: {', '.join(BENCHES)}")
    data, out = data_folder(), given.out.resolve()
    for folder in ("results", "runs"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    jobs = []
    for recipe in recipes:
        root = out / recipe / "federation"
        for centre, rows in BENCHES[recipe].write(data, out / recipe).items():
            save_cohort(rows.reset_index(drop=True), root / centre / "cohort.csv")
        for setting in BENCHES[recipe].settings:  # once, before the workers look
            config = compose_config(overrides_of(recipe, setting, out, data))
            for centre in config.federation.centres:
                cohort, store = (
                    load_cohort(root / centre, centre),
                    SliceStore(root / centre / ".consilium" / "slices"),
                )
                _, skipped = preprocess_cohort(
                    cohort,
                    root / centre,
                    config.preprocess,
                    store,
                    given.workers,
                    False,
                    list_mask_columns(config),
                )
                if skipped:
                    print(
                        f"{recipe} {centre}: {len(cohort)} scans, {len(skipped)} skipped: "
                        f"{skipped[0].reason}",
                        flush=True,
                    )
        numbers = (
            [int(n) for n in given.settings.split(",")]
            if given.settings
            else range(len(BENCHES[recipe].settings))
        )
        jobs += [
            (recipe, list(BENCHES[recipe].settings)[n], seed, str(data), str(out))
            for seed in seeds
            for n in numbers
        ]
    with ProcessPoolExecutor(given.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for line in pool.map(run_one, jobs):
            print(line, flush=True)
    for recipe in recipes:
        text = table(recipe, out, seeds)
        (out / f"{recipe}.md").write_text(text)
        print(text)


if __name__ == "__main__":
    try:
        main()
    except ConsiliumError as error:
        sys.exit(f"error: {error}")
