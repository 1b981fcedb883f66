"""The list of mutants fits the source, and the harness tells a noticed change from one that is not."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.tools.mutants import Mutant, find_failing_tests, find_stale_mutants, find_survivors, load_mutants

SOURCE = "def double(number: int) -> int:\n    return number * 2 + 0\n"
TESTS = "from doubling import double\n\n\ndef test_double() -> None:\n    assert double(3) == 6\n"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository of one function and its test."""
    (tmp_path / "doubling.py").write_text(SOURCE)
    (tmp_path / "test_doubling.py").write_text(TESTS)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    subprocess.run(["git", "add", "."], cwd=tmp_path, check=True)
    return tmp_path


def make_mutant(old: str, new: str) -> Mutant:
    """Return a change of the function."""
    return Mutant("doubling.py", old, new, ["test_doubling.py"])


def test_every_listed_mutant_fits_the_source() -> None:
    assert find_stale_mutants(load_mutants()) == []


def test_only_the_change_that_no_test_notices_survives(checkout: Path) -> None:
    noticed = make_mutant("* 2", "* 3")
    unnoticed = make_mutant("+ 0", "- 0")
    assert find_failing_tests([noticed], checkout) == []
    (survivor,) = find_survivors([noticed, unnoticed], checkout)
    assert survivor == f"{unnoticed.describe()}: the tests passed"
    assert (checkout / "doubling.py").read_text() == SOURCE


def test_change_that_cannot_be_imported_proves_nothing(checkout: Path) -> None:
    (survivor,) = find_survivors([make_mutant("def double(", "def (")], checkout)
    assert survivor.endswith("the tests broken")


def test_mutant_that_does_not_fit_is_named(checkout: Path) -> None:
    (fault,) = find_stale_mutants([make_mutant("number", "x")], checkout)
    assert "stands 2 times" in fault
