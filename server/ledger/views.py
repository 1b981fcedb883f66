"""The latest state of a run, read by itself.

A run of a thousand rounds and a hundred centres is answered as fast as one of two.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import sqlalchemy as sa

from server.ledger import tables
from server.ledger.reader import LedgerReader, Row

ROUND_KEY = ("run_id", "stage", "round", "attempt")


@dataclass(frozen=True)
class LastRound:
    """The round that closed last, with its rows in the ledger's tables."""

    round: Row
    closed_at: datetime
    contributions: list[Row]
    group_weights: list[Row]
    scores: list[Row]  # on validation


def last_accepted(ledger: LedgerReader, run_id: str) -> list[Row]:
    """Return each centre's last accepted contribution: centre, stage, round, epsilon, `closed_at`."""
    contributions = tables.contributions.c
    rounds = tables.rounds.c
    last_ids = (
        sa.select(sa.func.max(contributions.id))
        .where(contributions.run_id == run_id, contributions.accepted)
        .group_by(contributions.centre)
    )
    is_same_round = sa.and_(*(rounds[key] == contributions[key] for key in ROUND_KEY))
    columns = (contributions.centre, contributions.stage, contributions.round, contributions.epsilon)
    query = (
        sa.select(*columns, rounds.started, rounds.seconds)
        .select_from(tables.contributions.join(tables.rounds, is_same_round))
        .where(contributions.id.in_(last_ids))
    )
    return [row | {"closed_at": _closing_time(row)} for row in ledger.read(query)]


def last_failures(ledger: LedgerReader, run_id: str) -> list[Row]:
    """Return the last event by which each centre was refused or left out."""
    events = tables.events.c
    last_ids = (
        sa.select(sa.func.max(events.id))
        .where(events.run_id == run_id, events.kind.in_(("refused", "left_out")))
        .group_by(events.centre)
    )
    return ledger.read(sa.select(tables.events).where(events.id.in_(last_ids)))


def last_round(ledger: LedgerReader, run_id: str) -> LastRound | None:
    """Return the round that closed last; None before the first."""
    rounds = tables.rounds.c
    query = sa.select(tables.rounds).where(rounds.run_id == run_id).order_by(rounds.id.desc()).limit(1)
    round_rows = ledger.read(query)
    if not round_rows:
        return None
    round_row = round_rows[0]
    return LastRound(
        round_row,
        _closing_time(round_row),
        ledger.read(_select_rows_of_round(tables.contributions, round_row)),
        ledger.read(_select_rows_of_round(tables.group_weights, round_row)),
        ledger.read(_select_rows_of_round(tables.scores, round_row).where(tables.scores.c.split == "val")),
    )


def centre_totals(ledger: LedgerReader, run_id: str) -> list[Row]:
    """Return each centre's totals over all rounds and attempts.

    How many of its contributions were `accepted` and `left_out`, and the `bytes_up` and `bytes_down`.
    """
    contributions = tables.contributions.c
    columns = [
        contributions.centre,
        _count(contributions.accepted).label("accepted"),
        _count(~contributions.accepted).label("left_out"),
        _total_bytes(contributions.bytes_up).label("bytes_up"),
        _total_bytes(contributions.bytes_down).label("bytes_down"),
    ]
    query = sa.select(*columns).where(contributions.run_id == run_id).group_by(contributions.centre)
    return ledger.read(query)


def _closing_time(round_row: Row) -> datetime:
    started: datetime = round_row["started"]
    return started + timedelta(seconds=round_row["seconds"])


def _select_rows_of_round(table: sa.Table, round_row: Row) -> sa.Select[Any]:
    is_same_round = [table.c[key] == round_row[key] for key in ROUND_KEY]
    return sa.select(table).where(*is_same_round).order_by(table.c.id)


def _count(condition: sa.ColumnElement[bool]) -> sa.ColumnElement[int]:
    return sa.func.sum(sa.case((condition, 1), else_=0))


def _total_bytes(column: sa.ColumnElement[int]) -> sa.ColumnElement[int]:
    return sa.cast(sa.func.coalesce(sa.func.sum(column), 0), sa.BigInteger)
