"""Pages that change by themselves: server-sent events that say *that* the ledger has grown; the page then fetches itself anew."""

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

POLL_INTERVAL, MAX_CONNECTION_TIME = (
    1.0,
    600.0,
)  # seconds between two looks; of one connection: the browser then asks again, and is let in again or not
WATCHED_TABLES = (tables.progress, tables.events, tables.rounds, tables.audit, tables.scores)


def ledger_version(ledger: Ledger, run_id: str = "") -> str:
    """Another text whenever something was written, about this run or any."""
    of = [
        sa.select(sa.func.max(t.c.id))
        .where(*([t.c.run == run_id] if run_id else []))
        .scalar_subquery()
        .label(t.name)
        for t in WATCHED_TABLES
    ]
    (row,) = ledger.read(sa.select(*of))
    return "-".join(str(value or 0) for value in row.values())


async def stream_changes(
    request: Request, ledger: Ledger, run_id: str, seen_version: str
) -> AsyncIterator[str]:
    """An event for each change after the version that the page shows (`seen`), a comment now and then so that proxies keep the line."""
    until, told = time.monotonic() + MAX_CONNECTION_TIME, time.monotonic()
    yield "retry: 2000\n\n"
    while time.monotonic() < until and not await request.is_disconnected():
        now = await anyio.to_thread.run_sync(ledger_version, ledger, run_id)
        if now != seen_version:
            seen_version, told = now, time.monotonic()
            yield f"data: {now}\n\n"
        elif time.monotonic() > told + 15:
            told = time.monotonic()
            yield ": still here\n\n"
        await anyio.sleep(POLL_INTERVAL)


class VersionedCache:
    """What a page computed, as long as the version it was computed from is the present one: finished runs are read once."""

    def __init__(self, max_entries: int = 64) -> None:
        self.max_entries = max_entries
        self.values: dict[tuple[Any, ...], tuple[str, Any]] = {}
        self.lock = threading.Lock()

    def get_or_compute(self, key: tuple[Any, ...], version: str, compute: Callable[[], Any]) -> Any:
        """The value of this key at this version."""
        with self.lock:
            known = self.values.pop(key, None)
        value = known[1] if known and known[0] == version else compute()
        with self.lock:
            self.values[key] = (version, value)  # the latest last
            while len(self.values) > self.max_entries:
                del self.values[next(iter(self.values))]
        return value
