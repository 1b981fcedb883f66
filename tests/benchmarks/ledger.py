"""What a long run of many centres costs the ledger, the checkpoint's history and the report.

Seconds of every write and every read.

    .venv/bin/python -m tests.benchmarks.ledger [--rounds 1000] [--centres 100] [--runs 100] [--out FOLDER]

Rounds are made up (two tasks, scores from histograms) and written as server/rounds/coordinator.py writes them
at the end of a round: the ledger (SQLite), then the checkpoint with the run's history, here of a small model,
so that what is timed is the history. Then everything is read as `consilium-server runs` and a report read it.
`CPU` is user + system seconds of this process.
"""

from __future__ import annotations

import argparse
import gc
import os
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.config.compose import compose_config
from common.config.parse import config_to_dict
from common.config.schema import Config
from common.learning.class_imbalance import compute_effective_centres
from common.modeling.parameters import Weights, build_layout
from common.protocol.messages import JoinReply, Sums
from server.analysis import score_tables
from server.ledger.ledger import Ledger
from server.reporting.report import write_report
from server.reporting.terminal_tables import build_result_table
from server.rounds.run_checkpoint import checkpoint_run
from server.run.records import BestRound, CentreRound, RoundRecord, StageRecord
from server.run.run_state import ModelState, Run

RUN, STAGE = "20260101-000000-multisource-federated-0000", "main"


def sums_of(draws: np.random.Generator, config: Config) -> Sums:
    """What centres answer on validation.

    Histograms of a binary task, confusions of a multiclass one, losses.
    """
    sums: Sums = {}
    for k, centre in enumerate(config.federation.centres):
        sums[f"{centre}/covid/hist"] = np.stack(
            [draws.multinomial(40, weights) for weights in SHAPES]
        ).astype(float)
        confusion = np.zeros((8, 8))
        confusion[k % 8] = draws.multinomial(80, np.full(8, 1 / 8))
        sums[f"{centre}/source/confusion"] = confusion
        sums[f"{centre}/covid/loss"], sums[f"{centre}/source/loss"] = draws.random((2, 2)) * 80
    return sums


SHAPES = [np.exp(-((np.arange(256) - middle) ** 2) / 5000) for middle in (90, 160)]
SHAPES = [shape / shape.sum() for shape in SHAPES]


def entry_of(draws: np.random.Generator, config: Config, round: int) -> RoundRecord:
    """A round as the coordinator keeps it."""
    centres = config.federation.centres
    share = draws.dirichlet(np.full(len(centres), 20.0))
    weights = {
        part: dict(zip(centres, share.tolist(), strict=True))
        for part in ("backbone", "decoder", "covid", "source")
    }
    replies = {
        c: CentreRound(
            accepted=True,
            scans=80,
            steps=20,
            seconds=30 * draws.random(),
            loss=draws.random(),
            norm=draws.random(),
            bytes_up=6_000_000,
            bytes_down=24_000_000,
        )
        for c in centres
    }
    return RoundRecord(
        round=round,
        seconds=31.0,
        bytes_up=6_000_000 * len(centres),
        bytes_down=24_000_000 * len(centres),
        weights=weights,
        effective_centres={part: compute_effective_centres(w) for part, w in weights.items()},
        centres=replies,
        validation=score_tables.compute_scores(sums_of(draws, config), config, list(config.tasks)),
    )


def timed(what: Callable[[], Any]) -> tuple[float, float, Any]:
    """(wall seconds, CPU seconds, what came)."""
    began, cpu = time.perf_counter(), time.process_time()
    found = what()
    return time.perf_counter() - began, time.process_time() - cpu, found


def row(name: str, wall: list[float], cpu: list[float], per: int = 1) -> str:
    """One line of the table of writes, in milliseconds."""
    cells = [
        f"{1000 * value:.2f}"
        for value in (np.median(wall), np.quantile(wall, 0.99), np.median(cpu), np.median(wall) / per)
    ]
    return f"| {name} | {' | '.join(cells)} |"


def main() -> None:
    """The command; see the module docstring."""
    parser = argparse.ArgumentParser(description="The ledger and the report of a long run.")
    parser.add_argument("--rounds", type=int, default=1000)
    parser.add_argument("--centres", type=int, default=100)
    parser.add_argument(
        "--runs", type=int, default=100, help="other runs in the same ledger, for the list of runs"
    )
    parser.add_argument("--out", default="", help="keep ledger and report here")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        bench(given.rounds, given.centres, given.runs, Path(given.out or temporary))


def bench(rounds: int, centres: int, others: int, folder: Path) -> None:
    """Prints three tables: writes, reads, the report."""
    names = [f"centre{k:03d}" for k in range(centres)]
    sources = ",".join("abcdefgh")
    config = compose_config(
        [
            f"federation.centres=[{','.join(names)}]",
            f"tasks.source.classes=[{sources}]",
            f"stage.rounds={rounds}",
        ]
    )
    draws = np.random.default_rng(1)
    ledger = Ledger(f"sqlite:///{folder / 'ledger.db'}")
    for k in range(others):
        ledger.add_run(
            f"other{k}",
            recipe="multisource",
            mode="federated",
            config=config_to_dict(config),
            code_fingerprint="0",
        )
        ledger.log_event(f"other{k}", "finished")
    ledger.add_run(
        RUN, recipe="multisource", mode="federated", config=config_to_dict(config), code_fingerprint="0"
    )
    counts: Sums = {
        f"{c}/{split}/covid": np.array([40.0, 40.0, 0.0]) for c in names for split in ("train", "val", "test")
    }
    presence = {
        c: JoinReply(c, [c], "0", [c], ["covid"], {"train": 80}, {}, {"torch": "2"}, "cpu") for c in names
    }
    result = score_tables.create_result(RUN, config, presence, counts)
    joined = [
        timed(lambda c=c: ledger.add_centre(RUN, c, {"counts": {"covid": [40.0, 40.0]}})) for c in names
    ]  # type: ignore[misc]
    stage = StageRecord(STAGE)
    result.stages.append(stage)
    layout = build_layout(torch.nn.Linear(1000, 100))
    model = ModelState(layout, Weights(np.zeros(layout.size, np.float32), np.empty(0, np.int64)))
    run = Run(RUN, config, folder, None, ledger, model)  # type: ignore[arg-type]
    run.result = result
    written, events, kept, made = [], [], [], []
    gc.freeze()
    for round in range(rounds):
        *spent, entry = timed(lambda round=round: entry_of(draws, config, round))  # type: ignore[misc]
        made.append(spent)
        stage.rounds.append(entry)
        add = partial(
            ledger.add_round, RUN, STAGE, entry, started=datetime.now(UTC), close_reason="all replied"
        )
        written.append(timed(add)[:2])
        events.append(
            timed(lambda: ledger.log_event(RUN, "left_out", "no reply within 3600 s", names[0]))[:2]
        )
        stage.best = BestRound(STAGE, round, 0.9)
        model.weights.floats[0] = round
        kept.append(timed(lambda round=round: checkpoint_run(run, STAGE, round))[:2])  # type: ignore[misc]
    result.test = score_tables.compute_scores(
        sums_of(draws, config), config, list(config.tasks), with_sums=True
    )
    ledger.add_metrics(RUN, STAGE, rounds - 1, "test", result.test)
    ledger.log_event(RUN, "finished")
    round_reads: dict[str, Callable[[str], Any]] = {
        "rounds": ledger.read_rounds,
        "contributions": ledger.read_contributions,
        "group weights": ledger.read_group_weights,
        "scores": ledger.read_scores,
    }
    rows = {name: len(read(RUN)) for name, read in round_reads.items()}
    per_round = sum(rows.values()) // rounds
    print(f"{rounds} rounds x {centres} centres, {per_round} rows a round, load {os.getloadavg()[0]:.1f}\n")
    print(f"| write, ms | median | 99th percentile | CPU | median a row |\n{'|---' * 5}|")
    print(row("a centre joins", [w for w, _, _ in joined], [c for _, c, _ in joined]))
    print(row("an event", *map(list, zip(*events, strict=True))))
    print(row(f"a round of {centres} centres, whole", *map(list, zip(*written, strict=True)), per_round))
    third = max(1, rounds // 10)
    print(row("checkpoint, first tenth of the run", *map(list, zip(*kept[:third], strict=True))))
    print(row("checkpoint, last tenth of the run", *map(list, zip(*kept[-third:], strict=True))))
    print(row("(a round's scores, computed)", *map(list, zip(*made, strict=True))))
    size = (folder / "ledger.db").stat().st_size
    print(f"\nThe ledger has {size / 1e6:.0f} MB, {size / rounds / centres:.0f} bytes a centre and round.\n")
    print(f"| read | s | CPU | rows |\n{'|---' * 4}|")
    reads: dict[str, Callable[[], Any]] = {"runs": ledger.read_runs}
    run_reads = {"status": ledger.read_status, "events": ledger.read_events, "centres": ledger.read_centres}
    for name, read_run in (run_reads | round_reads).items():
        reads[name] = partial(read_run, RUN)
    for what, read in (
        *reads.items(),
        ("scores, over all centres only", lambda: ledger.read_scores(RUN, include_centres=False)),
    ):
        wall, cpu, found = timed(read)
        print(f"| {what} | {wall:.3f} | {cpu:.3f} | {len(found) if isinstance(found, list) else 1} |")
    page = folder / "report.html"
    print(f"\n| report | s | CPU | MB |\n{'|---' * 4}|")
    for what, size_of in (
        (lambda: write_report(page, result), lambda: page.stat().st_size / 1e6),
        (lambda: build_result_table(result), lambda: 0.0),
    ):
        wall, cpu, _ = timed(what)
        print(
            f"| {'report.html' if size_of() else 'table of the terminal'} | {wall:.2f} | {cpu:.2f} | "
            f"{size_of():.1f} |"
        )


if __name__ == "__main__":
    main()
