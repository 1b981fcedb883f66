"""A long run of many centres: how fast the console shows it, and how large its pages are."""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Callable

import pytest

from server.ledger.ledger import Ledger
from tests.server.dashboard.console_client import PAGES, add_rounds, add_run, log_in_as

# A page's CPU time in units of a fixed piece of work that the same process does just before. A quiet machine
# needs at most a third of it, also when this machine is slower.
MAX_REFERENCE_UNITS = 75
MAX_PAGE_BYTES = 1.5e6


@pytest.fixture(scope="module")
def large_ledger(tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    """A hundred centres, a thousand rounds, and twenty other runs."""
    ledger = Ledger(f"sqlite:///{tmp_path_factory.mktemp('large') / 'ledger.db'}")
    centres = tuple(f"centre{index:03d}" for index in range(100))
    for index in range(20):
        add_run(ledger, f"other{index}")
        ledger.log_event(f"other{index}", "finished")
    add_run(ledger, "r", f"federation.centres=[{','.join(centres)}]", "stage.rounds=2000")
    for centre in centres:
        counts = {}
        for split in ("train", "val", "test"):
            for task in ("covid", "source"):
                counts[f"{centre}/{split}/{task}"] = [40.0, 40.0, 0.0]
        report = {
            "counts": counts,
            "sources": [centre],
            "versions": {"torch": "2"},
            "skipped": {},
            "device": "cpu",
        }
        ledger.add_centre("r", centre, report)
    add_rounds(ledger, "r", centres, 1000)
    return ledger


@pytest.mark.slow
@pytest.mark.parametrize("path", [*PAGES, "/metrics"])
def test_pages_of_a_large_run_are_fast_and_small(large_ledger: Ledger, path: str) -> None:
    """The time limit also holds when the ledger has just grown."""
    client = log_in_as(large_ledger)
    client.get(path)  # compiles the template

    def get_page() -> None:
        assert client.get(path).status_code == 200

    units_after_growth = []
    for _ in range(3):
        large_ledger.log_event("r", "left_out", "no reply within 3600 s", "centre007")
        reference_seconds = measure_cpu_seconds(do_reference_work)
        units_after_growth.append(measure_cpu_seconds(get_page) / reference_seconds)
    units = min(units_after_growth)
    num_bytes = len(client.get(path).content)
    print(f"{path}: {units:.1f} x {1000 * reference_seconds:.1f} ms, {num_bytes / 1e3:.0f} kB")
    assert units < MAX_REFERENCE_UNITS
    assert num_bytes < MAX_PAGE_BYTES


def do_reference_work() -> None:
    """Write and read JSON, the kind of work that a page is made of."""
    values = {f"centre{index:04d}": [float(index), index / 7, None, "text"] for index in range(2000)}
    assert len(json.loads(json.dumps(values))) == len(values)


def measure_cpu_seconds(work: Callable[[], None]) -> float:
    """Return the CPU time of some work without garbage collections; other processes share the cores."""
    gc.collect()
    gc.disable()
    try:
        start = time.process_time()
        work()
        return time.process_time() - start
    finally:
        gc.enable()
