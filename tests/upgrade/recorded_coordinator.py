"""The coordinator's folder as 0.1.0 left it, before and after the upgrade."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from server.operations.upgrade import upgrade_coordinator


@pytest.fixture
def runs(recorded: Path) -> Path:
    """The coordinator's folder of results, with its ledger."""
    return recorded / "coordinator/runs"


@pytest.fixture
def upgraded(runs: Path) -> Path:
    """The same after the upgrade."""
    list(upgrade(runs))
    return runs


def upgrade(runs: Path) -> Iterator[str]:
    address = f"sqlite:///{runs}/ledger.db"
    return upgrade_coordinator(runs, address, address, leave_unfinished=True)


def read_json(path: Path) -> dict[str, object]:
    values: dict[str, object] = json.loads(path.read_text())
    return values


def count_rows(path: Path, table: str) -> int:
    with sqlite3.connect(path) as database:
        (count,) = database.execute(f"SELECT count(*) FROM {table}").fetchone()
    return int(count)
