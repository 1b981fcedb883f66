"""The folder in which the made-up hospitals of a test module are kept."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("phantom")
