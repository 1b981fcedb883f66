"""The ledger's tables: facts about runs, and what people did and may do. Rows are added and never changed.

`id` counts in the order of writing. Triggers in the database itself refuse every change of a row
(server/ledger/append_only.py), so that no program, ours or another, edits history unseen.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.types import TypeDecorator

UNSTORABLE = re.compile("[\\x00\\ud800-\\udfff]")
SCHEMA_VERSION = 2  # 1 was 0.1.0's, which did not write its version down


class UtcDateTime(TypeDecorator[datetime]):
    """A time in UTC, also where the database keeps no time zone (SQLite)."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        """Convert a time to UTC before it is written."""
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> datetime | None:
        """Return the time that was read with its time zone."""
        if not isinstance(value, datetime):
            return None
        return value.astimezone(UTC) if value.tzinfo else value.replace(tzinfo=UTC)


class PlainText(TypeDecorator[str]):
    """A text without the characters that PostgreSQL refuses: NUL, and halves of surrogate pairs."""

    impl = sa.String
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: sa.Dialect) -> str | None:
        """Replace such characters before the text is written."""
        return None if value is None else replace_unstorable(value)


def replace_unstorable(text: str) -> str:
    """Return a text with U+FFFD in place of characters that no database or page can hold."""
    return UNSTORABLE.sub("\ufffd", text)


schema = sa.MetaData()
_JSON_TYPE = sa.JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")


def _define_run_table(name: str, *columns: sa.schema.SchemaItem) -> sa.Table:
    """Return a table of facts about a run: the id in the order of writing, the run, and these columns."""
    return sa.Table(
        name,
        schema,
        sa.Column("id", sa.Integer, primary_key=True),
        sa.Column("run_id", sa.ForeignKey("runs.id"), nullable=False, index=True),
        *columns,
    )


def _round_columns() -> tuple[sa.Column[Any], ...]:
    return (
        sa.Column("stage", PlainText, nullable=False),
        sa.Column("round", sa.Integer, nullable=False),
        sa.Column("attempt", sa.Integer, nullable=False),  # from 1; higher when the round was repeated
    )


schema_version = sa.Table(
    "schema_version",
    schema,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("time", UtcDateTime, nullable=False),
    sa.Column("version", sa.Integer, nullable=False),
)
runs = sa.Table(
    "runs",
    schema,
    sa.Column("id", PlainText, primary_key=True),
    sa.Column("parent_run_id", PlainText, index=True),  # the cross-validation that the run is a fold of
    sa.Column("created", UtcDateTime, nullable=False),
    sa.Column("recipe", PlainText, nullable=False),
    sa.Column("mode", PlainText, nullable=False),
    sa.Column("config", _JSON_TYPE, nullable=False),
    sa.Column("code_fingerprint", PlainText, nullable=False),  # of the code that started the run
)
events = _define_run_table(
    "events",
    sa.Column("time", UtcDateTime, nullable=False),
    sa.Column("kind", PlainText, nullable=False),
    sa.Column("centre", PlainText),
    sa.Column("detail", PlainText, nullable=False),
    sa.Column("code", PlainText),  # RefusalCode, where a centre was refused or left out
)
centres = _define_run_table(
    "centres",
    sa.Column("time", UtcDateTime, nullable=False),
    sa.Column("centre", PlainText, nullable=False),
    sa.Column(
        "metadata", _JSON_TYPE, nullable=False
    ),  # counts, sources, versions, skipped scans, device, policy
)
rounds = _define_run_table(
    "rounds",
    *_round_columns(),
    sa.Column("started", UtcDateTime, nullable=False),
    sa.Column("seconds", sa.Float, nullable=False),
    sa.Column("close_reason", PlainText, nullable=False),
    sa.UniqueConstraint("run_id", "stage", "round", "attempt"),
)
# The fields of server.run.records.CentreRound.
contributions = _define_run_table(
    "contributions",
    *_round_columns(),
    sa.Column("centre", PlainText, nullable=False),
    sa.Column("accepted", sa.Boolean, nullable=False),
    sa.Column("reason", PlainText),  # why it was left out
    sa.Column("code", PlainText),  # RefusalCode of that
    sa.Column("scans", sa.BigInteger),
    sa.Column("steps", sa.BigInteger),
    sa.Column("norm", sa.Float),
    sa.Column("clip_norm", sa.Float),
    sa.Column("loss", sa.Float),
    sa.Column("epsilon", sa.Float),  # spent by the centre's patients so far
    sa.Column("seconds", sa.Float),
    sa.Column("bytes_up", sa.BigInteger),
    sa.Column("bytes_down", sa.BigInteger),
)
group_weights = _define_run_table(
    "group_weights",
    *_round_columns(),
    sa.Column("group", PlainText, nullable=False),  # "backbone", "decoder" or a head's task
    sa.Column("effective_centres", sa.Float, nullable=False),  # 1 / sum of squared weights
    sa.Column("centre_weights", _JSON_TYPE, nullable=False),  # {centre: weight}
)
# The fields of server.run.records.TaskScores. One row a task and round, not one a number: a hundred centres
# have 2,000.
scores = _define_run_table(
    "scores",
    *_round_columns(),
    sa.Column("split", PlainText, nullable=False),
    sa.Column("task", PlainText, nullable=False),
    sa.Column("summaries", _JSON_TYPE, nullable=False),  # macro, pooled, worst, spread, challenge_score
    sa.Column("centres", _JSON_TYPE, nullable=False),  # {centre: metrics, loss, reasons}; last, as it is long
)
# What goes on right now, one short row a request or reply.
progress = _define_run_table(
    "progress",
    sa.Column("time", UtcDateTime, nullable=False),
    sa.Column("stage", PlainText, nullable=False),
    sa.Column("round", sa.Integer, nullable=False),
    sa.Column("activity", PlainText, nullable=False),  # handshake, train, secure sum, scores, counts, ...
    sa.Column("asked_centres", _JSON_TYPE),  # of a request; null in a reply's row
    sa.Column("centre", PlainText),  # of a reply; null in a request's row
    sa.Column("seconds", sa.Float),  # from the request to the reply
    sa.Column("reason", PlainText),  # why the reply is of no use
    sa.Column("code", PlainText),  # RefusalCode of that
    sa.Column("bytes_up", sa.BigInteger),
    sa.Column("bytes_down", sa.BigInteger),
    # Holds all that the sums over a long run read.
    sa.Index("progress_of_centre", "run_id", "centre", "activity", "bytes_up"),
)
# What people did, each entry chained to the one before it (server/ledger/audit_trail.py). A command to a run
# is an entry that the run's coordinator reads.
audit = sa.Table(
    "audit",
    schema,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("time", UtcDateTime, nullable=False),
    sa.Column("actor", PlainText, nullable=False),
    sa.Column("action", PlainText, nullable=False),
    sa.Column(
        "run_id", PlainText, nullable=False, index=True
    ),  # "": none; a run that is to start has no row yet
    sa.Column("centre", PlainText, nullable=False),
    sa.Column("reason", PlainText, nullable=False),
    sa.Column("previous_hash", PlainText, nullable=False, unique=True),  # unique: the chain cannot fork
    sa.Column("entry_hash", PlainText, nullable=False),
)
# Who may use the console: the last row of a name is valid.
accounts = sa.Table(
    "accounts",
    schema,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("time", UtcDateTime, nullable=False),
    sa.Column("name", PlainText, nullable=False),
    sa.Column("role", PlainText, nullable=False),  # viewer, operator or none
    sa.Column("password_hash", PlainText),  # Argon2id, encoded; null: may log in only through a trusted proxy
)
# What is computed once a run rather than every round.
artifacts = _define_run_table(
    "artifacts",
    sa.Column("time", UtcDateTime, nullable=False),
    sa.Column("kind", PlainText, nullable=False),  # server.ledger.ledger.ArtifactKind
    sa.Column("content", _JSON_TYPE, nullable=False),
)
