"""Pages of a ledger from before replies were validated, which may hold anything that a centre sent."""

from __future__ import annotations

from typing import Any

import pytest

from server.ledger.ledger import Ledger
from tests.server.dashboard.console_client import CENTRES, PAGES, add_rounds, log_in_as

FIELDS = ("counts", "scans", "skipped", "sources", "versions", "device", "policy")
ODD_VALUES: list[Any] = [
    None,
    -1,
    10**400,
    "<script>alert(1)</script>",
    ["a", ["b"]],
    [None, 3],
    {"a": {"b": "c"}},
    {"north/train/covid": [1.0, 2.0], "north/val/covid": [1.0]},
    {"north/train/covid": "x", "": [1]},
    {"epsilon": "much", "labels": [["covid"]]},
    {"epsilon": {"a": 1}},
]


@pytest.mark.parametrize("value", ODD_VALUES, ids=range(len(ODD_VALUES)))
def test_pages_survive_what_is_in_the_ledger(ledger: Ledger, value: Any) -> None:
    good = {"counts": {"east/train/covid": [1.0, 2.0, 0.0]}, "sources": ["a"], "policy": {"epsilon": 3.0}}
    ledger.add_centre("r", "east", good)
    ledger.add_centre("r", "north", dict.fromkeys(FIELDS, value))
    for number, field in enumerate(FIELDS):
        ledger.add_centre("r", f"north{number}", {field: value})
    ledger.log_event("r", "left_out", "<script>alert(1)</script>" * 1000, "north\x1b[31m")
    add_rounds(ledger, "r", CENTRES, 2)
    client = log_in_as(ledger)
    for path in (*PAGES, "/metrics"):
        response = client.get(path)
        assert response.status_code == 200, path
        assert "<script>alert" not in response.text
    assert "north reported values that are not valid and are not shown: counts" in client.get("/").text
