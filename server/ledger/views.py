"""What is last in a run's ledger: read by itself, so that a run of a thousand rounds and a hundred centres is answered as fast as one of two."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import sqlalchemy as sa

from server.ledger import tables
from server.ledger.ledger import Ledger, Row

ROUND_KEY = ("run", "stage", "round", "attempt")


def last_accepted(ledger: Ledger, run_id: str) -> list[Row]:
    """Each centre's last contribution that was used: centre, stage, round, epsilon, and `closed`, when its round did."""
    of = tables.contributions
    last = sa.select(sa.func.max(of.c.id)).where(of.c.run == run_id, of.c.accepted).group_by(of.c.centre)
    same = sa.and_(*(tables.rounds.c[key] == of.c[key] for key in ROUND_KEY))
    rows = ledger.read(
        sa.select(
            of.c.centre,
            of.c.stage,
            of.c.round,
            of.c.epsilon,
            tables.rounds.c.started,
            tables.rounds.c.seconds,
        )
        .select_from(of.join(tables.rounds, same))
        .where(of.c.id.in_(last))
    )
    return [{**row, "closed": row["started"] + timedelta(seconds=row["seconds"])} for row in rows]


def last_failures(ledger: Ledger, run_id: str) -> list[Row]:
    """The last event of each centre that was refused or left out."""
    of = tables.events
    last = (
        sa.select(sa.func.max(of.c.id))
        .where(of.c.run == run_id, of.c.kind.in_(("refused", "left_out")))
        .group_by(of.c.centre)
    )
    return ledger.read(sa.select(of).where(of.c.id.in_(last)))


def last_round(ledger: Ledger, run_id: str) -> dict[str, Any]:
    """The round that was closed last: {"round": its row with `closed`, "contributions", "shares", "scores" (on validation): rows}; or nothing."""
    rounds = ledger.read(
        sa.select(tables.rounds)
        .where(tables.rounds.c.run == run_id)
        .order_by(tables.rounds.c.id.desc())
        .limit(1)
    )
    if not rounds:
        return {}
    row = rounds[0]

    def of_round(table: sa.Table, *also: sa.ColumnElement[bool]) -> list[Row]:
        return ledger.read(
            sa.select(table)
            .where(*(table.c[key] == row[key] for key in ROUND_KEY), *also)
            .order_by(table.c.id)
        )

    return {
        "round": {**row, "closed": row["started"] + timedelta(seconds=row["seconds"])},
        "contributions": of_round(tables.contributions),
        "shares": of_round(tables.shares),
        "scores": of_round(tables.scores, tables.scores.c.split == "val"),
    }


def centre_totals(ledger: Ledger, run_id: str) -> list[Row]:
    """Of every centre over all rounds and attempts: `used` and `left_out` contributions, `bytes_up` and `bytes_down`."""
    of = tables.contributions

    def number(condition: sa.ColumnElement[bool]) -> sa.ColumnElement[int]:
        return sa.func.sum(sa.case((condition, 1), else_=0))

    columns = [number(of.c.accepted).label("used"), number(~of.c.accepted).label("left_out")]
    columns += [
        sa.cast(sa.func.coalesce(sa.func.sum(of.c[way]), 0), sa.BigInteger).label(way)
        for way in ("bytes_up", "bytes_down")
    ]
    return ledger.read(sa.select(of.c.centre, *columns).where(of.c.run == run_id).group_by(of.c.centre))
