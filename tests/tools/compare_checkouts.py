"""Compare two checkouts bit for bit: the same small runs in both, on one machine, with the same seeds.

    python -m tests.tools.compare_checkouts OLD NEW
    python -m tests.tools.compare_checkouts OLD NEW --only triage,secagg
    python -m tests.tools.compare_checkouts OLD NEW --old-results FOLDER

Each run is started by the commands that an operator types (`consilium-centre phantom`, `consilium-server
simulate` and `resume`), in subprocesses that import the packages of one checkout and write to folders of
their own. Afterwards every tensor of `model.safetensors`, and of the weights that the centres kept to
themselves, is compared: name, data type, shape and bytes. The exit status is 1 when any of them differs or a
run fails.

The overrides of a run are written in the spelling of 0.1.0, which OLD is expected to understand. For NEW they
are translated by its own `common/config/renamed_keys.py`; where it has none, they stay as they are.

Noise of differential privacy comes from the operating system and follows no seed, so no such run is in the
list.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from tests.tools.checkout_side import ComparisonError, Side, Tensors, console, load_renames
from tests.tools.compared_runs import RUNS, RunSpec


@dataclass(frozen=True)
class Difference:
    """How the tensors of one run differ between two checkouts."""

    count: int  # of tensors, on either side
    differing: list[str]
    largest: float  # absolute; infinite where a tensor is missing or has another shape


def compare_tensors(old: Tensors, new: Tensors) -> Difference:
    """Compare names, data types, shapes and bytes. A tensor that only one side has differs."""
    names = sorted(old.keys() | new.keys())
    differing = [name for name in names if not _are_equal(old.get(name), new.get(name))]
    gaps = [_find_largest_gap(old.get(name), new.get(name)) for name in differing]
    return Difference(len(names), differing, max(gaps, default=0.0))


def _are_equal(old: NDArray[np.generic] | None, new: NDArray[np.generic] | None) -> bool:
    if old is None or new is None:
        return False
    return old.dtype == new.dtype and old.shape == new.shape and old.tobytes() == new.tobytes()


def _find_largest_gap(old: NDArray[np.generic] | None, new: NDArray[np.generic] | None) -> float:
    if old is None or new is None or old.shape != new.shape:
        return float("inf")
    return float(np.max(np.abs(old.astype(np.float64) - new.astype(np.float64)), initial=0.0))


def print_table(specs: Sequence[RunSpec], old: Side, new: Side) -> bool:
    """Print a row for each run, and names of tensors that differ. Returns whether all are equal."""
    table = Table("run", "tensors", "equal", "largest difference", "seconds, old", "seconds, new")
    old_records, new_records = old.read_records(), new.read_records()
    all_equal = True
    sentences = []
    for spec in specs:
        difference = compare_tensors(old.read_tensors(spec), new.read_tensors(spec))
        seconds = [f"{records[spec.name].seconds:.0f}" for records in (old_records, new_records)]
        equal = str(difference.count - len(difference.differing))
        table.add_row(spec.name, str(difference.count), equal, f"{difference.largest:.3g}", *seconds)
        if difference.differing or not difference.count:
            all_equal = False
            shown = ", ".join(difference.differing[:5])
            sentences.append(f"{spec.name}: {len(difference.differing)} tensors differ, among them {shown}")
    console.print(table)
    for sentence in sentences:
        console.print(sentence, markup=False, highlight=False)
    return all_equal


def choose_runs(names: str) -> list[RunSpec]:
    """Return the runs of these names (separated by commas), in the list's order; all for an empty text."""
    chosen = {name for name in names.split(",") if name}
    unknown = chosen - {spec.name for spec in RUNS}
    if unknown:
        valid = ", ".join(spec.name for spec in RUNS)
        raise ComparisonError(f"there is no run {', '.join(sorted(unknown))}; valid: {valid}")
    return [spec for spec in RUNS if not chosen or spec.name in chosen]


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("old", type=Path, help="the checkout before the change")
    parser.add_argument("new", type=Path, help="the checkout after it")
    parser.add_argument("--old-results", type=Path, help="keep the old side's results here, and reuse them")
    parser.add_argument("--new-results", type=Path, help="the same for the new side")
    parser.add_argument("--only", default="", help="names of runs, separated by commas; default: all")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Execute the runs on both sides, compare them, and return the exit status."""
    options = parse_arguments(arguments)
    with tempfile.TemporaryDirectory(prefix="compare-", ignore_cleanup_errors=True) as temporary:
        work = Path(temporary)
        try:
            specs = choose_runs(options.only)
            renames = load_renames(options.new)
            old = Side(options.old, work / "old", options.old_results or work / "old_results", {})
            new = Side(options.new, work / "new", options.new_results or work / "new_results", renames)
            for side in (old, new):
                side.run_all(specs, options.jobs)
        except ComparisonError as error:
            console.print(f"error: {error}", markup=False, highlight=False)
            return 1
        return 0 if print_table(specs, old, new) else 1


if __name__ == "__main__":
    sys.exit(main())
