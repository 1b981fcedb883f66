"""The reading half of the ledger: rows as dicts of their columns, in the order of writing."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from server.ledger import tables
from server.ledger.database import Database

# The kinds of event that are a run's status.
STATUS_EVENTS = ("started", "resumed", "paused", "stopped", "finished", "failed")
Row = dict[str, Any]


class LedgerReader(Database):
    """A ledger open for reading. Every method raises ConsiliumError when the database cannot be used.

    Where a round was repeated, its last attempt is returned, unless `all_attempts` is set.
    """

    def read_runs(self) -> list[Row]:
        """Return all runs with their `status` and when it was reached (`since`), the latest change last."""
        return self.read(_select_runs())

    def read_run(self, run_id: str) -> Row | None:
        """Return a run with its `status` and `since`; None for an unknown run."""
        return next(iter(self.read(_select_runs().where(tables.runs.c.id == run_id))), None)

    def read_status(self, run_id: str) -> str | None:
        """Return a run's status; None for an unknown run."""
        events = tables.events.c
        query = (
            sa.select(events.kind)
            .where(events.run_id == run_id, events.kind.in_(STATUS_EVENTS))
            .order_by(events.id.desc())
            .limit(1)
        )
        rows = self.read(query)
        return str(rows[0]["kind"]) if rows else None

    def read_events(self, run_id: str) -> list[Row]:
        """Return a run's events."""
        return self.read(_select_run_rows(tables.events, run_id))

    def read_centres(self, run_id: str) -> list[Row]:
        """Return what each centre reported of itself, every time that it joined the run."""
        return self.read(_select_run_rows(tables.centres, run_id))

    def read_rounds(self, run_id: str, *, all_attempts: bool = False) -> list[Row]:
        """Return a run's closed rounds."""
        return self.read(_select_round_rows(tables.rounds, run_id, all_attempts))

    def read_contributions(self, run_id: str, *, all_attempts: bool = False) -> list[Row]:
        """Return what each centre contributed to each round, or why it was left out."""
        return self.read(_select_round_rows(tables.contributions, run_id, all_attempts))

    def read_group_weights(self, run_id: str, *, all_attempts: bool = False) -> list[Row]:
        """Return the centres' weights in each parameter group and round."""
        return self.read(_select_round_rows(tables.group_weights, run_id, all_attempts))

    def read_scores(
        self, run_id: str, *, all_attempts: bool = False, include_centres: bool = True
    ) -> list[Row]:
        """Return the scores of each task, round and split, with or without each centre's own (long)."""
        if all_attempts:
            query = _select_run_rows(tables.scores, run_id)
        else:
            query = _select_last_attempts(tables.scores, run_id, "split")
        if not include_centres:
            columns = [column for column in tables.scores.columns if column.name != "centres"]
            query = query.with_only_columns(*columns)
        return self.read(query)

    def read_audit(self, run_id: str | None = None, after_id: int = 0) -> list[Row]:
        """Return the audit trail's entries after this id, of all runs or of one.

        `server.ledger.audit_trail.first_broken_link` verifies the whole trail.
        """
        query = sa.select(tables.audit).where(tables.audit.c.id > after_id).order_by(tables.audit.c.id)
        if run_id is not None:
            query = query.where(tables.audit.c.run_id == run_id)
        return self.read(query)

    def read_accounts(self) -> list[Row]:
        """Return every account as it is now, by name."""
        return self.read(_select_current_accounts())

    def read_artifacts(self, run_id: str) -> dict[str, Any]:
        """Return {kind: content}, the last of each kind."""
        return {row["kind"]: row["content"] for row in self.read(_select_run_rows(tables.artifacts, run_id))}


def read_current_accounts(connection: sa.Connection) -> list[Row]:
    """Return every account as it is now, within a transaction."""
    return [dict(row) for row in connection.execute(_select_current_accounts()).mappings()]


def _select_current_accounts() -> sa.Select[Any]:
    accounts = tables.accounts.c
    last_ids = sa.select(sa.func.max(accounts.id)).group_by(accounts.name)
    return sa.select(tables.accounts).where(accounts.id.in_(last_ids)).order_by(accounts.name)


def _select_runs() -> sa.Select[Any]:
    events = tables.events.c
    last_ids = sa.select(sa.func.max(events.id)).where(events.kind.in_(STATUS_EVENTS)).group_by(events.run_id)
    is_status_of_run = sa.and_(events.run_id == tables.runs.c.id, events.id.in_(last_ids))
    return (
        sa.select(tables.runs, events.kind.label("status"), events.time.label("since"))
        .select_from(tables.runs.join(tables.events, is_status_of_run))
        .order_by(events.id)
    )


def _select_run_rows(table: sa.Table, run_id: str) -> sa.Select[Any]:
    return sa.select(table).where(table.c.run_id == run_id).order_by(table.c.id)


def _select_round_rows(table: sa.Table, run_id: str, all_attempts: bool) -> sa.Select[Any]:
    if all_attempts:
        return _select_run_rows(table, run_id)
    return _select_last_attempts(table, run_id)


def _select_last_attempts(table: sa.Table, run_id: str, *extra_keys: str) -> sa.Select[Any]:
    """Select the rows of each round's last attempt.

    The attempt is that of the round, not the highest in the table itself: a centre that contributed to an
    earlier attempt only must not be shown. Scores are an exception (`extra_keys`), because those of the test
    belong to no round.
    """
    source = tables.scores if extra_keys else tables.rounds
    keys = ("stage", "round", *extra_keys)
    key_columns = [source.c[key] for key in keys]
    last_attempts = (
        sa.select(*key_columns, sa.func.max(source.c.attempt).label("attempt"))
        .where(source.c.run_id == run_id)
        .group_by(*key_columns)
        .subquery()
    )
    is_last_attempt = sa.and_(*(table.c[key] == last_attempts.c[key] for key in (*keys, "attempt")))
    return (
        sa.select(table)
        .join(last_attempts, is_last_attempt)
        .where(table.c.run_id == run_id)
        .order_by(table.c.id)
    )
