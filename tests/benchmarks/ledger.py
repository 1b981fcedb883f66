"""Measure what a long run of many centres costs the ledger, the checkpoints and the report.

    .venv/bin/python -m tests.benchmarks.ledger [--rounds 1000] [--centres 100] [--runs 100] [--out FOLDER]

The rounds are made up (two tasks, scores from histograms) and written as server/rounds/coordinator.py writes
them at the end of a round: to the ledger (SQLite), then as a checkpoint with the run's history. The model is
small, so that the time is the history's. Then everything is read as `consilium-server runs` and a report
read it. "CPU" is the user and system seconds of this process.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from common.config.compose import compose_config
from common.config.parse import config_to_dict
from common.config.schema import Config
from common.learning.class_imbalance import compute_effective_centres
from common.modeling.parameters import Weights, build_layout
from common.protocol.messages import JoinReply, Sums
from common.protocol.sum_key import LabelCountKey, SumKey
from server.analysis import score_tables
from server.ledger.ledger import Ledger
from server.reporting.report import write_report
from server.reporting.terminal_tables import build_result_table
from server.rounds.run_checkpoint import checkpoint_run
from server.run.records import BestRound, CentreRound, RoundRecord, RunResult, StageRecord
from server.run.run_state import ModelState, Run
from server.run.transport import Transport
from tests.benchmarks.measuring import Timing, format_header, format_row, time_call, time_result

RUN_ID = "20260101-000000-multisource-federated-0000"
STAGE = "main"
SOURCES = "abcdefgh"
NUM_BINS = 256
GROUPS = ("backbone", "decoder", "covid", "source")
BYTES_UP = 6_000_000
BYTES_DOWN = 4 * BYTES_UP


def compose_long_run(num_rounds: int, num_centres: int) -> Config:
    names = [f"centre{number:03d}" for number in range(num_centres)]
    overrides = [
        f"federation.centres=[{','.join(names)}]",
        f"tasks.source.classes=[{','.join(SOURCES)}]",
        f"stage.rounds={num_rounds}",
    ]
    return compose_config(overrides)


# --- made-up replies


def make_score_distribution(mean_bin: int) -> np.ndarray:
    """Probabilities [bins] of a class's scores."""
    density = np.exp(-((np.arange(NUM_BINS) - mean_bin) ** 2) / 5000)
    return density / density.sum()


SCORE_DISTRIBUTIONS = [make_score_distribution(90), make_score_distribution(160)]


def draw_scores(rng: np.random.Generator, config: Config) -> Sums:
    """What the centres reply to a question for scores: histograms, confusion matrices and losses."""
    sums: Sums = {}
    for index, centre in enumerate(config.federation.centres):
        histograms = [rng.multinomial(40, distribution) for distribution in SCORE_DISTRIBUTIONS]
        confusion = np.zeros((len(SOURCES), len(SOURCES)))
        confusion[index % len(SOURCES)] = rng.multinomial(80, np.full(len(SOURCES), 1 / len(SOURCES)))
        losses = rng.random((2, 2)) * 80
        sums[str(SumKey(centre, "covid", "hist"))] = np.stack(histograms).astype(float)
        sums[str(SumKey(centre, "source", "confusion"))] = confusion
        sums[str(SumKey(centre, "covid", "loss"))] = losses[0]
        sums[str(SumKey(centre, "source", "loss"))] = losses[1]
    return sums


def draw_round(rng: np.random.Generator, config: Config, round_number: int) -> RoundRecord:
    """A round as the coordinator records it."""
    names = config.federation.centres
    shares = rng.dirichlet(np.full(len(names), 20.0)).tolist()
    weights = {group: dict(zip(names, shares, strict=True)) for group in GROUPS}
    centre_rounds = {}
    for name in names:
        centre_rounds[name] = CentreRound(
            accepted=True,
            scans=80,
            steps=20,
            seconds=30 * rng.random(),
            loss=rng.random(),
            norm=rng.random(),
            bytes_up=BYTES_UP,
            bytes_down=BYTES_DOWN,
        )
    return RoundRecord(
        round=round_number,
        seconds=31.0,
        bytes_up=BYTES_UP * len(names),
        bytes_down=BYTES_DOWN * len(names),
        weights=weights,
        effective_centres={
            group: compute_effective_centres(by_centre) for group, by_centre in weights.items()
        },
        centres=centre_rounds,
        validation=score_tables.compute_scores(draw_scores(rng, config), config, list(config.tasks)),
    )


# --- writing


@dataclass
class WriteTimings:
    """How long each write took."""

    joins: list[Timing] = field(default_factory=list)
    scores: list[Timing] = field(default_factory=list)  # computing a round's scores, for comparison
    rounds: list[Timing] = field(default_factory=list)
    events: list[Timing] = field(default_factory=list)
    checkpoints: list[Timing] = field(default_factory=list)


def add_other_runs(ledger: Ledger, config: Config, num_runs: int) -> None:
    for number in range(num_runs):
        run_id = f"other{number}"
        add_run(ledger, config, run_id)
        ledger.log_event(run_id, "finished")


def add_run(ledger: Ledger, config: Config, run_id: str) -> None:
    config_values = config_to_dict(config)
    ledger.add_run(run_id, recipe="multisource", mode="federated", config=config_values, code_fingerprint="0")


def begin_run(ledger: Ledger, config: Config, folder: Path) -> Run:
    """Add the run to the ledger, and return it with its centres and a small model."""
    add_run(ledger, config, RUN_ID)
    label_counts: Sums = {}
    members = {}
    for name in config.federation.centres:
        for split in ("train", "val", "test"):
            label_counts[str(LabelCountKey(name, split, "covid"))] = np.array([40.0, 40.0, 0.0])
        versions = {"torch": "2"}
        members[name] = JoinReply(name, [name], "0", [name], ["covid"], {"train": 80}, {}, versions, "cpu")
    layout = build_layout(torch.nn.Linear(1000, 100))
    weights = Weights(np.zeros(layout.size, np.float32), np.empty(0, np.int64))
    run = Run(RUN_ID, config, folder, cast(Transport, None), ledger, ModelState(layout, weights))
    run.result = score_tables.create_result(RUN_ID, config, members, label_counts)
    run.result.stages.append(StageRecord(STAGE))
    return run


def write_run(run: Run, num_rounds: int, rng: np.random.Generator) -> WriteTimings:
    """Write a whole run, round by round."""
    ledger = run.ledger
    names = run.config.federation.centres
    timings = WriteTimings()
    for name in names:
        join = partial(ledger.add_centre, RUN_ID, name, {"counts": {"covid": [40.0, 40.0]}})
        timings.joins.append(time_call(join))
    stage = run.result.stages[0]
    log_exclusion = partial(ledger.log_event, RUN_ID, "left_out", "no reply within 3600 s", names[0])
    gc.freeze()
    for round_number in range(num_rounds):
        round_record, timing = time_result(partial(draw_round, rng, run.config, round_number))
        timings.scores.append(timing)
        stage.rounds.append(round_record)
        add_round = partial(
            ledger.add_round,
            RUN_ID,
            STAGE,
            round_record,
            started=datetime.now(UTC),
            close_reason="all replied",
        )
        timings.rounds.append(time_call(add_round))
        timings.events.append(time_call(log_exclusion))
        stage.best = BestRound(STAGE, round_number, 0.9)
        run.model.weights.floats[0] = round_number
        timings.checkpoints.append(time_call(partial(checkpoint_run, run, STAGE, round_number)))
    test_sums = draw_scores(rng, run.config)
    tasks = list(run.config.tasks)
    run.result.test = score_tables.compute_scores(test_sums, run.config, tasks, with_sums=True)
    ledger.add_metrics(RUN_ID, STAGE, num_rounds - 1, "test", run.result.test)
    ledger.log_event(RUN_ID, "finished")
    return timings


# --- tables


def format_timings(name: str, timings: list[Timing], rows_per_write: int = 1) -> str:
    """A row of the table of writes, in milliseconds."""
    wall = [timing.wall for timing in timings]
    seconds = [
        np.median(wall),
        np.quantile(wall, 0.99),
        np.median([timing.cpu for timing in timings]),
        np.median(wall) / rows_per_write,
    ]
    return format_row([name, *(f"{1000 * value:.2f}" for value in seconds)])


def print_writes(timings: WriteTimings, rows_per_round: int) -> None:
    num_centres = len(timings.joins)
    tenth = max(1, len(timings.rounds) // 10)
    print(format_header(["write, ms", "median", "99th percentile", "CPU", "median a row"]))
    print(format_timings("a centre joins", timings.joins))
    print(format_timings("an event", timings.events))
    print(format_timings(f"a round of {num_centres} centres, whole", timings.rounds, rows_per_round))
    print(format_timings("checkpoint, first tenth of the run", timings.checkpoints[:tenth]))
    print(format_timings("checkpoint, last tenth of the run", timings.checkpoints[-tenth:]))
    print(format_timings("(a round's scores, computed)", timings.scores))


def list_round_reads(ledger: Ledger) -> dict[str, Callable[[], list[Any]]]:
    """The reads of tables that grow with every round."""
    return {
        "rounds": partial(ledger.read_rounds, RUN_ID),
        "contributions": partial(ledger.read_contributions, RUN_ID),
        "group weights": partial(ledger.read_group_weights, RUN_ID),
        "scores": partial(ledger.read_scores, RUN_ID),
    }


def print_reads(ledger: Ledger) -> None:
    reads: dict[str, Callable[[], Any]] = {
        "runs": ledger.read_runs,
        "status": partial(ledger.read_status, RUN_ID),
        "events": partial(ledger.read_events, RUN_ID),
        "centres": partial(ledger.read_centres, RUN_ID),
        **list_round_reads(ledger),
        "scores, over all centres only": partial(ledger.read_scores, RUN_ID, include_centres=False),
    }
    print(format_header(["read", "s", "CPU", "rows"]))
    for name, read in reads.items():
        rows, timing = time_result(read)
        num_rows = len(rows) if isinstance(rows, list) else 1
        print(format_row([name, f"{timing.wall:.3f}", f"{timing.cpu:.3f}", num_rows]))


def print_reports(result: RunResult, folder: Path) -> None:
    page = folder / "report.html"
    report_timing = time_call(partial(write_report, page, result))
    table_timing = time_call(partial(build_result_table, result))
    page_megabytes = page.stat().st_size / 1e6
    print("\n" + format_header(["report", "s", "CPU", "MB"]))
    for name, timing, megabytes in (
        ("report.html", report_timing, page_megabytes),
        ("table of the terminal", table_timing, 0.0),
    ):
        print(format_row([name, f"{timing.wall:.2f}", f"{timing.cpu:.2f}", f"{megabytes:.1f}"]))


def measure_long_run(num_rounds: int, num_centres: int, num_other_runs: int, folder: Path) -> None:
    """Print three tables: writes, reads, the report."""
    config = compose_long_run(num_rounds, num_centres)
    database_path = folder / "ledger.db"
    ledger = Ledger(f"sqlite:///{database_path}")
    add_other_runs(ledger, config, num_other_runs)
    run = begin_run(ledger, config, folder)
    timings = write_run(run, num_rounds, np.random.default_rng(1))
    rows_per_round = sum(len(read()) for read in list_round_reads(ledger).values()) // num_rounds
    load = os.getloadavg()[0]
    print(f"{num_rounds} rounds x {num_centres} centres, {rows_per_round} rows a round, load {load:.1f}\n")
    print_writes(timings, rows_per_round)
    size = database_path.stat().st_size
    bytes_each = size / num_rounds / num_centres
    print(f"\nThe ledger has {size / 1e6:.0f} MB, {bytes_each:.0f} bytes a centre and round.\n")
    print_reads(ledger)
    print_reports(run.result, folder)


def main() -> None:
    """Run the command that the module's docstring describes."""
    parser = argparse.ArgumentParser(description="The cost of a long run's ledger, checkpoints and report.")
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--centres", type=int, default=100)
    parser.add_argument("--runs", type=int, default=100, help="number of other runs in the same ledger")
    parser.add_argument("--out", default="", help="folder in which to keep the ledger and the report")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(arguments.out or temporary)
        measure_long_run(arguments.rounds, arguments.centres, arguments.runs, folder)


if __name__ == "__main__":
    main()
