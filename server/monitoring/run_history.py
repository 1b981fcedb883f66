"""A run's past, read from the ledger: scores over all rounds, rounds with their centres, the test, events."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import sqlalchemy as sa

from common.config.parse import parse_config
from server.ledger import tables
from server.ledger.ledger import Ledger
from server.ledger.reader import Row
from server.reporting.labels import View
from server.reporting.ledger_records import parse_contribution
from server.reporting.numbered_rounds import NumberedRound, select_indices
from server.reporting.scores import choose_task_metric, view_value
from server.run.records import RoundRecord, TaskScores, parse_task_scores

RoundKey = tuple[str, int]  # stage, round
AttemptKey = tuple[str, int, int]  # stage, round, attempt


@dataclass(frozen=True)
class ScorePoint:
    """A round's validation by one metric; None where it is undefined."""

    stage: str
    round: int
    macro: float | None
    pooled: float | None
    spread: float | None
    worst: float | None
    worst_centre: str


@dataclass(frozen=True)
class ScoreHistory:
    """Validation over all rounds by the task and metric that select the best round."""

    task: str
    metric: str
    points: list[ScorePoint]


def score_history(ledger: Ledger, row: Row) -> ScoreHistory:
    """Return a run's validation by its main metric; rounds without the task have no point."""
    points: dict[str, list[tuple[RoundKey, TaskScores]]] = {}  # {task: ...}
    for scores_row in ledger.read_scores(row["id"], include_centres=False):
        if scores_row["split"] == "val":
            key = (scores_row["stage"], scores_row["round"])
            points.setdefault(scores_row["task"], []).append((key, parse_task_scores(scores_row)))
    last_scores = {task: task_points[-1][1] for task, task_points in points.items()}
    task, metric = choose_task_metric(parse_config(row["config"]).evaluation, last_scores)
    return ScoreHistory(
        task, metric, [_make_point(key, scores, metric) for key, scores in points.get(task, [])]
    )


def _make_point(key: RoundKey, scores: TaskScores, metric: str) -> ScorePoint:
    worst = view_value(scores, View.WORST, metric)
    return ScorePoint(
        *key,
        macro=scores.macro.get(metric),
        pooled=scores.pooled.get(metric),
        spread=scores.spread.get(metric),
        worst=worst.value,
        worst_centre=worst.centre,
    )


class RoundCache:
    """Keeps the rounds that were read last of a few runs: a closed round's rows never change."""

    def __init__(self, max_runs: int = 4) -> None:
        self.max_runs = max_runs
        self._attempts: dict[str, Mapping[AttemptKey, RoundRecord]] = {}  # {run id: ...}
        self._lock = threading.Lock()

    def get(self, run_id: str) -> Mapping[AttemptKey, RoundRecord]:
        """Return what is kept of a run."""
        with self._lock:
            return self._attempts.get(run_id, {})

    def put(self, run_id: str, records: Mapping[AttemptKey, RoundRecord]) -> None:
        """Keep these rounds of a run, and of the other runs only those that were put last."""
        with self._lock:
            self._attempts.pop(run_id, None)
            self._attempts[run_id] = records
            while len(self._attempts) > self.max_runs:
                del self._attempts[next(iter(self._attempts))]


def load_rounds(
    ledger: Ledger, run_id: str, max_rounds: int, cache: RoundCache
) -> tuple[list[NumberedRound], int]:
    """Read about `max_rounds` of a run's rounds: every `step`th, and the first and the last of each stage.

    Only rounds that the cache lacks are read from the tables of one row a centre.

    Returns:
        The rounds, numbered over all rounds of the run, and the step. Their records are shared: not to be
        changed.
    """
    rows = ledger.read_rounds(run_id)
    step = max(1, math.ceil(len(rows) / max_rounds))
    cached = cache.get(run_id)
    reader = _RoundReader(ledger, run_id)
    records: dict[AttemptKey, RoundRecord] = {}
    rounds = []
    for index in select_indices([row["stage"] for row in rows], step):
        row = rows[index]
        key = (row["stage"], row["round"], row["attempt"])
        records[key] = cached[key] if key in cached else reader.add_round(row)
        rounds.append(NumberedRound(index + 1, row["stage"], row["round"], records[key]))
    reader.reads_all = len(reader.records) == len(rows)
    if reader.records:
        reader.read_contributions()
        reader.read_weights()
        reader.read_scores()
    cache.put(run_id, records)
    return rounds, step


@dataclass
class _RoundReader:
    """Reads some rounds of a run from the ledger's tables."""

    ledger: Ledger
    run_id: str
    reads_all: bool = False  # the rounds are all that the run has
    records: dict[RoundKey, RoundRecord] = field(default_factory=dict)  # of the rounds
    attempts: dict[RoundKey, int] = field(default_factory=dict)  # the last of each round

    def add_round(self, row: Row) -> RoundRecord:
        """Add a round to read; its row is from the table `rounds`. Returns its record, still to be filled."""
        key = (row["stage"], row["round"])
        self.records[key] = RoundRecord(row["round"], row["seconds"])
        self.attempts[key] = row["attempt"]
        return self.records[key]

    def read_contributions(self) -> None:
        """Read what the centres contributed to each round."""
        for record, row in self._read_last_attempts(tables.contributions):
            contribution = parse_contribution(row)
            record.centres[row["centre"]] = contribution
            record.bytes_up += contribution.bytes_up
            record.bytes_down += contribution.bytes_down

    def read_weights(self) -> None:
        """Read the centres' weights in each round."""
        for record, row in self._read_last_attempts(tables.group_weights):
            record.weights[row["group"]] = row["centre_weights"]
            record.effective_centres[row["group"]] = row["effective_centres"]

    def read_scores(self) -> None:
        """Read each round's validation: the last row, as its attempts are counted apart from the round's."""
        for row in self._read_rows(tables.scores):
            record = self.records.get((row["stage"], row["round"]))
            if record and row["split"] == "val":
                record.validation[row["task"]] = parse_task_scores(row)

    def _read_last_attempts(self, table: sa.Table) -> Iterator[tuple[RoundRecord, Row]]:
        for row in self._read_rows(table):
            key = (row["stage"], row["round"])
            if self.attempts.get(key) == row["attempt"]:
                yield self.records[key], row

    def _read_rows(self, table: sa.Table) -> list[Row]:
        """Return a table's rows of the rounds, in the order of writing."""
        query = sa.select(table).where(table.c.run_id == self.run_id).order_by(table.c.id)
        if not self.reads_all:
            rounds_by_stage: dict[str, list[int]] = {}
            for stage, number in self.records:
                rounds_by_stage.setdefault(stage, []).append(number)
            matches = []
            for stage, numbers in rounds_by_stage.items():
                matches.append(sa.and_(table.c.stage == stage, table.c.round.in_(numbers)))
            query = query.where(sa.or_(*matches))
        return self.ledger.read(query)


def load_test_scores(ledger: Ledger, run_id: str) -> dict[str, TaskScores]:
    """Return {task: scores} of the test; {} before the run's end."""
    scores = tables.scores.c
    query = (
        sa.select(tables.scores).where(scores.run_id == run_id, scores.split == "test").order_by(scores.id)
    )
    return {row["task"]: parse_task_scores(row) for row in ledger.read(query)}


def load_last_events(ledger: Ledger, run_id: str, max_events: int) -> list[Row]:
    """Return a run's last events, in the order of writing."""
    events = tables.events.c
    query = (
        sa.select(tables.events).where(events.run_id == run_id).order_by(events.id.desc()).limit(max_events)
    )
    return ledger.read(query)[::-1]
