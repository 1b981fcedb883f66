"""Break the code on purpose, one small change at a time, and see that a test notices each.

``python -m tests.tools.mutants`` reads ``mutants.yaml`` beside this file. Each entry names a source file, a
text that stands in it exactly once, what replaces it, and the tests that must fail then. The changes are made
in a copy of the checkout. The command ends with 1 where a mutant survives, and names it.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import pytest
import typer
import yaml
from pydantic import TypeAdapter
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

ROOT = Path(__file__).resolve().parents[2]
MUTANTS_PATH = Path(__file__).with_name("mutants.yaml")
TEST_TIMEOUT = 600.0  # seconds; a change that makes a test hang is noticed, too
# Imported once, before the processes of the mutants are forked: they take longer than most tests.
HEAVY_MODULES = ("torch", "timm", "pandas", "opacus", "sqlalchemy", "fastapi", "hypothesis", "scipy.stats")
console = Console(width=max(Console().width, 110))


class Verdict(StrEnum):
    """What the tests said about a checkout."""

    PASSED = "passed"
    FAILED = "failed"
    BROKEN = "broken"  # a test could not be collected, so it said nothing


@dataclass(frozen=True)
class Mutant:
    """A change of the source that some test must notice."""

    file: str  # relative to the root of the checkout
    old: str  # stands in the file exactly once
    new: str
    tests: list[str]  # as pytest takes them
    why: str = ""  # what goes wrong with the change

    def describe(self) -> str:
        """Return the file and the change on one line."""
        old = " ".join(self.old.split())
        new = " ".join(self.new.split())
        return f"{self.file}: {old!r} -> {new!r}"


def load_mutants(path: Path = MUTANTS_PATH) -> list[Mutant]:
    """Read the list of mutants. Raises pydantic.ValidationError for an entry with wrong fields."""
    return TypeAdapter(list[Mutant]).validate_python(yaml.safe_load(path.read_text()))


def find_stale_mutants(mutants: Sequence[Mutant], root: Path = ROOT) -> list[str]:
    """Return a sentence for each mutant that does not fit the source any more."""
    faults = []
    for mutant in mutants:
        path = root / mutant.file
        if not path.is_file():
            faults.append(f"{mutant.file} does not exist")
            continue
        count = path.read_text().count(mutant.old)
        if count != 1:
            faults.append(f"{mutant.describe()}: the old text stands {count} times in the file, not once")
        for test in mutant.tests:
            if not (root / test.partition("::")[0]).exists():
                faults.append(f"{mutant.describe()}: {test} does not exist")
    return faults


def copy_checkout(root: Path, target: Path) -> None:
    """Copy the files that git knows."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=root, capture_output=True, check=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        source = root / name
        if source.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name)


def run_tests(checkout: Path, tests: Sequence[str]) -> Verdict:
    """Run tests of a checkout in a process of their own."""
    process = multiprocessing.get_context("fork").Process(target=_run_pytest, args=(checkout, list(tests)))
    process.start()
    process.join(TEST_TIMEOUT)
    if process.is_alive():
        process.kill()
        process.join()
        return Verdict.FAILED
    if process.exitcode == pytest.ExitCode.OK:
        return Verdict.PASSED
    return Verdict.FAILED if process.exitcode == pytest.ExitCode.TESTS_FAILED else Verdict.BROKEN


def _run_pytest(checkout: Path, tests: list[str]) -> None:
    os.chdir(checkout)
    sys.path.insert(0, os.fspath(checkout))
    sys.dont_write_bytecode = True  # two versions of a file within a second would be taken for the same
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    os.environ["PYTHONPATH"] = os.fspath(checkout)  # processes that the tests start import the copy as well
    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)
    os.dup2(silence, 2)
    options = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    os._exit(int(pytest.main([*options, *tests])))


def judge_mutant(checkout: Path, mutant: Mutant) -> Verdict:
    """Make a change, run its tests, and undo it."""
    path = checkout / mutant.file
    original = path.read_text()
    path.write_text(original.replace(mutant.old, mutant.new))
    try:
        return run_tests(checkout, mutant.tests)
    finally:
        path.write_text(original)


def find_survivors(mutants: Sequence[Mutant], root: Path = ROOT) -> list[str]:
    """Return a sentence for each mutant that its tests did not notice."""
    survivors = []
    columns = (TextColumn("{task.description}"), MofNCompleteColumn(), TimeRemainingColumn())
    with tempfile.TemporaryDirectory() as folder, Progress(*columns, console=console) as progress:
        checkout = Path(folder)
        copy_checkout(root, checkout)
        task = progress.add_task("mutants", total=len(mutants))
        for mutant in mutants:
            verdict = judge_mutant(checkout, mutant)
            progress.advance(task)
            if verdict != Verdict.FAILED:
                survivors.append(f"{mutant.describe()}: the tests {verdict}")
                console.print(f"survived  {survivors[-1]}")
    return survivors


def find_failing_tests(mutants: Sequence[Mutant], root: Path = ROOT) -> list[str]:
    """Return the tests that do not pass on the unchanged source: they would notice everything."""
    failing = []
    with tempfile.TemporaryDirectory() as folder:
        checkout = Path(folder)
        copy_checkout(root, checkout)
        for test in dict.fromkeys(test for mutant in mutants for test in mutant.tests):
            if run_tests(checkout, [test]) != Verdict.PASSED:
                failing.append(test)
    return failing


def main(
    match: Annotated[str, typer.Option(help="Only mutants whose file contains this text.")] = "",
) -> None:
    """Change the source as mutants.yaml says, and see that the tests notice every change."""
    mutants = [mutant for mutant in load_mutants() if match in mutant.file]
    faults = find_stale_mutants(mutants)
    for module in HEAVY_MODULES:
        importlib.import_module(module)
    if not faults:
        faults = [f"{test} fails on the unchanged source" for test in find_failing_tests(mutants)]
    if not faults:
        faults = find_survivors(mutants)
    for fault in faults:
        console.print(fault)
    console.print(f"{len(mutants)} mutants, {len(faults)} faults")
    raise typer.Exit(1 if faults else 0)


if __name__ == "__main__":
    typer.run(main)
