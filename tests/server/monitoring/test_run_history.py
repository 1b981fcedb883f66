"""Reading a run's past from the ledger: rounds that were read once are not read again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sqlalchemy as sa

from server.ledger import tables
from server.ledger.ledger import Ledger
from server.monitoring.run_history import RoundCache, load_rounds
from tests.server.dashboard.console_client import add_rounds, add_run, make_round_rows

CENTRES = ("north", "east")


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """A ledger with a run of rounds 0 to 5."""
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    add_run(ledger, "r")
    add_rounds(ledger, "r", CENTRES, 5)
    return ledger


def close_round(ledger: Ledger, number: int, attempt: int = 1) -> None:
    """Write a round, or another attempt of it, whose scores differ from all others."""
    key = {"run_id": "r", "stage": "main", "round": number}
    started = ledger.read_rounds("r")[0]["started"]
    rows = make_round_rows(key, started, CENTRES, np.random.default_rng(100 * attempt + number))
    with ledger.transaction() as connection:
        for table_name, table_rows in rows.items():
            table = tables.schema.tables[table_name]
            if "attempt" in table.c:
                table_rows = [row | {"attempt": attempt} for row in table_rows]
            connection.execute(table.insert(), table_rows)


def count_rows_read(ledger: Ledger, monkeypatch: pytest.MonkeyPatch, cache: RoundCache) -> int:
    """Return how many rows of the tables with one row a centre or task are read for the rounds."""
    counts = []
    read = Ledger.read

    def count_rows(self: Ledger, query: sa.Select[Any]) -> list[dict[str, Any]]:
        rows = read(self, query)
        if "FROM rounds" not in str(query):
            counts.append(len(rows))
        return rows

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "read", count_rows)
        load_rounds(ledger, "r", 60, cache)
    return sum(counts)


def test_only_a_new_round_is_read_when_the_ledger_has_grown(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round has two contributions, three weight groups and two tasks' scores."""
    cache = RoundCache()
    load_rounds(ledger, "r", 60, cache)
    assert count_rows_read(ledger, monkeypatch, cache) == 0
    close_round(ledger, 6)
    assert count_rows_read(ledger, monkeypatch, cache) == 2 + 3 + 2


def test_cached_rounds_are_those_that_a_fresh_reading_finds(ledger: Ledger) -> None:
    """Also of a repeated round, whose last attempt counts, and where every second round is read."""
    cache = RoundCache()
    load_rounds(ledger, "r", 60, cache)
    close_round(ledger, 3, attempt=2)
    close_round(ledger, 6)
    assert load_rounds(ledger, "r", 60, cache) == load_rounds(ledger, "r", 60, RoundCache())
    assert load_rounds(ledger, "r", 4, cache) == load_rounds(ledger, "r", 4, RoundCache())


def test_the_cache_keeps_the_rounds_of_the_last_runs_only() -> None:
    """Rounds of a hundred centres are large."""
    cache = RoundCache(max_runs=2)
    for run_id in ("a", "b", "c"):
        cache.put(run_id, {("main", 1, 1): None})  # type: ignore[dict-item]
    assert [bool(cache.get(run_id)) for run_id in ("a", "b", "c")] == [False, True, True]
