"""A run's curves for TensorBoard, from the ledger: of a run that goes on or one long ended, as often as one likes (`export`); or live, round by
round, into the folder that `$CONSILIUM_TENSORBOARD` of the coordinator's process names.

Every centre, and every view over the centres, is a TensorBoard run of its own, so that they lie in one chart: RUN/north, RUN/macro, RUN/worst ...
What an earlier writing left there is drawn no more.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from common.utils.errors import ConsiliumError
from server.ledger import views
from server.ledger.ledger import Ledger, Row
from server.reporting.figures import to_finite_float

ScalarPoint = tuple[str, str, float, int, float]  # curve (a centre or view), tag, value, step, Unix time
RoundSteps = dict[
    tuple[str, int], tuple[int, datetime]
]  # {(stage, round): (step, when it closed)}; a step is a round, counted over all stages
SUMMARY_VIEWS = ("macro", "pooled", "worst", "spread")
log = logging.getLogger("consilium.server")


def export_tensorboard(ledger: Ledger, run_id: str, folder: Path) -> int:
    """Write the run's curves to `folder`/RUN; returns how many points there are. Raises ConsiliumError."""
    with open_writers(folder / run_id) as write:
        return write(list_points(ledger, run_id))


@contextlib.contextmanager
def live_writer(ledger: Ledger, run_id: str, folder: Path | None) -> Iterator[Callable[[], None]]:
    """A function that, called when a round has closed, adds it to the curves in `folder`/RUN; at the block's end the test is added. A disk that is
    full ends the curves and not the run. Raises ConsiliumError where TensorBoard is not installed."""
    if folder is None:
        yield lambda: None
        return
    with open_writers(folder / run_id) as write:
        begun = over = False

        def add_points(more: Callable[[Ledger, str], Iterable[ScalarPoint]]) -> None:
            nonlocal begun, over
            try:
                if not over:
                    write(
                        more(ledger, run_id) if begun else list_points(ledger, run_id)
                    )  # of a run taken up again, what was before too
            except OSError as error:
                over = True
                log.warning("no curves from here on: %s cannot be written (%s)", folder, error.strerror)
            begun = True

        yield lambda: add_points(list_round_points)
        add_points(list_test_points)


@contextlib.contextmanager
def open_writers(folder: Path) -> Iterator[Callable[[Iterable[ScalarPoint]], int]]:
    """A function that adds points to the curves in a folder, for TensorBoard to read at once, and returns how many there were."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError:
        raise ConsiliumError("TensorBoard is not installed: pip install 'consilium[tensorboard]'") from None
    writers: dict[str, Any] = {}

    def write(found: Iterable[ScalarPoint]) -> int:
        count = 0
        for curve, tag, value, step, at in found:
            if curve not in writers:
                writers[curve] = SummaryWriter(str(folder / curve), purge_step=0)
            writers[curve].add_scalar(tag, value, step, walltime=at)
            count += 1
        for writer in writers.values():
            writer.flush()
        return count

    try:
        yield write
    finally:
        for writer in writers.values():
            with contextlib.suppress(OSError):
                writer.close()


def list_points(ledger: Ledger, run_id: str) -> Iterator[ScalarPoint]:
    """All of a run."""
    at = number_rounds(ledger, run_id)
    yield from convert_scores(at, ledger.read_scores(run_id))
    yield from convert_contributions(at, ledger.read_contributions(run_id), ledger.read_group_weights(run_id))


def list_round_points(ledger: Ledger, run_id: str) -> Iterator[ScalarPoint]:
    """Of the round that was closed last."""
    at, closed = number_rounds(ledger, run_id), views.last_round(ledger, run_id)
    yield from convert_scores(at, closed["scores"])
    yield from convert_contributions(at, closed["contributions"], closed["shares"])


def list_test_points(ledger: Ledger, run_id: str) -> Iterator[ScalarPoint]:
    """Of the test at a run's end."""
    return convert_scores(
        number_rounds(ledger, run_id), [row for row in ledger.read_scores(run_id) if row["split"] == "test"]
    )


def number_rounds(ledger: Ledger, run_id: str) -> RoundSteps:
    rows = enumerate(ledger.read_rounds(run_id))
    return {
        (row["stage"], row["round"]): (k, row["started"] + timedelta(seconds=row["seconds"]))
        for k, row in rows
    }


def convert_scores(steps: RoundSteps, rows: Iterable[Row]) -> Iterator[ScalarPoint]:
    """Of every centre and view, by task, metric and split."""
    for row in rows:
        step, at = steps[row["stage"], row["round"]]
        views = {view: row["views"].get(view, {}) for view in SUMMARY_VIEWS}
        for curve, values in (*row["centres"].items(), *views.items()):
            for metric, value in values.items():
                number = to_finite_float(value.get("value") if isinstance(value, dict) else value)
                if number is not None:
                    yield curve, f"{row['task']}/{metric}/{row['split']}", number, step, at.timestamp()


def convert_contributions(
    steps: RoundSteps, contributions: Iterable[Row], weights: Iterable[Row]
) -> Iterator[ScalarPoint]:
    """Loss, seconds, epsilon and weights."""
    for row in contributions:
        step, at = steps[row["stage"], row["round"]]
        for what in ("loss", "seconds", "epsilon"):
            if row[what] is not None:
                yield row["centre"], f"training/{what}", row[what], step, at.timestamp()
    for row in weights:
        step, at = steps[row["stage"], row["round"]]
        for centre, weight in row["weights"].items():
            yield centre, f"weight/{row['part']}", weight, step, at.timestamp()
