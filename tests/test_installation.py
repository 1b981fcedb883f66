"""Installing and starting beside other projects whose packages have the same names."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("package", ["client", "server"])
def test_foreign_common_is_reported_at_the_start(package: str, tmp_path: Path) -> None:
    (tmp_path / "common").mkdir()
    (tmp_path / "common" / "__init__.py").write_text("")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    started = subprocess.run(
        [sys.executable, "-c", f"import {package}.cli"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert started.returncode == 1
    last_line = started.stderr.strip().splitlines()[-1]
    assert (
        f"another project's package 'common' ({tmp_path}/common/__init__.py) comes before Consilium's"
        in last_line
    )


def test_installation_that_copies_packages_is_refused(tmp_path: Path) -> None:
    built = subprocess.run(
        [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert built.returncode == 1
    assert "pip install -e ." in built.stderr
    assert not list(tmp_path.rglob("*.py"))
