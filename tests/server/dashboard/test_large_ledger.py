"""A long run of many centres: how fast it is shown, and how large its pages are."""

from __future__ import annotations

import time

import pytest
from starlette.testclient import TestClient

from server.ledger.ledger import Ledger
from tests.server.dashboard.console_client import PAGES, logged_in, many, started


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    """A hundred centres, a thousand rounds, and twenty other runs."""
    ledger = Ledger(f"sqlite:///{tmp_path_factory.mktemp('long') / 'ledger.db'}")
    centres = tuple(f"centre{k:03d}" for k in range(100))
    for k in range(20):
        started(ledger, f"other{k}")
        ledger.log_event(f"other{k}", "finished")
    started(ledger, "r", f"federation.centres=[{','.join(centres)}]", "stage.rounds=2000")
    for c in centres:
        held = {
            f"{c}/{split}/{task}": [40.0, 40.0, 0.0]
            for split in ("train", "val", "test")
            for task in ("covid", "source")
        }
        ledger.add_centre(
            "r",
            c,
            {"counts": held, "sources": [c], "versions": {"torch": "2"}, "skipped": {}, "device": "cpu"},
        )
    many(ledger, "r", centres, 1000)
    return ledger


@pytest.mark.slow
@pytest.mark.parametrize("path", [*PAGES, "/metrics"])
def test_a_hundred_centres_and_a_thousand_rounds(long: Ledger, path: str) -> None:
    """In less than 300 ms, also when the ledger has just grown, and in a page that a browser can hold."""
    client = logged_in(long)
    client.get(path)  # templates are compiled once
    grown = []
    for _ in range(3):
        long.log_event("r", "left_out", "no reply within 3600 s", "centre007")
        grown.append(timed(client, path))
    kept = timed(client, path)
    size = len(client.get(path).content)
    print(f"{path}: {1000 * min(grown):.0f} ms, unchanged {1000 * kept:.0f} ms, {size / 1e3:.0f} kB")
    assert min(grown) < 0.3
    assert size < 1.5e6


def timed(client: TestClient, path: str) -> float:
    """CPU seconds, as other processes share this machine's cores."""
    began = time.process_time()
    assert client.get(path).status_code == 200
    return time.process_time() - began
