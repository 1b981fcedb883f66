"""Train four recipes on real data, beside pooled training and their papers' own baseline designs.

    .venv/bin/python -m tests.benchmarks.real_recipes [--recipes triage,transfer] [--settings 0,1] [--seeds
    1,2,3] [--workers 2] [--out DIR]

Prints a table of settings x seeds for each recipe. Finished runs stay in DIR/results and are not repeated;
DIR/<recipe>.md are the tables, README.md says what they show. The data are in `$CONSILIUM_REAL_DATA`, else
`../shared/data`; derived pictures stay in DIR.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from client.data.cohort import load_cohort, save_cohort
from client.data.loading import list_mask_columns
from client.imaging.preprocess import preprocess_cohort
from client.imaging.slice_store import SliceStore
from common.config.compose import compose_config
from common.config.schema import Config
from common.utils.errors import ConsiliumError
from server.ledger.ledger import Ledger
from server.rounds.cross_validation import start_run_or_folds
from server.run.records import CrossValidationSummary, RunResult
from tests.benchmarks.measuring import format_header, format_row, time_result
from tests.benchmarks.real_ct import (
    configure_worker,
    format_mean_and_spread,
    make_folders,
    make_run_id,
    write_result,
)
from tests.benchmarks.real_ct_data import ROOT, find_data_folder, imagenet_override
from tests.benchmarks.real_recipe_settings import BENCHES, Bench, Column
from tests.in_process_federation import InProcess, sites


@dataclass(frozen=True)
class Job:
    """One run: a recipe's setting with a seed."""

    recipe: str
    setting: str
    seed: int
    data: Path
    out: Path

    @property
    def bench(self) -> Bench:
        return BENCHES[self.recipe]

    @property
    def run_id(self) -> str:
        number = list(self.bench.settings).index(self.setting)
        overrides = [*self.bench.base, *self.bench.settings[self.setting]]
        return make_run_id(f"{self.recipe}-{number}", self.seed, overrides)

    @property
    def result_path(self) -> Path:
        return self.out / "results" / f"{self.run_id}.json"

    @property
    def federation_dir(self) -> Path:
        return self.out / self.recipe / "federation"

    def list_overrides(self) -> list[str]:
        """The overrides with folders stand first; they are no part of the run's id."""
        centres = sorted(path.name for path in self.federation_dir.iterdir())
        return [
            f"federation.data_root={self.federation_dir}",
            f"federation.centres=[{','.join(centres)}]",
            imagenet_override(self.data),
            *self.bench.base,
            *self.bench.settings[self.setting],
            f"seed={self.seed}",
        ]


# --- runs


def execute_job(job: Job) -> str:
    """Run the job unless its result exists; return its line for the screen."""
    title = f"{job.recipe}  {job.setting:44} seed {job.seed}"
    if not job.result_path.exists():
        configure_worker(job.out, job.run_id)
        try:
            result, timing = time_result(lambda: run_anew(job))
        except ConsiliumError as error:  # the others go on
            return f"{title}  failed: {error}"
        values = {
            "recipe": job.recipe,
            "setting": job.setting,
            "seed": job.seed,
            "test": collect_test_metrics(result),
            "classes": {task: len(fitted.classes) for task, fitted in result.fitted_tasks.items()},
            "seconds": timing.wall,
            "cpu_seconds": timing.cpu,
        }
        write_result(job.result_path, values)
        for run_dir in list_run_files(job):
            if run_dir.is_dir():
                shutil.rmtree(run_dir)  # checkpoints of hundreds of runs would fill the disk
    values = json.loads(job.result_path.read_text())
    scores = []
    for name, column in job.bench.columns.items():
        value = get_metric(values, column)
        if value is not None:
            scores.append(f"{name} {value:.3f}")
    return f"{title}  {'  '.join(scores)}  {values['cpu_seconds']:.0f} CPU-s"


def list_run_files(job: Job) -> list[Path]:
    """The folders of the run and its folds, and its ledger."""
    return list((job.out / "runs").glob(f"{job.run_id}*"))


def run_anew(job: Job) -> RunResult:
    """Delete what an interrupted run left, and run.

    Returns the result; of a cross-validation, the total over the folds.
    """
    for path in list_run_files(job):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    runs_dir = job.out / "runs"
    config = compose_config(job.list_overrides())
    transport = InProcess(sites(len(config.federation.centres)))
    ledger = Ledger(f"sqlite:///{runs_dir}/{job.run_id}.db")
    outcome = start_run_or_folds(config, transport, runs_dir, ledger, job.run_id)
    return outcome.total if isinstance(outcome, CrossValidationSummary) else outcome


def collect_test_metrics(result: RunResult) -> dict[str, dict[str, Any]]:
    """{task: {macro: metrics, pooled: metrics, centres: {centre: metrics}}}."""
    metrics_by_task = {}
    for task, scores in result.test.items():
        by_centre = {centre: centre_scores.metrics for centre, centre_scores in scores.centres.items()}
        metrics_by_task[task] = {"macro": scores.macro, "pooled": scores.pooled, "centres": by_centre}
    return metrics_by_task


def get_metric(values: dict[str, Any], column: Column) -> float | None:
    """A test metric of a result file; None where it is undefined."""
    views = values["test"].get(column.task, {})
    if column.view in ("macro", "pooled"):
        metrics = views.get(column.view)
    else:
        metrics = views.get("centres", {}).get(column.view)
    value = (metrics or {}).get(column.metric)
    return None if value is None else float(value)


# --- table


def make_table(recipe: str, out: Path, seeds: list[int]) -> str:
    """The Markdown table: mean ± standard deviation over the finished seeds."""
    bench = BENCHES[recipe]
    lines = [format_header([recipe, *bench.columns, "seeds"])]
    for setting in bench.settings:
        paths = [Job(recipe, setting, seed, Path(), out).result_path for seed in seeds]
        results = [json.loads(path.read_text()) for path in paths if path.exists()]
        if results:
            cells = [format_column(results, column) for column in bench.columns.values()]
            lines.append(format_row([setting, *cells, len(results)]))
    return "\n".join(lines) + "\n"


def format_column(results: list[dict[str, Any]], column: Column) -> str:
    metrics = [get_metric(result, column) for result in results]
    defined = [value for value in metrics if value is not None]
    return format_mean_and_spread(defined) if defined else "–"


# --- data


def prepare_recipe(recipe: str, data: Path, out: Path, num_workers: int) -> None:
    """Write the recipe's cohorts, and preprocess them for every setting before the workers read them."""
    federation_dir = out / recipe / "federation"
    for centre, cohort in BENCHES[recipe].make_cohorts(data, out / recipe).items():
        save_cohort(cohort.reset_index(drop=True), federation_dir / centre / "cohort.csv")
    for setting in BENCHES[recipe].settings:
        config = compose_config(Job(recipe, setting, 1, data, out).list_overrides())
        for centre in config.federation.centres:
            preprocess_centre(config, federation_dir / centre, recipe, num_workers)


def preprocess_centre(config: Config, folder: Path, recipe: str, num_workers: int) -> None:
    cohort = load_cohort(folder, folder.name)
    store = SliceStore(folder / ".consilium" / "slices")
    skipped = preprocess_cohort(
        cohort,
        folder,
        config.preprocess,
        store,
        num_workers,
        show_progress=False,
        mask_columns=list_mask_columns(config),
    ).skipped
    if skipped:
        counts = f"{len(cohort)} scans, {len(skipped)} skipped"
        print(f"{recipe} {folder.name}: {counts}: {skipped[0].reason}", flush=True)


def parse_recipes(text: str) -> list[str]:
    """Raises ConsiliumError for an unknown recipe."""
    recipes = text.split(",")
    for recipe in recipes:
        if recipe not in BENCHES:
            raise ConsiliumError(f"unknown recipe '{recipe}'; use one of: {', '.join(BENCHES)}")
    return recipes


def select_settings(recipe: str, numbers: str) -> list[str]:
    """The recipe's settings with these numbers; "" selects all."""
    settings = list(BENCHES[recipe].settings)
    if not numbers:
        return settings
    return [settings[int(number)] for number in numbers.split(",")]


def main() -> None:
    """Run the command that the module's docstring describes."""
    parser = argparse.ArgumentParser(
        description="Four recipes on real data: test scores by setting and seed."
    )
    parser.add_argument("--recipes", default=",".join(BENCHES), help="separated by commas")
    settings_help = "numbers of the recipe's settings, from 0, separated by commas; default: all"
    parser.add_argument("--settings", default="", help=settings_help)
    parser.add_argument("--seeds", default="1,2,3", help="separated by commas")
    parser.add_argument("--workers", type=int, default=2, help="runs side by side, one thread each")
    out_default = ROOT / "data" / "real_recipes"
    parser.add_argument("--out", type=Path, default=out_default, help="folder of the results")
    arguments = parser.parse_args()
    recipes = parse_recipes(arguments.recipes)
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    data = find_data_folder()
    out = arguments.out.resolve()
    make_folders(out)
    jobs = []
    for recipe in recipes:
        prepare_recipe(recipe, data, out, arguments.workers)
        settings = select_settings(recipe, arguments.settings)
        for seed, setting in itertools.product(seeds, settings):
            jobs.append(Job(recipe, setting, seed, data, out))
    with ProcessPoolExecutor(arguments.workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        for line in pool.map(execute_job, jobs):
            print(line, flush=True)
    for recipe in recipes:
        table = make_table(recipe, out, seeds)
        (out / f"{recipe}.md").write_text(table)
        print(table)


if __name__ == "__main__":
    try:
        main()
    except ConsiliumError as error:
        sys.exit(f"error: {error}")
