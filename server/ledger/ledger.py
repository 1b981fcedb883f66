"""The ledger: what happened in every run, written once and never changed.

One database for all runs: SQLite by default, PostgreSQL by its address. Rows are only ever added; triggers in the database itself refuse
UPDATE and DELETE, so that no later program, ours or another, edits history unseen. Hence nothing here is a state to be updated: a run's
status is its last status event, and a round done again (below the quorum, or after a resume) is written as a higher *attempt*; reads show
the last one unless asked for all. A round's rows are one transaction: a process killed in between leaves all of them or none.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from common.learning.class_imbalance import compute_effective_centres
from common.utils.errors import ConsiliumError
from common.utils.hash_chain import GENESIS_HASH, append_hash
from server.ledger import tables
from server.ledger.database import Database, exclusive_lock, replace_non_finite, retry_once

STATUS_EVENTS = (
    "started",
    "resumed",
    "paused",
    "stopped",
    "finished",
    "failed",
)  # the kinds of event that are a run's status
Row = dict[str, Any]


class Ledger(Database):
    """An open ledger. Every method raises ConsiliumError, one sentence, where the database cannot be used."""

    # ---- writing

    def add_run(self, run_id: str, *, recipe: str, mode: str, config: Mapping[str, Any], code: str) -> None:
        """A new run and its event `started`."""
        with self._transaction() as database:
            if database.scalar(sa.select(tables.runs.c.id).where(tables.runs.c.id == run_id)):
                raise ConsiliumError(
                    f"the ledger already knows a run '{run_id}'; resume it, or give the new one another id"
                )
            row = {
                "id": run_id,
                "created": _utc_now(),
                "recipe": recipe,
                "mode": mode,
                "config": dict(config),
                "code": code,
            }
            database.execute(tables.runs.insert(), row)
            database.execute(
                tables.events.insert(),
                {"run": run_id, "time": _utc_now(), "kind": "started", "detail": "", "centre": None},
            )

    @retry_once
    def log_event(self, run_id: str, kind: str, detail: str = "", centre: str | None = None) -> None:
        """Something that happened; the kinds of `STATUS` are the run's new status."""
        with self._transaction() as database:
            database.execute(
                tables.events.insert(),
                {"run": run_id, "time": _utc_now(), "kind": kind, "detail": detail, "centre": centre},
            )

    @retry_once
    def add_centre(self, run_id: str, centre: str, metadata: Mapping[str, Any]) -> None:
        """What a centre said of itself when it joined: counts, sources, versions, failed scans, device. JSON."""
        with self._transaction() as database:
            database.execute(
                tables.centres.insert(),
                {"run": run_id, "time": _utc_now(), "centre": centre, "facts": dict(metadata)},
            )

    @retry_once
    def add_round(
        self,
        run_id: str,
        stage: str,
        round_number: int,
        *,
        started: datetime,
        seconds: float,
        closed_because: str,
        contributions: Mapping[str, Mapping[str, Any]],
        weights: Mapping[str, Mapping[str, float]],
        scores: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> int:
        """A round that closed, whole, and its attempt. To be called before its checkpoint is written: a round is never missing here.

        `contributions`: {centre: {"accepted", "reason", "scans", "steps", "norm", "loss", "seconds", "bytes_up", "bytes_down"}}, other
        keys are passed over; `weights`: {"backbone" or task: {centre: weight}}; `scores`: {task: as for `add_metrics`} on validation.
        """
        with self._transaction() as database:
            attempt = _last_attempt(database, tables.rounds, run=run_id, stage=stage, round=round_number) + 1
            at = {"run": run_id, "stage": stage, "round": round_number, "attempt": attempt}
            database.execute(
                tables.rounds.insert(),
                {**at, "started": started, "seconds": seconds, "closed_because": closed_because},
            )
            kept = [c.name for c in tables.contributions.columns if c.name not in ("id", "centre", *at)]
            replies = [
                {**at, "centre": name, **{key: replace_non_finite(said.get(key)) for key in kept}}
                for name, said in contributions.items()
            ]
            shares = [
                {**at, "part": part, "effective": compute_effective_centres(of), "weights": of}
                for part, of in weights.items()
            ]
            scored = _score_rows(at, "val", scores or {})
            for table, rows in (
                (tables.contributions, replies),
                (tables.shares, shares),
                (tables.scores, scored),
            ):
                if rows:
                    database.execute(table.insert(), rows)
        return attempt

    @retry_once
    def add_metrics(
        self, run_id: str, stage: str, round_number: int, split: str, scores: Mapping[str, Mapping[str, Any]]
    ) -> None:
        """Scores outside of a round (the test, at the end), of the weights after this round.

        `scores`: {task: {"centres": {centre: {metric: value or None, "reasons": {metric: text}}}, "macro", "pooled": {metric: value},
        "worst": {metric: {"value", "centre"}}, "spread": {metric: value}, "challenge_score": value}}; the last is a macro value.
        """
        with self._transaction() as database:
            at = {"run": run_id, "stage": stage, "round": round_number}
            at["attempt"] = _last_attempt(database, tables.scores, **at, split=split) + 1
            if rows := _score_rows(at, split, scores):
                database.execute(tables.scores.insert(), rows)

    @retry_once
    def log_progress(self, run_id: str, stage: str, round_number: int, activity: str, **details: Any) -> None:
        """Who is asked (`asked`), or one centre's answer (`centre`, `seconds`, `reason`, `bytes_up`, `bytes_down`)."""
        with self._transaction() as database:
            at = {"run": run_id, "time": _utc_now(), "stage": stage, "round": round_number, "doing": activity}
            database.execute(tables.progress.insert(), at | details)

    @retry_once
    def log_audit(self, actor: str, action: str, reason: str, run_id: str = "", centre: str = "") -> None:
        """An entry of the audit trail: what a person did. Orders to a run are among them (server/run/operator_commands.py)."""
        with self._transaction() as database:
            exclusive_lock(database)
            last = database.scalar(sa.select(tables.audit.c.hash).order_by(tables.audit.c.id.desc()).limit(1))
            entry = {
                "time": _utc_now().isoformat(),
                "who": actor,
                "what": action,
                "run": run_id,
                "centre": centre,
                "why": reason,
            }
            database.execute(
                tables.audit.insert(),
                append_hash(entry, last or GENESIS_HASH) | {"time": datetime.fromisoformat(entry["time"])},
            )

    @retry_once
    def add_account(self, name: str, role: str, password_hash: str | None) -> None:
        """An account as it is from now on; `password` is its hash."""
        with self._transaction() as database:
            database.execute(
                tables.accounts.insert(),
                {"time": _utc_now(), "name": name, "role": role, "password": password_hash},
            )

    @retry_once
    def add_artifact(self, run_id: str, kind: str, body: Mapping[str, Any]) -> None:
        """What was found once in a run rather than in each round: `quality`, `matrix`."""
        with self._transaction() as database:
            database.execute(
                tables.evidence.insert(),
                {"run": run_id, "time": _utc_now(), "kind": kind, "body": dict(body)},
            )

    def copy_to(self, target: Ledger) -> int:
        """Add all rows, as of one moment, to an empty ledger, which may be of the other kind of database. Returns how many; all or none."""
        count = 0
        with self._transaction(read=True) as mine, target._transaction() as theirs:
            if mine.dialect.name == "postgresql":  # SQLite reads as of one moment anyway
                mine.execute(sa.text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"))
            for table in tables.schema.sorted_tables:
                for rows in (
                    mine.execution_options(yield_per=1000)
                    .execute(sa.select(table).order_by(table.c.id))
                    .mappings()
                    .partitions()
                ):
                    theirs.execute(table.insert(), [dict(row) for row in rows])
                    count += len(rows)
                if (
                    theirs.dialect.name == "postgresql" and table is not tables.runs
                ):  # where its own numbers go on
                    highest = sa.select(sa.func.max(table.c.id)).scalar_subquery()
                    theirs.execute(
                        sa.select(sa.func.setval(sa.func.pg_get_serial_sequence(table.name, "id"), highest))
                    )
        return count

    # ---- reading: rows as dicts in the order of writing

    def read_runs(self) -> list[Row]:
        """All runs with their `status` and when it was reached, `since`."""
        last = (
            sa.select(sa.func.max(tables.events.c.id))
            .where(tables.events.c.kind.in_(STATUS_EVENTS))
            .group_by(tables.events.c.run)
        )
        joined = tables.runs.join(
            tables.events, sa.and_(tables.events.c.run == tables.runs.c.id, tables.events.c.id.in_(last))
        )
        shown = sa.select(
            tables.runs, tables.events.c.kind.label("status"), tables.events.c.time.label("since")
        )
        return self.read(shown.select_from(joined).order_by(tables.events.c.id))

    def read_status(self, run_id: str) -> str | None:
        """The run's last status; None for an unknown run."""
        of_run = sa.and_(tables.events.c.run == run_id, tables.events.c.kind.in_(STATUS_EVENTS))
        rows = self.read(
            sa.select(tables.events.c.kind).where(of_run).order_by(tables.events.c.id.desc()).limit(1)
        )
        return str(rows[0]["kind"]) if rows else None

    def read_events(self, run_id: str) -> list[Row]:
        return self.read(_select_run_rows(tables.events, run_id))

    def read_centres(self, run_id: str) -> list[Row]:
        return self.read(_select_run_rows(tables.centres, run_id))

    def read_rounds(self, run_id: str, *, all_attempts: bool = False) -> list[Row]:
        return self.read(
            _select_run_rows(tables.rounds, run_id)
            if all_attempts
            else _select_last_attempts(tables.rounds, run_id)
        )

    def read_contributions(self, run_id: str, *, all_attempts: bool = False) -> list[Row]:
        return self.read(
            _select_run_rows(tables.contributions, run_id)
            if all_attempts
            else _select_last_attempts(tables.contributions, run_id)
        )

    def read_group_weights(self, run_id: str, *, all_attempts: bool = False) -> list[Row]:
        return self.read(
            _select_run_rows(tables.shares, run_id)
            if all_attempts
            else _select_last_attempts(tables.shares, run_id)
        )

    def read_scores(
        self, run_id: str, *, all_attempts: bool = False, include_centres: bool = True
    ) -> list[Row]:
        """`centres=False` leaves out what is long: each centre's own."""
        rows = (
            _select_run_rows(tables.scores, run_id)
            if all_attempts
            else _select_last_attempts(tables.scores, run_id, "split")
        )
        return self.read(
            rows
            if include_centres
            else rows.with_only_columns(*(c for c in tables.scores.columns if c.name != "centres"))
        )

    def read_audit(self, run_id: str | None = None, after_id: int = 0) -> list[Row]:
        """The trail's entries after this id, of one run where it is named; checked as a whole by server/run/operator_commands.py."""
        query = sa.select(tables.audit).where(tables.audit.c.id > after_id).order_by(tables.audit.c.id)
        return self.read(query if run_id is None else query.where(tables.audit.c.run == run_id))

    def read_accounts(self) -> list[Row]:
        """Every account as it is now."""
        last = sa.select(sa.func.max(tables.accounts.c.id)).group_by(tables.accounts.c.name)
        return self.read(
            sa.select(tables.accounts).where(tables.accounts.c.id.in_(last)).order_by(tables.accounts.c.name)
        )

    def read_artifacts(self, run_id: str) -> dict[str, Any]:
        """{kind: its last body}."""
        return {row["kind"]: row["body"] for row in self.read(_select_run_rows(tables.evidence, run_id))}


def _score_rows(
    round_key: Mapping[str, Any], split: str, scores: Mapping[str, Mapping[str, Any]]
) -> list[Row]:
    """One row a task."""
    rows = []
    for task, views in scores.items():
        shown = {k: v for k, v in views.items() if k != "centres"}
        rows.append(
            {**round_key, "split": split, "task": task, "views": shown, "centres": views.get("centres", {})}
        )
    return rows


def _last_attempt(database: sa.Connection, table: sa.Table, **where: Any) -> int:
    """The highest attempt so far; 0 where there is none."""
    query = sa.select(sa.func.max(table.c.attempt)).where(
        *(table.c[key] == value for key, value in where.items())
    )
    return database.scalar(query) or 0


def _select_run_rows(table: sa.Table, run_id: str) -> sa.Select[Any]:
    return sa.select(table).where(table.c.run == run_id).order_by(table.c.id)


def _select_last_attempts(table: sa.Table, run_id: str, *extra_keys: str) -> sa.Select[Any]:
    """Rows of each round's last attempt. It is the rounds' own, so that a contribution of an earlier one does not stay visible."""
    source = tables.scores if extra_keys else tables.rounds
    keys = ("stage", "round", *extra_keys)
    last = sa.select(*(source.c[key] for key in keys), sa.func.max(source.c.attempt).label("attempt")).where(
        source.c.run == run_id
    )
    newest = last.group_by(*(source.c[key] for key in keys)).subquery()
    same = sa.and_(*(table.c[key] == newest.c[key] for key in (*keys, "attempt")))
    return sa.select(table).join(newest, same).where(table.c.run == run_id).order_by(table.c.id)


def _utc_now() -> datetime:
    return datetime.now(UTC)
