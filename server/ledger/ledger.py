"""The ledger: what happened in every run, written once and never changed.

One database for all runs: SQLite by default, PostgreSQL by its address. Rows are only ever added; triggers in
the database itself refuse UPDATE and DELETE. Hence nothing here is a state to be updated: a run's status is
its last status event, and a round that is repeated (below the quorum, or after a resume) is written as a
higher *attempt*; reads show the last one unless asked for all. A round's rows are one transaction: a process
killed in between leaves all of them or none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import sqlalchemy as sa

from common.utils.errors import ConsiliumError, RefusalCode
from common.utils.hash_chain import GENESIS_HASH
from server.ledger import tables
from server.ledger.audit_trail import seal_entry
from server.ledger.database import (
    exclusive_lock,
    insert_batches,
    iterate_batches,
    make_storable,
    read_as_of_now,
    retry_once,
)
from server.ledger.reader import LedgerReader, Row, read_current_accounts
from server.ledger.round_rows import ClosedRound, make_contribution_rows, make_score_rows, make_weight_rows

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

OPERATOR_ROLE = "operator"  # of an account that may command runs; one always has it


class ArtifactKind(StrEnum):
    """What is computed once a run."""

    IMAGE_STATISTICS = "image_statistics"  # {name: server.run.records.ImageStatistic}
    CROSS_SITE = "cross_site"  # server.run.records.CrossSiteScores


class ProgressDetails(TypedDict, total=False):
    """The columns of a progress entry: the first one of a request, the others of a reply."""

    asked_centres: Sequence[str]
    centre: str
    seconds: float
    reason: str | None
    code: RefusalCode | None
    bytes_up: int
    bytes_down: int


class Ledger(LedgerReader):
    """An open ledger. Every method raises ConsiliumError when the database cannot be used."""

    def add_run(
        self,
        run_id: str,
        *,
        recipe: str,
        mode: str,
        config: Mapping[str, Any],
        code_fingerprint: str,
        parent_run_id: str | None = None,
    ) -> None:
        """Add a run and its event `started`. Raises ConsiliumError for an id that is taken.

        `parent_run_id` is the cross-validation that the run is a fold of.
        """
        run = {
            "id": run_id,
            "parent_run_id": parent_run_id,
            "created": _utc_now(),
            "recipe": recipe,
            "mode": mode,
            "config": dict(config),
            "code_fingerprint": code_fingerprint,
        }
        started = {"run_id": run_id, "time": _utc_now(), "kind": "started", "detail": ""}
        with self.transaction() as connection:
            if connection.scalar(sa.select(tables.runs.c.id).where(tables.runs.c.id == run_id)):
                raise ConsiliumError(
                    f"the ledger has a run '{run_id}' already; resume it, or choose another id"
                )
            connection.execute(tables.runs.insert(), run)
            connection.execute(tables.events.insert(), started)

    @retry_once
    def log_event(
        self,
        run_id: str,
        kind: str,
        detail: str = "",
        centre: str | None = None,
        code: RefusalCode | None = None,
    ) -> None:
        """Add something that happened in a run; one of `STATUS_EVENTS` is the run's new status.

        `code` says for programs why a centre was refused or left out.
        """
        event = {
            "run_id": run_id,
            "time": _utc_now(),
            "kind": kind,
            "detail": detail,
            "centre": centre,
            "code": code,
        }
        with self.transaction() as connection:
            connection.execute(tables.events.insert(), event)

    @retry_once
    def add_centre(self, run_id: str, centre: str, metadata: Mapping[str, Any]) -> None:
        """Add what a centre reported of itself when it joined: counts, sources, device, ... (JSON)."""
        row = {"run_id": run_id, "time": _utc_now(), "centre": centre, "metadata": dict(metadata)}
        with self.transaction() as connection:
            connection.execute(tables.centres.insert(), row)

    @retry_once
    def add_round(
        self, run_id: str, stage: str, closed_round: ClosedRound, *, started: datetime, close_reason: str
    ) -> int:
        """Add a closed round with its contributions, weights and scores; return its attempt, from 1.

        To be called before the round's checkpoint is written, so that a round is never missing here.
        """
        keys = {"run_id": run_id, "stage": stage, "round": closed_round.round}
        with self.transaction() as connection:
            attempt = _last_attempt(connection, tables.rounds, keys) + 1
            keys["attempt"] = attempt
            round_row = {"started": started, "seconds": closed_round.seconds, "close_reason": close_reason}
            connection.execute(tables.rounds.insert(), keys | round_row)
            _insert_rows(connection, tables.contributions, make_contribution_rows(keys, closed_round))
            _insert_rows(connection, tables.group_weights, make_weight_rows(keys, closed_round))
            _insert_rows(connection, tables.scores, make_score_rows(keys, "val", closed_round.validation))
        return attempt

    @retry_once
    def add_metrics(
        self,
        run_id: str,
        stage: str,
        round_number: int,
        split: str,
        scores: Mapping[str, DataclassInstance],
    ) -> None:
        """Add scores {task: TaskScores} of the weights after a round that are not part of it: the test's."""
        keys: Row = {"run_id": run_id, "stage": stage, "round": round_number}
        with self.transaction() as connection:
            keys["attempt"] = _last_attempt(connection, tables.scores, keys | {"split": split}) + 1
            _insert_rows(connection, tables.scores, make_score_rows(keys, split, scores))

    @retry_once
    def log_progress(
        self,
        run_id: str,
        stage: str,
        round_number: int,
        activity: str,
        **details: Unpack[ProgressDetails],
    ) -> None:
        """Add which centres are asked for something, or one centre's reply."""
        row = {
            "run_id": run_id,
            "time": _utc_now(),
            "stage": stage,
            "round": round_number,
            "activity": activity,
            **details,
        }
        with self.transaction() as connection:
            connection.execute(tables.progress.insert(), row)

    @retry_once
    def log_audit(self, actor: str, action: str, reason: str, run_id: str = "", centre: str = "") -> None:
        """Add an entry of the audit trail: what a person did, such as a command to a run."""
        with self.transaction() as connection:
            exclusive_lock(connection)
            last_hash = connection.scalar(
                sa.select(tables.audit.c.entry_hash).order_by(tables.audit.c.id.desc()).limit(1)
            )
            entry = {
                "time": _utc_now(),
                "actor": actor,
                "action": action,
                "run_id": run_id,
                "centre": centre,
                "reason": reason,
            }
            sealed = seal_entry(make_storable(entry), last_hash or GENESIS_HASH)
            connection.execute(tables.audit.insert(), sealed)

    @retry_once
    def add_account(
        self, name: str, role: str, password_hash: str | None, previous_id: int | None = None
    ) -> None:
        """Add an account as it is from now on.

        Args:
            name: the account's.
            role: ``viewer``, ``operator`` or ``none``.
            password_hash: None: may log in only through a trusted proxy.
            previous_id: of the row that the change was made from.

        Raises:
            ConsiliumError: there would be no operator any more, or the account was changed meanwhile.
        """
        row = {"time": _utc_now(), "name": name, "role": role, "password_hash": password_hash}
        with self.transaction() as connection:
            exclusive_lock(connection)  # two operators may demote each other at once
            current = {account["name"]: account for account in read_current_accounts(connection)}
            if previous_id is not None and current[name]["id"] != previous_id:
                raise ConsiliumError(f"the account '{name}' was changed meanwhile; try again")
            operators = [other for other, account in current.items() if account["role"] == OPERATOR_ROLE]
            if operators == [name] and role != OPERATOR_ROLE:
                raise ConsiliumError(f"'{name}' is the last operator; make somebody else an operator first")
            connection.execute(tables.accounts.insert(), row)

    @retry_once
    def add_artifact(self, run_id: str, kind: ArtifactKind, content: Mapping[str, Any]) -> None:
        """Add what is computed once a run rather than every round (JSON)."""
        row = {"run_id": run_id, "time": _utc_now(), "kind": kind, "content": dict(content)}
        with self.transaction() as connection:
            connection.execute(tables.artifacts.insert(), row)

    def copy_to(self, target: Ledger) -> int:
        """Add all rows, as of one moment, to an empty ledger, which may be of the other kind of database.

        All rows are copied or none. Returns their number.
        """
        count = 0
        with self.transaction(read_only=True) as source, target.transaction() as destination:
            read_as_of_now(source)
            for table in tables.schema.sorted_tables:
                if table is not tables.schema_version:  # the target has its own
                    batches = iterate_batches(source, sa.select(table).order_by(table.c.id))
                    count += insert_batches(destination, table, batches)
        return count


def _insert_rows(connection: sa.Connection, table: sa.Table, rows: list[Row]) -> None:
    if rows:
        connection.execute(table.insert(), rows)


def _last_attempt(connection: sa.Connection, table: sa.Table, keys: Mapping[str, Any]) -> int:
    """Return the highest attempt so far; 0 if there is none."""
    matches = [table.c[column] == value for column, value in keys.items()]
    return connection.scalar(sa.select(sa.func.max(table.c.attempt)).where(*matches)) or 0


def _utc_now() -> datetime:
    return datetime.now(UTC)
