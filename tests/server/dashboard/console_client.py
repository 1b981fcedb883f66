"""Clients of the console, and a ledger with a run of any length to show."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from starlette.testclient import TestClient

from common.config.compose import compose_config
from common.config.parse import config_to_dict
from server.dashboard import accounts
from server.dashboard.app import create_app
from server.dashboard.launcher import Launcher
from server.dashboard.proxy_trust import ProxyTrust
from server.ledger import tables
from server.ledger.ledger import Ledger

CENTRES = ("north", "east", "south", "west")
PAGES = (
    "/",
    "/runs",
    "/runs/r",
    "/runs/r/learning",
    "/runs/r/privacy",
    "/runs/r/data",
    "/runs/r/evidence",
    "/audit",
    "/accounts",
)
ROUND_SECONDS = 30
ROUNDS_PER_TRANSACTION = 100
TASKS = ("covid", "source")
PARAMETER_GROUPS = ("backbone", "covid", "source")
METRICS = (
    "auc",
    "f1",
    "sensitivity",
    "specificity",
    "balanced_accuracy",
    "accuracy",
    "ece",
    "brier",
    "loss",
)
BYTES_UP = 6_000_000
BYTES_DOWN = 24_000_000
Rows = list[dict[str, Any]]


@cache
def compose_settings(*overrides: str) -> dict[str, Any]:
    """Return a run's configuration as the ledger keeps it."""
    return config_to_dict(compose_config(["tasks.source.classes=[a,b]", *overrides]))


def add_run(ledger: Ledger, run_id: str, *overrides: str, mode: str = "federated") -> None:
    """Write a run that has just started."""
    ledger.add_run(
        run_id,
        recipe="multisource",
        mode=mode,
        config=compose_settings(*overrides),
        code_fingerprint="0123456789abcdef",
    )


def open_console(
    ledger: Ledger,
    address: str = "10.1.2.3",
    trust: ProxyTrust | None = None,
    is_https: bool = False,
    runs: Path | None = None,
) -> TestClient:
    """Return a client at `address` that has not logged in."""
    runs = runs or Path(str(ledger._engine.url.database)).parent
    app = create_app(ledger, runs, Launcher(runs, ""), trust or ProxyTrust(), is_https)
    return TestClient(
        app,
        base_url="https://console" if is_https else "http://console",
        client=(address, 50000),
        follow_redirects=False,
    )


def log_in_as(ledger: Ledger, role: str = "operator", **options: Any) -> TestClient:
    """Return a client that has logged in; its account is named after its role."""
    client = open_console(ledger, **options)
    password = accounts.create_account(ledger, role, role, "the test")
    assert client.post("/login", data={"name": role, "password": password}).status_code == 303
    return client


def read_csrf_token(client: TestClient) -> str:
    """Return the token that the session's forms carry."""
    match = re.search(r'name="csrf" value="([^"]+)"', client.get("/accounts").text)
    assert match
    return match[1]


def add_rounds(ledger: Ledger, run_id: str, centres: tuple[str, ...], num_rounds: int) -> None:
    """Write rounds as the coordinator does, but in few transactions."""
    rng = np.random.default_rng(1)
    start = datetime.now(UTC) - timedelta(seconds=ROUND_SECONDS * num_rounds)
    for first in range(0, num_rounds + 1, ROUNDS_PER_TRANSACTION):
        rows: dict[str, Rows] = {}
        for number in range(first, min(first + ROUNDS_PER_TRANSACTION, num_rounds + 1)):
            key = {"run_id": run_id, "stage": "main", "round": number}
            time = start + timedelta(seconds=ROUND_SECONDS * number)
            for table_name, table_rows in make_round_rows(key, time, centres, rng).items():
                rows.setdefault(table_name, []).extend(table_rows)
        with ledger.transaction() as database:
            for table_name, table_rows in rows.items():
                database.execute(tables.schema.tables[table_name].insert(), table_rows)


def make_round_rows(
    key: dict[str, Any], time: datetime, centres: tuple[str, ...], rng: np.random.Generator
) -> dict[str, Rows]:
    """Return {table: rows} of one round; round 0 is scored but not trained."""
    attempt_key = key | {"attempt": 1}
    round_row = {"started": time, "seconds": float(ROUND_SECONDS), "close_reason": "all replied"}
    rows = {
        "rounds": [attempt_key | round_row],
        "scores": make_score_rows(attempt_key, centres, rng),
        "progress": make_progress_rows(key, time, centres),
    }
    if key["round"]:
        rows["group_weights"] = make_weight_rows(attempt_key, centres)
        rows["contributions"] = make_contribution_rows(attempt_key, centres)
    return rows


def make_score_rows(key: dict[str, Any], centres: tuple[str, ...], rng: np.random.Generator) -> Rows:
    """Return random scores on validation; both tasks have the same."""
    values = {}
    for centre in centres:
        metrics = dict(zip(METRICS, rng.random(len(METRICS)).tolist(), strict=True))
        values[centre] = metrics | {"n": 40.0, "positives": 20.0}
    scores = {}
    for centre, metrics in values.items():
        scores[centre] = {"metrics": metrics, "loss": metrics["loss"], "reasons": {}}
    worst = min(values, key=lambda centre: values[centre]["auc"])
    means = {name: float(np.mean([values[centre][name] for centre in centres])) for name in METRICS}
    summaries = {
        "macro": means,
        "pooled": means,
        "spread": means,
        "worst": {"auc": {"value": values[worst]["auc"], "centre": worst}},
    }
    content = {"split": "val", "summaries": summaries, "centres": scores}
    return [key | content | {"task": task} for task in TASKS]


def make_weight_rows(key: dict[str, Any], centres: tuple[str, ...]) -> Rows:
    """Return equal weights for all centres."""
    weights = dict.fromkeys(centres, 1 / len(centres))
    content = {"effective_centres": float(len(centres)), "centre_weights": weights}
    return [key | content | {"group": group} for group in PARAMETER_GROUPS]


def make_contribution_rows(key: dict[str, Any], centres: tuple[str, ...]) -> Rows:
    """Return an accepted contribution of every centre."""
    content = {
        "accepted": True,
        "reason": "",
        "scans": 80,
        "steps": 8,
        "norm": 1.0,
        "loss": 0.5,
        "epsilon": None,
        "seconds": 20.0,
        "bytes_up": BYTES_UP,
        "bytes_down": BYTES_DOWN,
    }
    return [key | content | {"centre": centre} for centre in centres]


def make_progress_rows(key: dict[str, Any], time: datetime, centres: tuple[str, ...]) -> Rows:
    """Return a training request and every centre's replies to it and to the scoring."""
    no_reply = {"centre": None, "seconds": None, "reason": None, "bytes_up": None, "bytes_down": None}
    request = {"time": time, "activity": "train", "asked_centres": list(centres)}
    rows = [key | request | no_reply]
    reply = {"seconds": 20.0, "reason": None, "bytes_up": BYTES_UP, "bytes_down": BYTES_DOWN}
    for activity in ("train", "scores"):
        for centre in centres:
            about = {"time": time, "activity": activity, "asked_centres": None, "centre": centre}
            rows.append(key | about | reply)
    return rows
