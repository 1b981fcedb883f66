"""A closed round as rows of the ledger's tables."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from server.ledger import tables
from server.ledger.database import make_storable
from server.ledger.reader import Row

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_CONTRIBUTION_KEYS = ("id", "run_id", "stage", "round", "attempt", "centre")
CONTRIBUTION_FIELDS = [c.name for c in tables.contributions.columns if c.name not in _CONTRIBUTION_KEYS]


class ClosedRound(Protocol):
    """What the ledger writes down of a round: `server.run.records.RoundRecord`."""

    @property
    def round(self) -> int:
        """Its number; 0 is the validation of a stage's first weights."""

    @property
    def seconds(self) -> float:
        """How long it took."""

    @property
    def centres(self) -> Mapping[str, DataclassInstance]:
        """{centre: CentreRound}."""

    @property
    def weights(self) -> Mapping[str, Mapping[str, float]]:
        """{parameter group: {centre: weight}}."""

    @property
    def effective_centres(self) -> Mapping[str, float]:
        """{parameter group: 1 / sum of squared weights}."""

    @property
    def validation(self) -> Mapping[str, DataclassInstance]:
        """{task: TaskScores}."""


def make_contribution_rows(keys: Row, closed_round: ClosedRound) -> list[Row]:
    """Return the rows of the table `contributions`."""
    rows = []
    for centre, contribution in closed_round.centres.items():
        values = dataclasses.asdict(contribution)
        fields = {name: make_storable(values[name]) for name in CONTRIBUTION_FIELDS}
        rows.append({**keys, "centre": centre, **fields})
    return rows


def make_weight_rows(keys: Row, closed_round: ClosedRound) -> list[Row]:
    """Return the rows of the table `group_weights`."""
    rows = []
    for group, centre_weights in closed_round.weights.items():
        effective_centres = closed_round.effective_centres[group]
        columns = {"group": group, "effective_centres": effective_centres, "centre_weights": centre_weights}
        rows.append(keys | columns)
    return rows


def make_score_rows(keys: Row, split: str, scores: Mapping[str, DataclassInstance]) -> list[Row]:
    """Return the rows of the table `scores`."""
    rows = []
    for task, task_scores in scores.items():
        summaries = dataclasses.asdict(task_scores)
        summaries.pop("sums")  # they are in metrics.json only
        centres = summaries.pop("centres")
        rows.append({**keys, "split": split, "task": task, "summaries": summaries, "centres": centres})
    return rows
