"""Pages that change by themselves: server-sent events that say *that* the ledger has grown; the page then fetches itself anew."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import sqlalchemy as sa
from starlette.requests import Request

from server import tables
from server.ledger import Ledger

EVERY, LONGEST = 1.0, 600.0  # seconds between two looks; of one connection: the browser then asks again, and is let in again or not
GROWING = (tables.progress, tables.events, tables.rounds, tables.audit, tables.scores)


def version(ledger: Ledger, run: str = "") -> str:
    """Another text whenever something was written, about this run or any."""
    of = [sa.select(sa.func.max(t.c.id)).where(*([t.c.run == run] if run else [])).scalar_subquery().label(t.name) for t in GROWING]
    (row,) = ledger.read(sa.select(*of))
    return "-".join(str(value or 0) for value in row.values())


async def changes(request: Request, ledger: Ledger, run: str, seen: str) -> AsyncIterator[str]:
    """An event for each change after the version that the page shows (`seen`), a comment now and then so that proxies keep the line."""
    until, told = time.monotonic() + LONGEST, time.monotonic()
    yield "retry: 2000\n\n"
    while time.monotonic() < until and not await request.is_disconnected():
        now = await anyio.to_thread.run_sync(version, ledger, run)
        if now != seen:
            seen, told = now, time.monotonic()
            yield f"data: {now}\n\n"
        elif time.monotonic() > told + 15:
            told = time.monotonic()
            yield ": still here\n\n"
        await anyio.sleep(EVERY)


class Kept:
    """What a page computed, as long as the version it was computed from is the present one: finished runs are read once."""

    def __init__(self, most: int = 64) -> None:
        self.most = most
        self.values: dict[tuple[Any, ...], tuple[str, Any]] = {}
        self.lock = threading.Lock()

    def of(self, key: tuple[Any, ...], version: str, make: Callable[[], Any]) -> Any:
        """The value of this key at this version."""
        with self.lock:
            known = self.values.pop(key, None)
        value = known[1] if known and known[0] == version else make()
        with self.lock:
            self.values[key] = (version, value)  # the latest last
            while len(self.values) > self.most:
                del self.values[next(iter(self.values))]
        return value
