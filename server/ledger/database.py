"""The database under the ledger: SQLite or PostgreSQL by its address, opened, its tables made, its transactions and its errors."""

from __future__ import annotations

import functools
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, OperationalError, SQLAlchemyError

from common.utils.errors import ConsiliumError
from server.ledger import tables

P = ParamSpec("P")
R = TypeVar("R")
RECONNECT_TIMEOUT = 300.0  # seconds that a database which was there may be away
log = logging.getLogger("consilium.server")


class ConnectionLost(ConsiliumError):
    """The connection broke in the middle of a transaction, which may or may not have been kept."""


def retry_once(method: Callable[P, R]) -> Callable[P, R]:
    """A transaction that is begun again, once, when its connection broke, as it does when the database is killed: that is waited for.

    Where the first one had been kept after all, a line stands there twice, which harms nothing (a round's second is a higher attempt).
    """

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(*args, **kwargs)
        except ConnectionLost:
            return method(*args, **kwargs)

    return call


class Database:
    """An open database. Every method raises ConsiliumError, one sentence, where it cannot be used."""

    def __init__(self, address: str) -> None:
        """`address`: ``sqlite:///runs/ledger.db`` or ``postgresql://user@host/name``; the tables are made when absent."""
        try:
            url = sa.make_url(address)
        except ArgumentError:
            shown = address if "@" not in address else "***"  # it may hold a password
            raise ConsiliumError(
                f"'{shown}' is no database address; write e.g. sqlite:///runs/ledger.db"
            ) from None
        if url.drivername in ("postgres", "postgresql"):
            url = url.set(drivername="postgresql+psycopg")
        if url.get_backend_name() not in ("sqlite", "postgresql"):
            raise ConsiliumError(
                f"the ledger cannot be kept in '{url.drivername}'; give a sqlite:/// or postgresql:// address"
            )
        self.address = url.render_as_string(hide_password=True)  # for messages
        self.was_connected = False  # one that was never there is not waited for
        try:
            if url.get_backend_name() == "sqlite" and url.database:
                Path(url.database).parent.mkdir(parents=True, exist_ok=True)
            self._engine = sa.create_engine(url, pool_pre_ping=True, json_serializer=_dump_json)
        except ModuleNotFoundError:
            raise ConsiliumError(
                "a PostgreSQL ledger needs psycopg: pip install 'consilium[postgresql]'"
            ) from None
        except OSError as error:
            raise ConsiliumError(
                f"the ledger's folder cannot be made for {self.address}: {error.strerror}"
            ) from None
        if url.get_backend_name() == "sqlite":
            sa.event.listen(self._engine, "connect", _configure_sqlite)
            sa.event.listen(self._engine, "begin", _begin_sqlite_transaction)
        with self._transaction() as database:
            exclusive_lock(database)  # two coordinators starting at once
            tables.schema.create_all(database)
            inspector = sa.inspect(database)
            for table in tables.schema.tables.values():
                if lacking := {c.name for c in table.columns} - {
                    c["name"] for c in inspector.get_columns(table.name)
                }:
                    what = f"its {table.name} lack {', '.join(sorted(lacking))}"
                    raise ConsiliumError(
                        f"{self.address} was written by another version ({what}); name a new ledger"
                    )
        self.was_connected = True

    def close(self) -> None:
        """Let go of the database: a SQLite ledger is one file then."""
        self._engine.dispose()

    @retry_once
    def read(self, query: sa.Select[Any]) -> list[dict[str, Any]]:
        """The rows of any query on `server/ledger/tables.py`."""
        with self._transaction(read=True) as database:
            return [dict(row) for row in database.execute(query).mappings()]

    @contextmanager
    def _transaction(self, read: bool = False) -> Iterator[sa.Connection]:
        """A transaction; the database's own errors become one sentence."""
        try:
            with self._connect(read) as connection, connection.begin():
                yield connection
        except IntegrityError as error:
            raise ConsiliumError(
                f"the ledger {self.address} refuses the row: {_first_line(error)}"
            ) from error
        except SQLAlchemyError as error:
            broken = isinstance(error, DBAPIError) and error.connection_invalidated
            raise (ConnectionLost if broken else ConsiliumError)(
                f"the ledger {self.address} cannot be used: {_first_line(error)}"
            ) from error

    def _connect(self, read: bool) -> sa.Connection:
        """A connection; a database that was there and is away, because it is being restarted, is waited for."""
        until = time.monotonic() + (RECONNECT_TIMEOUT if self.was_connected else 0)
        while True:
            try:
                return self._engine.execution_options(read=read).connect()
            except OperationalError as error:
                if time.monotonic() > until:
                    raise
                log.warning("the ledger %s is away: waiting (%s)", self.address, _first_line(error))
                time.sleep(2)


def _configure_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # transactions are begun by _sqlite_begin, not by Python's guess
    for pragma in ("busy_timeout = 30000", "journal_mode = WAL", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite_transaction(connection: sa.Connection) -> None:
    # A writer takes its place in the queue at once: one that reads first and then writes is refused, not queued, when another came between.
    connection.exec_driver_sql(
        "BEGIN" if connection.get_execution_options().get("read") else "BEGIN IMMEDIATE"
    )


def exclusive_lock(connection: sa.Connection) -> None:
    """Writers that must not meet take turns; SQLite's do so anyway."""
    if connection.dialect.name == "postgresql":
        connection.execute(sa.text("SELECT pg_advisory_xact_lock(20260403320)"))


def replace_non_finite(value: Any) -> Any:
    """Not-a-number and infinity are no values in SQL, nor in JSON: NULL."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return {key: replace_non_finite(of) for key, of in value.items()} if isinstance(value, dict) else value


def _dump_json(value: Any) -> str:
    try:
        return json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(replace_non_finite(value))


def _first_line(error: SQLAlchemyError) -> str:
    return str(getattr(error, "orig", None) or error).strip().splitlines()[0]
