"""A ledger for the console to show."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.ledger.ledger import Ledger
from tests.server.dashboard.console_client import add_run


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """A ledger with one run that has just started."""
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    add_run(ledger, "r")
    return ledger
