"""The database under the ledger, SQLite or PostgreSQL: its tables, its transactions, its errors."""

from __future__ import annotations

import functools
import json
import logging
import math
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import sqlalchemy as sa
from sqlalchemy.exc import ArgumentError, DBAPIError, IntegrityError, OperationalError, SQLAlchemyError

from common.utils.errors import ConsiliumError
from server.ledger import tables
from server.ledger.append_only import protect_tables

P = ParamSpec("P")
R = TypeVar("R")
RECONNECT_TIMEOUT = 300.0  # seconds to wait for a database that was reachable before
RECONNECT_INTERVAL = 2.0  # seconds between two attempts
UNSTORABLE_IN_JSON = re.compile(r"\\u(0000|d[89a-f])")  # also in pairs of surrogates, which are kept
log = logging.getLogger("consilium.server")


class ConnectionLost(ConsiliumError):
    """The connection broke during a transaction, which may or may not have been committed."""


def retry_once(method: Callable[P, R]) -> Callable[P, R]:
    """Repeat a transaction once when its connection broke, as it does when the database restarts.

    If the first one was committed after all, its rows are there twice, which is harmless: a repeated round is
    a higher attempt.
    """

    @functools.wraps(method)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return method(*args, **kwargs)
        except ConnectionLost:
            return method(*args, **kwargs)

    return call


class Database:
    """An open database. Every method raises ConsiliumError when the database cannot be used."""

    def __init__(self, address: str) -> None:
        """Open the database and make its tables when it has none.

        Args:
            address: ``sqlite:///runs/ledger.db`` or ``postgresql://user@host/name``.
        """
        url = parse_address(address)
        self.address = url.render_as_string(hide_password=True)  # for messages
        self.was_connected = False  # only a database that was reachable before is waited for
        self._engine = _create_engine(url, self.address)
        with self.transaction() as connection:
            exclusive_lock(connection)  # two coordinators may start at once
            self._prepare_tables(connection)
        self.was_connected = True

    def _prepare_tables(self, connection: sa.Connection) -> None:
        """Make the tables of a new database; raise ConsiliumError for those of another version."""
        table_names = sa.inspect(connection).get_table_names()
        if tables.schema_version.name in table_names:
            version = connection.scalar(sa.select(sa.func.max(tables.schema_version.c.version)))
            if version != tables.SCHEMA_VERSION:
                raise ConsiliumError(
                    f"the ledger {self.address} has schema version {version}, and this program needs version "
                    f"{tables.SCHEMA_VERSION}; use the version of consilium that wrote it"
                )
            created = protect_tables(connection)
            if created:
                log.warning(
                    "the ledger %s lacked triggers that refuse changes, and has them again: %s; an earlier "
                    "version made fewer, otherwise somebody removed them",
                    self.address,
                    ", ".join(created),
                )
        elif tables.runs.name in table_names:
            raise ConsiliumError(
                f"the ledger {self.address} was written by version 0.1.0; migrate it with "
                "`consilium-server upgrade`"
            )
        else:
            tables.schema.create_all(connection)
            row = {"time": datetime.now(UTC), "version": tables.SCHEMA_VERSION}
            connection.execute(tables.schema_version.insert(), row)
            protect_tables(connection)

    def close(self) -> None:
        """Close all connections: a SQLite ledger is a single file afterwards."""
        self._engine.dispose()

    @retry_once
    def read(self, query: sa.Select[Any]) -> list[dict[str, Any]]:
        """Return the rows of a query on the tables of `server.ledger.tables`."""
        with self.transaction(read_only=True) as connection:
            result = connection.execute(query)
            columns = list(result.keys())
            return [dict(zip(columns, row, strict=True)) for row in result]  # half the time of `mappings()`

    @contextmanager
    def transaction(self, read_only: bool = False) -> Iterator[sa.Connection]:
        """Open a transaction that is committed at the end of the block; errors become one sentence."""
        try:
            with self._connect(read_only) as connection, connection.begin():
                yield connection
        except IntegrityError as error:
            raise ConsiliumError(
                f"the ledger {self.address} refuses the row: {_first_line(error)}"
            ) from error
        except SQLAlchemyError as error:
            sentence = f"the ledger {self.address} cannot be used: {_first_line(error)}"
            if isinstance(error, DBAPIError) and error.connection_invalidated:
                raise ConnectionLost(sentence) from error
            raise ConsiliumError(sentence) from error

    def _connect(self, read_only: bool) -> sa.Connection:
        """Return a connection; wait for a database that was reachable before: it may be restarting."""
        deadline = time.monotonic()
        if self.was_connected:
            deadline += RECONNECT_TIMEOUT
        while True:
            try:
                return self._engine.execution_options(read_only=read_only).connect()
            except OperationalError as error:
                if time.monotonic() > deadline:
                    raise
                log.warning("the ledger %s is unreachable, waiting: %s", self.address, _first_line(error))
                time.sleep(RECONNECT_INTERVAL)


def parse_address(address: str) -> sa.URL:
    """Return a database's URL with the driver that is used for it.

    Raises:
        ConsiliumError: the address is malformed, or names another kind of database.
    """
    try:
        url = sa.make_url(address)
    except ArgumentError:
        shown = "***" if "@" in address else address  # it may hold a password
        raise ConsiliumError(
            f"'{shown}' is not a database address; write for example sqlite:///runs/ledger.db"
        ) from None
    if url.drivername in ("postgres", "postgresql"):
        url = url.set(drivername="postgresql+psycopg")
    if url.get_backend_name() not in ("sqlite", "postgresql"):
        raise ConsiliumError(
            f"a ledger cannot be kept in '{url.drivername}'; give a sqlite:/// or postgresql:// address"
        )
    return url


def _create_engine(url: sa.URL, shown_address: str) -> sa.Engine:
    is_sqlite = url.get_backend_name() == "sqlite"
    try:
        if is_sqlite and url.database:
            Path(url.database).parent.mkdir(parents=True, exist_ok=True)
        engine = sa.create_engine(url, pool_pre_ping=True, json_serializer=_dump_json)
    except ModuleNotFoundError:
        raise ConsiliumError(
            "a PostgreSQL ledger needs psycopg: pip install 'consilium[postgresql]'"
        ) from None
    except OSError as error:
        raise ConsiliumError(
            f"the folder of the ledger {shown_address} cannot be made: {error.strerror}"
        ) from None
    if is_sqlite:
        sa.event.listen(engine, "connect", _configure_sqlite)
        sa.event.listen(engine, "begin", _begin_sqlite_transaction)
    return engine


def _configure_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # _begin_sqlite_transaction begins transactions, not Python's driver
    for pragma in ("busy_timeout = 30000", "journal_mode = WAL", "foreign_keys = ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite_transaction(connection: sa.Connection) -> None:
    # A writer queues for the lock at once; one that reads first is refused, not queued, if another wrote
    # meanwhile.
    read_only = connection.get_execution_options().get("read_only")
    connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")


def exclusive_lock(connection: sa.Connection) -> None:
    """Let only one such transaction run at a time; SQLite's writers take turns anyway."""
    if connection.dialect.name == "postgresql":
        connection.execute(sa.text("SELECT pg_advisory_xact_lock(20260403320)"))


def read_as_of_now(connection: sa.Connection) -> None:
    """Let all queries of a transaction that has just begun see one moment; SQLite's do so anyway."""
    if connection.dialect.name == "postgresql":
        connection.execute(sa.text("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY"))


def iterate_batches(connection: sa.Connection, query: sa.Select[Any]) -> Iterator[list[dict[str, Any]]]:
    """Yield a long query's rows a thousand at a time, so that they are never all in memory."""
    rows = connection.execution_options(yield_per=1000).execute(query)
    for batch in rows.mappings().partitions():
        yield list(map(dict, batch))


def insert_batches(
    connection: sa.Connection, table: sa.Table, batches: Iterable[list[dict[str, Any]]]
) -> int:
    """Insert rows that have ids already into an empty table; return their number."""
    count = 0
    for batch in batches:
        connection.execute(table.insert(), batch)
        count += len(batch)
    if connection.dialect.name == "postgresql" and isinstance(table.c.id.type, sa.Integer):
        # The database's own ids go on after the highest of these.
        highest = sa.select(sa.func.max(table.c.id)).scalar_subquery()
        sequence = sa.func.pg_get_serial_sequence(table.name, "id")
        connection.execute(sa.select(sa.func.setval(sequence, highest)))
    return count


def make_storable(value: Any) -> Any:
    """Return a value as SQL and JSON can hold it, also inside dicts and lists.

    NaN and infinity become None, and characters that are no text are replaced (`PlainText`).
    """
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, str):
        return tables.replace_unstorable(value)
    if isinstance(value, dict):
        return {make_storable(key): make_storable(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [make_storable(item) for item in value]
    return value


def _dump_json(value: Any) -> str:
    try:
        text = json.dumps(value, allow_nan=False)
    except ValueError:
        return json.dumps(make_storable(value))
    if UNSTORABLE_IN_JSON.search(text):
        return json.dumps(make_storable(value))
    return text


def _first_line(error: SQLAlchemyError) -> str:
    original = getattr(error, "orig", None)
    text = str(error if original is None else original)
    return text.strip().splitlines()[0]
