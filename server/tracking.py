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

from common.errors import ConsiliumError
from server import latest
from server.figures import finite
from server.ledger import Ledger, Row

Point = tuple[str, str, float, int, float]  # curve (a centre or view), tag, value, step, Unix time
Steps = dict[tuple[str, int], tuple[int, datetime]]  # {(stage, round): (step, when it closed)}; a step is a round, counted over all stages
VIEWS = ("macro", "pooled", "worst", "spread")
log = logging.getLogger("consilium.server")


def tensorboard(ledger: Ledger, run: str, folder: Path) -> int:
    """Write the run's curves to `folder`/RUN; returns how many points there are. Raises ConsiliumError."""
    with writing(folder / run) as write:
        return write(points(ledger, run))


@contextlib.contextmanager
def live(ledger: Ledger, run: str, folder: Path | None) -> Iterator[Callable[[], None]]:
    """A function that, called when a round has closed, adds it to the curves in `folder`/RUN; at the block's end the test is added. A disk that is
    full ends the curves and not the run. Raises ConsiliumError where TensorBoard is not installed."""
    if folder is None:
        yield lambda: None
        return
    with writing(folder / run) as write:
        begun = over = False

        def add(more: Callable[[Ledger, str], Iterable[Point]]) -> None:
            nonlocal begun, over
            try:
                if not over:
                    write(more(ledger, run) if begun else points(ledger, run))  # of a run taken up again, what was before too
            except OSError as error:
                over = True
                log.warning("no curves from here on: %s cannot be written (%s)", folder, error.strerror)
            begun = True

        yield lambda: add(last)
        add(tested)


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[Callable[[Iterable[Point]], int]]:
    """A function that adds points to the curves in a folder, for TensorBoard to read at once, and returns how many there were."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError:
        raise ConsiliumError("TensorBoard is not installed: pip install 'consilium[tensorboard]'") from None
    writers: dict[str, Any] = {}

    def write(found: Iterable[Point]) -> int:
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


def points(ledger: Ledger, run: str) -> Iterator[Point]:
    """All of a run."""
    at = steps(ledger, run)
    yield from of_scores(at, ledger.scores(run))
    yield from of_centres(at, ledger.contributions(run), ledger.shares(run))


def last(ledger: Ledger, run: str) -> Iterator[Point]:
    """Of the round that was closed last."""
    at, closed = steps(ledger, run), latest.closed(ledger, run)
    yield from of_scores(at, closed["scores"])
    yield from of_centres(at, closed["contributions"], closed["shares"])


def tested(ledger: Ledger, run: str) -> Iterator[Point]:
    """Of the test at a run's end."""
    return of_scores(steps(ledger, run), [row for row in ledger.scores(run) if row["split"] == "test"])


def steps(ledger: Ledger, run: str) -> Steps:
    rows = enumerate(ledger.rounds(run))
    return {(row["stage"], row["round"]): (k, row["started"] + timedelta(seconds=row["seconds"])) for k, row in rows}


def of_scores(steps: Steps, rows: Iterable[Row]) -> Iterator[Point]:
    """Of every centre and view, by task, metric and split."""
    for row in rows:
        step, at = steps[row["stage"], row["round"]]
        views = {view: row["views"].get(view, {}) for view in VIEWS}
        for curve, values in (*row["centres"].items(), *views.items()):
            for metric, value in values.items():
                number = finite(value.get("value") if isinstance(value, dict) else value)
                if number is not None:
                    yield curve, f"{row['task']}/{metric}/{row['split']}", number, step, at.timestamp()


def of_centres(steps: Steps, contributions: Iterable[Row], shares: Iterable[Row]) -> Iterator[Point]:
    """Loss, seconds, epsilon and weights."""
    for row in contributions:
        step, at = steps[row["stage"], row["round"]]
        for what in ("loss", "seconds", "epsilon"):
            if row[what] is not None:
                yield row["centre"], f"training/{what}", row[what], step, at.timestamp()
    for row in shares:
        step, at = steps[row["stage"], row["round"]]
        for centre, weight in row["weights"].items():
            yield centre, f"weight/{row['part']}", weight, step, at.timestamp()
