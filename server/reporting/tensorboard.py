"""A run's curves for TensorBoard, from the ledger.

They are written on demand (`export`), of a run that goes on or one long ended; or live after every round,
into the folder that ``$CONSILIUM_TENSORBOARD`` of the coordinator's process names. Every centre, and every
view over centres, is a TensorBoard run of its own, so that they share a chart: RUN/north, RUN/macro,
RUN/worst, ... Points written earlier to the same folder are not drawn any more.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from common.utils.errors import ConsiliumError
from server.ledger.ledger import Ledger
from server.ledger.reader import Row
from server.ledger.views import last_round
from server.reporting.labels import View, to_finite_float
from server.reporting.scores import centre_metrics, view_metrics
from server.run.records import parse_task_scores

TRAINING_VALUES = ("loss", "seconds", "epsilon")
log = logging.getLogger("consilium.server")


class RoundStep(NamedTuple):
    """A round on the x axis."""

    step: int  # counted over all stages, from 0
    time: float  # when it closed, Unix seconds


class ScalarPoint(NamedTuple):
    """A point of a curve."""

    curve: str  # a centre or a view
    tag: str
    value: float
    position: RoundStep


RoundSteps = Mapping[tuple[str, int], RoundStep]  # {(stage, round): ...}
ListPoints = Callable[[Ledger, str], Iterable[ScalarPoint]]  # of a run of the ledger


def export_tensorboard(ledger: Ledger, run_id: str, folder: Path) -> int:
    """Write a run's curves to ``folder/RUN`` and return their number of points.

    Raises:
        ConsiliumError: TensorBoard is not installed.
    """
    with CurveWriter(folder / run_id) as writer:
        return writer.write(list_points(ledger, run_id))


class CurveWriter:
    """Adds points to the curves in a folder, where TensorBoard can read them at once; a context manager.

    Raises:
        ConsiliumError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        """Open a folder for writing."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError:
            raise ConsiliumError(
                "TensorBoard is not installed: pip install 'consilium[tensorboard]'"
            ) from None
        self.folder = folder
        self._make_writer = SummaryWriter
        self._writers: dict[str, Any] = {}

    def __enter__(self) -> CurveWriter:
        """Return the writer."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the files; a full disk is no error any more."""
        for writer in self._writers.values():
            with contextlib.suppress(OSError):
                writer.close()

    def write(self, points: Iterable[ScalarPoint]) -> int:
        """Add points and return their number."""
        count = 0
        for point in points:
            if point.curve not in self._writers:
                self._writers[point.curve] = self._make_writer(str(self.folder / point.curve), purge_step=0)
            step, time = point.position
            self._writers[point.curve].add_scalar(point.tag, point.value, step, walltime=time)
            count += 1
        for writer in self._writers.values():
            writer.flush()
        return count


class LiveCurves:
    """The curves of a run that goes on. When the disk is full, the curves end and the run goes on."""

    def __init__(self, writer: CurveWriter, ledger: Ledger, run_id: str) -> None:
        """Prepare to add a run's points."""
        self.writer = writer
        self.ledger = ledger
        self.run_id = run_id
        self.has_earlier_rounds = False
        self.is_writable = True

    def add_round(self) -> None:
        """Add the round that closed last."""
        self._add(list_round_points)

    def add_test(self) -> None:
        """Add the test's scores."""
        self._add(list_test_points)

    def _add(self, list_new_points: ListPoints) -> None:
        if not self.is_writable:
            return
        # The first time also the rounds from before a resumed run was interrupted.
        list_missing_points = list_new_points if self.has_earlier_rounds else list_points
        try:
            self.writer.write(list_missing_points(self.ledger, self.run_id))
        except OSError as error:
            self.is_writable = False
            log.warning("curves end here: %s cannot be written (%s)", self.writer.folder, error.strerror)
        self.has_earlier_rounds = True


@contextlib.contextmanager
def live_writer(ledger: Ledger, run_id: str, folder: Path | None) -> Iterator[Callable[[], None]]:
    """Provide a function to call after each round, which adds it to the curves in ``folder/RUN``.

    At the end of the block the test's scores are added. Without a folder the function does nothing.

    Raises:
        ConsiliumError: TensorBoard is not installed.
    """
    if folder is None:
        yield lambda: None
        return
    with CurveWriter(folder / run_id) as writer:
        curves = LiveCurves(writer, ledger, run_id)
        yield curves.add_round
        curves.add_test()


# ---- points


def list_points(ledger: Ledger, run_id: str) -> Iterator[ScalarPoint]:
    """Return all points of a run."""
    steps = number_rounds(ledger, run_id)
    yield from convert_scores(steps, ledger.read_scores(run_id))
    yield from convert_contributions(steps, ledger.read_contributions(run_id))
    yield from convert_weights(steps, ledger.read_group_weights(run_id))


def list_round_points(ledger: Ledger, run_id: str) -> Iterator[ScalarPoint]:
    """Return the points of the round that closed last."""
    closed = last_round(ledger, run_id)
    if closed is None:
        return
    steps = number_rounds(ledger, run_id)
    yield from convert_scores(steps, closed.scores)
    yield from convert_contributions(steps, closed.contributions)
    yield from convert_weights(steps, closed.group_weights)


def list_test_points(ledger: Ledger, run_id: str) -> Iterator[ScalarPoint]:
    """Return the points of the test at a run's end."""
    steps = number_rounds(ledger, run_id)
    for row in ledger.read_scores(run_id):
        if row["split"] == "test":
            yield from convert_scores(steps, [row])


def number_rounds(ledger: Ledger, run_id: str) -> RoundSteps:
    """Return each round's place on the x axis."""
    steps = {}
    for index, row in enumerate(ledger.read_rounds(run_id)):
        closed_at = row["started"] + timedelta(seconds=row["seconds"])
        steps[row["stage"], row["round"]] = RoundStep(index, closed_at.timestamp())
    return steps


def convert_scores(steps: RoundSteps, rows: Iterable[Row]) -> Iterator[ScalarPoint]:
    """Return a point for each defined score of every centre and view."""
    for row in rows:
        position = steps[row["stage"], row["round"]]
        scores = parse_task_scores(row)
        curves: dict[str, Mapping[str, float | None]] = {}
        for centre, centre_scores in scores.centres.items():
            curves[centre] = centre_metrics(centre_scores)
        for view in View:
            curves[view] = {name: metric.value for name, metric in view_metrics(scores, view).items()}
        for curve, metrics in curves.items():
            for metric, value in metrics.items():
                number = to_finite_float(value)
                if number is not None:
                    yield ScalarPoint(curve, f"{row['task']}/{metric}/{row['split']}", number, position)


def convert_contributions(steps: RoundSteps, rows: Iterable[Row]) -> Iterator[ScalarPoint]:
    """Return the points of each centre's loss, seconds and epsilon."""
    for row in rows:
        position = steps[row["stage"], row["round"]]
        for name in TRAINING_VALUES:
            if row[name] is not None:
                yield ScalarPoint(row["centre"], f"training/{name}", row[name], position)


def convert_weights(steps: RoundSteps, rows: Iterable[Row]) -> Iterator[ScalarPoint]:
    """Return the points of each centre's weight in each parameter group."""
    for row in rows:
        position = steps[row["stage"], row["round"]]
        for centre, weight in row["centre_weights"].items():
            yield ScalarPoint(centre, f"weight/{row['group']}", weight, position)
