"""The ledger: what happened in every run, written once and never changed.

One database for all runs: SQLite by default, PostgreSQL by its address. Rows are only ever added; triggers in the database itself refuse
UPDATE and DELETE, so that no later program, ours or another, edits history unseen. Hence nothing here is a state to be updated: a run's
status is its last status event, and a round done again (below the quorum, or after a resume) is written as a higher *attempt*; reads show
the last one unless asked for all. A round's rows are one transaction: a process killed in between leaves all of them or none.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, OperationalError, SQLAlchemyError

from common.chain import START, linked
from common.errors import ConsiliumError
from common.imbalance import effective_number
from server import tables

STATUS = ("started", "resumed", "paused", "stopped", "finished", "failed")  # the kinds of event that are a run's status
Row = dict[str, Any]
AWAY = 300.0  # seconds that a database which was there may be away
log = logging.getLogger("consilium.server")


class Broken(ConsiliumError):
    """The connection broke in the middle of a transaction, which may or may not have been kept."""


class Ledger:
    """An open ledger. Every method raises ConsiliumError, one sentence, where the database cannot be used."""

    def __init__(self, address: str) -> None:
        """`address`: ``sqlite:///runs/ledger.db`` or ``postgresql://user@host/name``; the tables are made when absent."""
        try:
            url = sa.make_url(address)
        except ArgumentError:
            shown = address if "@" not in address else "***"  # it may hold a password
            raise ConsiliumError(f"'{shown}' is no database address; write e.g. sqlite:///runs/ledger.db") from None
        if url.drivername in ("postgres", "postgresql"):
            url = url.set(drivername="postgresql+psycopg")
        if url.get_backend_name() not in ("sqlite", "postgresql"):
            raise ConsiliumError(f"the ledger cannot be kept in '{url.drivername}'; give a sqlite:/// or postgresql:// address")
        self.seen = False
        self.address = url.render_as_string(hide_password=True)  # for messages
        try:
            if url.get_backend_name() == "sqlite" and url.database:
                Path(url.database).parent.mkdir(parents=True, exist_ok=True)
            self._engine = sa.create_engine(url, pool_pre_ping=True, json_serializer=_json)
        except ModuleNotFoundError:
            raise ConsiliumError("a PostgreSQL ledger needs psycopg: pip install 'consilium[postgresql]'") from None
        except OSError as error:
            raise ConsiliumError(f"the ledger's folder cannot be made for {self.address}: {error.strerror}") from None
        if url.get_backend_name() == "sqlite":
            sa.event.listen(self._engine, "connect", _sqlite_connect)
            sa.event.listen(self._engine, "begin", _sqlite_begin)
        with self._open() as database:
            _alone(database)  # two coordinators starting at once
            tables.schema.create_all(database)
            inspector = sa.inspect(database)
            for table in tables.schema.tables.values():
                if lacking := {c.name for c in table.columns} - {c["name"] for c in inspector.get_columns(table.name)}:
                    columns = ", ".join(sorted(lacking))
                    raise ConsiliumError(
                        f"{self.address} was written by another version (its {table.name} lack {columns}); name a new ledger"
                    )
        self.seen = True

    # ---- writing

    def start_run(self, run: str, *, recipe: str, mode: str, config: Mapping[str, Any], code: str) -> None:
        """A new run and its event `started`."""
        with self._open() as database:
            if database.scalar(sa.select(tables.runs.c.id).where(tables.runs.c.id == run)):
                raise ConsiliumError(f"the ledger already knows a run '{run}'; resume it, or give the new one another id")
            row = {"id": run, "created": _now(), "recipe": recipe, "mode": mode, "config": dict(config), "code": code}
            database.execute(tables.runs.insert(), row)
            database.execute(tables.events.insert(), {"run": run, "time": _now(), "kind": "started", "detail": "", "centre": None})

    def event(self, run: str, kind: str, detail: str = "", centre: str | None = None) -> None:
        """Something that happened; the kinds of `STATUS` are the run's new status."""
        with self._open() as database:
            database.execute(tables.events.insert(), {"run": run, "time": _now(), "kind": kind, "detail": detail, "centre": centre})

    def add_centre(self, run: str, centre: str, facts: Mapping[str, Any]) -> None:
        """What a centre said of itself when it joined: counts, sources, versions, failed scans, device. JSON."""
        with self._open() as database:
            database.execute(tables.centres.insert(), {"run": run, "time": _now(), "centre": centre, "facts": dict(facts)})

    def add_round(
        self,
        run: str,
        stage: str,
        round: int,
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
        with self._open() as database:
            attempt = _last(database, tables.rounds, run=run, stage=stage, round=round) + 1
            at = {"run": run, "stage": stage, "round": round, "attempt": attempt}
            database.execute(tables.rounds.insert(), {**at, "started": started, "seconds": seconds, "closed_because": closed_because})
            kept = [c.name for c in tables.contributions.columns if c.name not in ("id", "centre", *at)]
            replies = [{**at, "centre": name, **{key: _finite(said.get(key)) for key in kept}} for name, said in contributions.items()]
            shares = [{**at, "part": part, "effective": effective_number(of), "weights": of} for part, of in weights.items()]
            for table, rows in (
                (tables.contributions, replies),
                (tables.shares, shares),
                (tables.scores, _scores(at, "val", scores or {})),
            ):
                if rows:
                    database.execute(table.insert(), rows)
        return attempt

    def add_metrics(self, run: str, stage: str, round: int, split: str, scores: Mapping[str, Mapping[str, Any]]) -> None:
        """Scores outside of a round (the test, at the end), of the weights after this round.

        `scores`: {task: {"centres": {centre: {metric: value or None, "reasons": {metric: text}}}, "macro", "pooled": {metric: value},
        "worst": {metric: {"value", "centre"}}, "spread": {metric: value}, "challenge_score": value}}; the last is a macro value.
        """
        with self._open() as database:
            at = {"run": run, "stage": stage, "round": round}
            at["attempt"] = _last(database, tables.scores, **at, split=split) + 1
            if rows := _scores(at, split, scores):
                database.execute(tables.scores.insert(), rows)

    def progress(self, run: str, stage: str, round: int, doing: str, **facts: Any) -> None:
        """Who is asked (`asked`), or one centre's answer (`centre`, `seconds`, `reason`, `bytes_up`, `bytes_down`)."""
        with self._open() as database:
            at = {"run": run, "time": _now(), "stage": stage, "round": round, "doing": doing}
            database.execute(tables.progress.insert(), at | facts)

    def note(self, who: str, what: str, why: str, run: str = "", centre: str = "") -> None:
        """An entry of the audit trail: what a person did. Orders to a run are among them (server/orders.py)."""
        with self._open() as database:
            _alone(database)
            last = database.scalar(sa.select(tables.audit.c.hash).order_by(tables.audit.c.id.desc()).limit(1))
            entry = {"time": _now().isoformat(), "who": who, "what": what, "run": run, "centre": centre, "why": why}
            database.execute(tables.audit.insert(), linked(entry, last or START) | {"time": datetime.fromisoformat(entry["time"])})

    def add_account(self, name: str, role: str, password: str | None) -> None:
        """An account as it is from now on; `password` is its hash."""
        with self._open() as database:
            database.execute(tables.accounts.insert(), {"time": _now(), "name": name, "role": role, "password": password})

    def add_evidence(self, run: str, kind: str, body: Mapping[str, Any]) -> None:
        """What was found once in a run rather than in each round: `quality`, `matrix`."""
        with self._open() as database:
            database.execute(tables.evidence.insert(), {"run": run, "time": _now(), "kind": kind, "body": dict(body)})

    def copy(self, to: Ledger) -> int:
        """Add all rows, as of one moment, to an empty ledger, which may be of the other kind of database. Returns how many; all or none."""
        count = 0
        with self._open(read=True) as mine, to._open() as theirs:
            if mine.dialect.name == "postgresql":  # SQLite reads as of one moment anyway
                mine.execute(sa.text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"))
            for table in tables.schema.sorted_tables:
                for rows in mine.execution_options(yield_per=1000).execute(sa.select(table).order_by(table.c.id)).mappings().partitions():
                    theirs.execute(table.insert(), [dict(row) for row in rows])
                    count += len(rows)
                if theirs.dialect.name == "postgresql" and table is not tables.runs:  # where its own numbers go on
                    highest = sa.select(sa.func.max(table.c.id)).scalar_subquery()
                    theirs.execute(sa.select(sa.func.setval(sa.func.pg_get_serial_sequence(table.name, "id"), highest)))
        return count

    def close(self) -> None:
        """Let go of the database: a SQLite ledger is one file then."""
        self._engine.dispose()

    # ---- reading: rows as dicts in the order of writing

    def runs(self) -> list[Row]:
        """All runs with their `status` and when it was reached, `since`."""
        last = sa.select(sa.func.max(tables.events.c.id)).where(tables.events.c.kind.in_(STATUS)).group_by(tables.events.c.run)
        joined = tables.runs.join(tables.events, sa.and_(tables.events.c.run == tables.runs.c.id, tables.events.c.id.in_(last)))
        return self.read(
            sa.select(tables.runs, tables.events.c.kind.label("status"), tables.events.c.time.label("since"))
            .select_from(joined)
            .order_by(tables.events.c.id)
        )

    def status(self, run: str) -> str | None:
        """The run's last status; None for an unknown run."""
        of_run = sa.and_(tables.events.c.run == run, tables.events.c.kind.in_(STATUS))
        rows = self.read(sa.select(tables.events.c.kind).where(of_run).order_by(tables.events.c.id.desc()).limit(1))
        return str(rows[0]["kind"]) if rows else None

    def events(self, run: str) -> list[Row]:
        return self.read(_of(tables.events, run))

    def centres(self, run: str) -> list[Row]:
        return self.read(_of(tables.centres, run))

    def rounds(self, run: str, *, all_attempts: bool = False) -> list[Row]:
        return self.read(_of(tables.rounds, run) if all_attempts else _last_attempts(tables.rounds, run))

    def contributions(self, run: str, *, all_attempts: bool = False) -> list[Row]:
        return self.read(_of(tables.contributions, run) if all_attempts else _last_attempts(tables.contributions, run))

    def shares(self, run: str, *, all_attempts: bool = False) -> list[Row]:
        return self.read(_of(tables.shares, run) if all_attempts else _last_attempts(tables.shares, run))

    def scores(self, run: str, *, all_attempts: bool = False, centres: bool = True) -> list[Row]:
        """`centres=False` leaves out what is long: each centre's own."""
        rows = _of(tables.scores, run) if all_attempts else _last_attempts(tables.scores, run, "split")
        return self.read(rows if centres else rows.with_only_columns(*(c for c in tables.scores.columns if c.name != "centres")))

    def audit(self, run: str | None = None, after: int = 0) -> list[Row]:
        """The trail's entries after this id, of one run where it is named; checked as a whole by server/orders.py."""
        query = sa.select(tables.audit).where(tables.audit.c.id > after).order_by(tables.audit.c.id)
        return self.read(query if run is None else query.where(tables.audit.c.run == run))

    def accounts(self) -> list[Row]:
        """Every account as it is now."""
        last = sa.select(sa.func.max(tables.accounts.c.id)).group_by(tables.accounts.c.name)
        return self.read(sa.select(tables.accounts).where(tables.accounts.c.id.in_(last)).order_by(tables.accounts.c.name))

    def evidence(self, run: str) -> dict[str, Any]:
        """{kind: its last body}."""
        return {row["kind"]: row["body"] for row in self.read(_of(tables.evidence, run))}

    def read(self, query: sa.Select[Any]) -> list[Row]:
        """The rows of any query on `server/tables.py`."""
        try:
            return self._read(query)
        except Broken:  # what was only asked may be asked again
            return self._read(query)

    def _read(self, query: sa.Select[Any]) -> list[Row]:
        with self._open(read=True) as database:
            return [dict(row) for row in database.execute(query).mappings()]

    @contextmanager
    def _open(self, read: bool = False) -> Iterator[sa.Connection]:
        """A transaction; the database's own errors become one sentence."""
        try:
            with self._connected(read) as connection, connection.begin():
                yield connection
        except IntegrityError as error:
            raise ConsiliumError(f"the ledger {self.address} refuses the row: {_short(error)}") from error
        except SQLAlchemyError as error:
            broken = isinstance(error, DBAPIError) and error.connection_invalidated
            raise (Broken if broken else ConsiliumError)(f"the ledger {self.address} cannot be used: {_short(error)}") from error

    def _connected(self, read: bool) -> sa.Connection:
        """A connection; a database that was there and is away, because it is being restarted, is waited for."""
        until = time.monotonic() + (AWAY if self.seen else 0)
        while True:
            try:
                return self._engine.execution_options(read=read).connect()
            except OperationalError as error:
                if time.monotonic() > until:
                    raise
                log.warning("the ledger %s is away: waiting (%s)", self.address, _short(error))
                time.sleep(2)


def _sqlite_connect(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # transactions are begun by _sqlite_begin, not by Python's guess
    for pragma in ("busy_timeout = 30000", "journal_mode = WAL", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}")


def _sqlite_begin(connection: sa.Connection) -> None:
    # A writer takes its place in the queue at once: one that reads first and then writes is refused, not queued, when another came between.
    connection.exec_driver_sql("BEGIN" if connection.get_execution_options().get("read") else "BEGIN IMMEDIATE")


def _scores(at: Mapping[str, Any], split: str, scores: Mapping[str, Mapping[str, Any]]) -> list[Row]:
    """One row a task."""
    return [
        {
            **at,
            "split": split,
            "task": task,
            "views": {k: v for k, v in views.items() if k != "centres"},
            "centres": views.get("centres", {}),
        }
        for task, views in scores.items()
    ]


def _alone(database: sa.Connection) -> None:
    """Writers that must not meet take turns; SQLite's do so anyway."""
    if database.dialect.name == "postgresql":
        database.execute(sa.text("SELECT pg_advisory_xact_lock(20260403320)"))


def _last(database: sa.Connection, table: sa.Table, **where: Any) -> int:
    """The highest attempt so far; 0 where there is none."""
    query = sa.select(sa.func.max(table.c.attempt)).where(*(table.c[key] == value for key, value in where.items()))
    return database.scalar(query) or 0


def _of(table: sa.Table, run: str) -> sa.Select[Any]:
    return sa.select(table).where(table.c.run == run).order_by(table.c.id)


def _last_attempts(table: sa.Table, run: str, *also: str) -> sa.Select[Any]:
    """Rows of each round's last attempt. It is the rounds' own, so that a contribution of an earlier one does not stay visible."""
    source = tables.scores if also else tables.rounds
    keys = ("stage", "round", *also)
    last = sa.select(*(source.c[key] for key in keys), sa.func.max(source.c.attempt).label("attempt")).where(source.c.run == run)
    newest = last.group_by(*(source.c[key] for key in keys)).subquery()
    same = sa.and_(*(table.c[key] == newest.c[key] for key in (*keys, "attempt")))
    return sa.select(table).join(newest, same).where(table.c.run == run).order_by(table.c.id)


def _finite(value: Any) -> Any:
    """Not-a-number and infinity are no values in SQL, nor in JSON: NULL."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return {key: _finite(of) for key, of in value.items()} if isinstance(value, dict) else value


def _json(value: Any) -> str:
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value))


def _short(error: SQLAlchemyError) -> str:
    return str(getattr(error, "orig", None) or error).strip().splitlines()[0]


def _now() -> datetime:
    return datetime.now(UTC)
