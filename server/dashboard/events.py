"""Pages that update themselves.

Server-sent events say that the ledger has grown, and the page fetches itself anew.
"""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import sqlalchemy as sa
from starlette.requests import Request

from server.ledger import tables
from server.ledger.ledger import Ledger

POLL_INTERVAL = 1.0  # seconds
MAX_CONNECTION_TIME = 600.0  # seconds; the browser then connects again, and has to be admitted again
KEEP_ALIVE_INTERVAL = 15  # seconds after which a proxy might close a silent connection
WATCHED_TABLES = (tables.progress, tables.events, tables.rounds, tables.audit, tables.scores)


def ledger_version(ledger: Ledger, run_id: str = "") -> str:
    """Return a text that changes whenever something is written about a run, or about any run."""
    latest_ids = []
    for table in WATCHED_TABLES:
        query = sa.select(sa.func.max(table.c.id))
        if run_id:
            query = query.where(table.c.run_id == run_id)
        latest_ids.append(query.scalar_subquery().label(table.name))
    (row,) = ledger.read(sa.select(*latest_ids))
    return "-".join(str(value or 0) for value in row.values())


async def stream_changes(
    request: Request, ledger: Ledger, run_id: str, seen_version: str
) -> AsyncIterator[str]:
    """Yield an event for each change after the version that the page shows, and keep-alive comments."""
    end = time.monotonic() + MAX_CONNECTION_TIME
    last_sent = time.monotonic()
    yield "retry: 2000\n\n"
    while time.monotonic() < end and not await request.is_disconnected():
        version = await anyio.to_thread.run_sync(ledger_version, ledger, run_id)
        if version != seen_version:
            seen_version = version
            last_sent = time.monotonic()
            yield f"data: {version}\n\n"
        elif time.monotonic() > last_sent + KEEP_ALIVE_INTERVAL:
            last_sent = time.monotonic()
            yield ": still here\n\n"
        await anyio.sleep(POLL_INTERVAL)


class VersionedCache:
    """Keeps what a page computed until the ledger grows: finished runs are read once."""

    def __init__(self, max_entries: int = 64) -> None:
        self.max_entries = max_entries
        self.values: dict[tuple[Any, ...], tuple[str, Any]] = {}
        self.lock = threading.Lock()

    def get_or_compute(self, key: tuple[Any, ...], version: str, compute: Callable[[], Any]) -> Any:
        """Return the key's value at this version."""
        with self.lock:
            cached = self.values.pop(key, None)
        value = cached[1] if cached and cached[0] == version else compute()
        with self.lock:
            self.values[key] = (version, value)  # most recently used last
            while len(self.values) > self.max_entries:
                oldest_key = next(iter(self.values))
                del self.values[oldest_key]
        return value
