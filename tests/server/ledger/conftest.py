"""The address of an empty database: SQLite, and PostgreSQL where its server is installed."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(params=["sqlite", "postgresql"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/new folder/ledger.db"
    address: str = request.getfixturevalue("postgresql")
    return address
