"""A run's curves for TensorBoard, from the ledger: as often as one likes, of a run that goes on or of one long ended. Off unless asked for.

Every centre, and every view over the centres, is a TensorBoard run of its own, so that they lie in one chart: RUN/north, RUN/macro, RUN/worst ...
"""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from common.errors import ConsiliumError
from server.figures import finite
from server.ledger import Ledger

Point = tuple[str, str, float, int, float]  # curve (a centre or view), tag, value, step, Unix time
VIEWS = ("macro", "pooled", "worst", "spread")


def tensorboard(ledger: Ledger, run: str, folder: Path) -> int:
    """Write the run's curves to `folder`/RUN; returns how many points there are. Raises ConsiliumError."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError:
        raise ConsiliumError("TensorBoard is not installed: pip install 'consilium[tensorboard]'") from None
    if (folder / run).exists():
        raise ConsiliumError(f"{folder / run} exists already, and its curves would be drawn twice; remove it, or name another folder")
    writers: dict[str, Any] = {}
    count = 0
    for curve, tag, value, step, at in points(ledger, run):
        if curve not in writers:
            writers[curve] = SummaryWriter(str(folder / run / curve))
        writers[curve].add_scalar(tag, value, step, walltime=at)
        count += 1
    for writer in writers.values():
        writer.close()
    return count


def points(ledger: Ledger, run: str) -> Iterator[Point]:
    """Scores by task, metric and split; then loss, seconds, epsilon and weights by centre. A step is a round, counted over all stages."""
    steps = {
        (row["stage"], row["round"]): (k, row["started"] + timedelta(seconds=row["seconds"])) for k, row in enumerate(ledger.rounds(run))
    }
    for row in ledger.scores(run):
        step, at = steps[row["stage"], row["round"]]
        views = {view: row["views"].get(view, {}) for view in VIEWS}
        for curve, values in (*row["centres"].items(), *views.items()):
            for metric, value in values.items():
                number = finite(value.get("value") if isinstance(value, dict) else value)
                if number is not None:
                    yield curve, f"{row['task']}/{metric}/{row['split']}", number, step, at.timestamp()
    for row in ledger.contributions(run):
        step, at = steps[row["stage"], row["round"]]
        for what in ("loss", "seconds", "epsilon"):
            if row[what] is not None:
                yield row["centre"], f"training/{what}", row[what], step, at.timestamp()
    for row in ledger.shares(run):
        step, at = steps[row["stage"], row["round"]]
        for centre, weight in row["weights"].items():
            yield centre, f"weight/{row['part']}", weight, step, at.timestamp()
