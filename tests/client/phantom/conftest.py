"""The smallest made-up hospitals, written once for each test module."""

from __future__ import annotations

from pathlib import Path

import pytest

from client.phantom.federation import write_federation
from tests.client.phantom.tiny_federation import TINY


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("federation")
    write_federation(root, TINY)
    return root
