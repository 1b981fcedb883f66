"""The ledger's tables: facts about runs, and what people did and may do; added and never changed.

`id` counts in the order of writing. Triggers refuse UPDATE and DELETE in the database itself, so that no later program, ours or another,
edits history unseen.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.types import TypeDecorator


class _UtcDateTime(TypeDecorator[datetime]):
    """UTC, also where the database keeps no time zone (SQLite)."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        return value and value.astimezone(UTC)

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> datetime | None:
        if not isinstance(value, datetime):
            return None
        return value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC)


schema = sa.MetaData()
_JSON_TYPE = sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")


def _run_table(name: str, *columns: sa.schema.SchemaItem) -> sa.Table:
    """A table of facts about a run: `id` in the order of writing, the run, and the given columns."""
    own: tuple[sa.Column[Any], ...] = (
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("run", sa.ForeignKey("runs.id"), nullable=False, index=True),
    )
    return sa.Table(name, schema, *own, *columns)


def _round_columns() -> tuple[sa.Column[Any], ...]:
    return (
        sa.Column("stage", sa.String, nullable=False),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),  # from 1; higher when the round was done again
    )


runs = sa.Table(
    "runs",
    schema,
    sa.Column("id", sa.String, primary_key=True),
    sa.Column("created", _UtcDateTime, nullable=False),
    sa.Column("recipe", sa.String, nullable=False),
    sa.Column("mode", sa.String, nullable=False),
    sa.Column("config", _JSON_TYPE, nullable=False),
    sa.Column("code", sa.String, nullable=False),  # fingerprint of the code that ran
)
events = _run_table(
    "events",
    sa.Column("time", _UtcDateTime, nullable=False),
    sa.Column("kind", sa.String, nullable=False),
    sa.Column("centre", sa.String),
    sa.Column("detail", sa.String, nullable=False),
)
centres = _run_table(
    "centres",
    sa.Column("time", _UtcDateTime, nullable=False),
    sa.Column("centre", sa.String, nullable=False),
    sa.Column("facts", _JSON_TYPE, nullable=False),  # counts, sources, versions, failed scans, device, policy
)
rounds = _run_table(
    "rounds",
    *_round_columns(),
    sa.Column("started", _UtcDateTime, nullable=False),
    sa.Column("seconds", sa.Float, nullable=False),
    sa.Column("closed_because", sa.String, nullable=False),
    sa.UniqueConstraint("run", "stage", "round", "attempt"),
)
contributions = _run_table(
    "contributions",
    *_round_columns(),
    sa.Column("centre", sa.String, nullable=False),
    sa.Column("accepted", sa.Boolean, nullable=False),
    sa.Column("reason", sa.String),  # why it was left out
    sa.Column("scans", sa.BigInteger),
    sa.Column("steps", sa.BigInteger),
    sa.Column("norm", sa.Float),
    sa.Column("loss", sa.Float),
    sa.Column("epsilon", sa.Float),  # what the centre's patients have lost so far
    sa.Column("seconds", sa.Float),
    sa.Column("bytes_up", sa.BigInteger),
    sa.Column("bytes_down", sa.BigInteger),
)
shares = _run_table(
    "shares",
    *_round_columns(),
    sa.Column("part", sa.String, nullable=False),  # "backbone" or the head's task
    sa.Column("effective", sa.Float, nullable=False),  # number of centres, 1 / sum w^2
    sa.Column("weights", _JSON_TYPE, nullable=False),  # {centre: weight}
)
# One row a task and round instead of one a number: a hundred centres are 2,000 numbers.
scores = _run_table(
    "scores",
    *_round_columns(),
    sa.Column("split", sa.String, nullable=False),
    sa.Column("task", sa.String, nullable=False),
    sa.Column(
        "views", _JSON_TYPE, nullable=False
    ),  # {macro | pooled | worst | spread | challenge_score: ...}; null: undefined
    sa.Column(
        "centres", _JSON_TYPE, nullable=False
    ),  # {centre: {metric: value, ..., "reasons": {metric: why it is undefined}}}; last, as it is long
)

# What is going on right now, one short row a request or reply: `centre` is null in the row that says who was asked for what.
progress = _run_table(
    "progress",
    sa.Column("time", _UtcDateTime, nullable=False),
    sa.Column("stage", sa.String, nullable=False),
    sa.Column("round", sa.Integer, nullable=False),
    sa.Column(
        "doing", sa.String, nullable=False
    ),  # meet | train | secure sum | scores | counts | moments | clusters
    sa.Column("asked", _JSON_TYPE),  # of the first row: the centres
    sa.Column("centre", sa.String),
    sa.Column("seconds", sa.Float),  # from the question to the answer, with all that lies between
    sa.Column("reason", sa.String),  # why there is no good answer
    sa.Column("bytes_up", sa.BigInteger),
    sa.Column("bytes_down", sa.BigInteger),
    sa.Index(
        "progress_of_centre", "run", "centre", "doing", "bytes_up"
    ),  # all that sums over a long run read
)
# What people did, each entry chained to the one before (common/utils/hash_chain.py). Orders to a run are entries that its coordinator reads.
audit = sa.Table(
    "audit",
    schema,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("time", _UtcDateTime, nullable=False),
    sa.Column("who", sa.String, nullable=False),
    sa.Column("what", sa.String, nullable=False),
    sa.Column(
        "run", sa.String, nullable=False, index=True
    ),  # "": none; the run of a `start` is not there yet
    sa.Column("centre", sa.String, nullable=False),
    sa.Column("why", sa.String, nullable=False),
    sa.Column("previous", sa.String, nullable=False, unique=True),  # no fork
    sa.Column("hash", sa.String, nullable=False),
)
# Who may use the console: the last row of a name holds.
accounts = sa.Table(
    "accounts",
    schema,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("time", _UtcDateTime, nullable=False),
    sa.Column("name", sa.String, nullable=False),
    sa.Column("role", sa.String, nullable=False),  # viewer | operator | none
    sa.Column("password", sa.String),  # Argon2id's encoded hash; null: only by a trusted proxy
)
# What was found once in a run rather than in each round.
evidence = _run_table(
    "evidence",
    sa.Column("time", _UtcDateTime, nullable=False),
    sa.Column(
        "kind", sa.String, nullable=False
    ),  # quality (server/analysis/image_drift.py) | matrix (server/analysis/cross_site_evaluation.py)
    sa.Column("body", _JSON_TYPE, nullable=False),
)

_APPEND_ONLY_ERROR = "the ledger is append-only"


def _execute_on(table: sa.Table, event: str, dialect: str, statement: str) -> None:
    sa.event.listen(table, event, sa.DDL(statement).execute_if(dialect=dialect))  # type: ignore[no-untyped-call]


_postgresql_trigger_function = f"CREATE OR REPLACE FUNCTION consilium_refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE EXCEPTION '{_APPEND_ONLY_ERROR}'; END $$"
_execute_on(runs, "before_create", "postgresql", _postgresql_trigger_function)
for _each in schema.tables.values():
    for _what in ("UPDATE", "DELETE"):
        _trigger = f"CREATE TRIGGER {_each.name}_no_{_what} BEFORE {_what} ON {_each.name} BEGIN SELECT RAISE(ABORT, '{_APPEND_ONLY_ERROR}'); END"
        _execute_on(_each, "after_create", "sqlite", _trigger)
    _trigger = f"CREATE TRIGGER {_each.name}_append_only BEFORE UPDATE OR DELETE OR TRUNCATE ON {_each.name} "
    _execute_on(
        _each,
        "after_create",
        "postgresql",
        _trigger + "FOR EACH STATEMENT EXECUTE FUNCTION consilium_refuse()",
    )
