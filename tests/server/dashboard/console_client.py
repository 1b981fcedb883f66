"""A person at the console, and a long run for them to look at."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from starlette.testclient import TestClient

from common.config.compose import compose_config, config_to_dict
from server.dashboard import accounts
from server.dashboard.app import create_app
from server.dashboard.auth import ProxyTrust
from server.dashboard.launcher import Launcher
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


@cache
def config(*overrides: str) -> dict[str, Any]:
    return config_to_dict(compose_config(["tasks.source.classes=[a,b]", *overrides]))


def started(ledger: Ledger, run: str, *overrides: str) -> None:
    ledger.add_run(
        run, recipe="multisource", mode="federated", config=config(*overrides), code_fingerprint="0123456789abcdef"
    )


def browser(
    ledger: Ledger,
    address: str = "10.1.2.3",
    trust: ProxyTrust | None = None,
    secure: bool = False,
    runs: Path | None = None,
) -> TestClient:
    runs = runs or Path(str(ledger._engine.url.database)).parent
    app = create_app(ledger, runs, Launcher(runs, ""), trust or ProxyTrust(), secure)
    return TestClient(
        app,
        base_url="https://console" if secure else "http://console",
        client=(address, 50000),
        follow_redirects=False,
    )


def logged_in(ledger: Ledger, role: str = "operator", **how: Any) -> TestClient:
    client = browser(ledger, **how)
    password = accounts.create_account(ledger, role, role, "the test")
    assert client.post("/login", data={"name": role, "password": password}).status_code == 303
    return client


def token(client: TestClient) -> str:
    return re.search(r'name="csrf" value="([^"]+)"', client.get("/accounts").text)[1]  # type: ignore[index]


def many(ledger: Ledger, run: str, centres: tuple[str, ...], rounds: int) -> None:
    """Rounds as the coordinator writes them, in few transactions."""
    draws = np.random.default_rng(1)
    began = datetime.now(UTC) - timedelta(seconds=30 * rounds)
    named = (
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
    for first in range(0, rounds + 1, 100):
        rows: dict[str, list[dict[str, Any]]] = {
            "rounds": [],
            "contributions": [],
            "group_weights": [],
            "scores": [],
            "progress": [],
        }
        for r in range(first, min(first + 100, rounds + 1)):
            at, when = (
                {"run_id": run, "stage": "main", "round": r, "attempt": 1},
                began + timedelta(seconds=30 * r),
            )
            rows["rounds"].append({**at, "started": when, "seconds": 30.0, "close_reason": "all replied"})
            values = {
                c: {m: float(v) for m, v in zip(named, draws.random(len(named)), strict=True)}
                | {"n": 40.0, "positives": 20.0}
                for c in centres
            }
            scored = {c: {"metrics": of, "loss": of["loss"], "reasons": {}} for c, of in values.items()}
            worst = min(values, key=lambda c: values[c]["auc"])
            macro = {m: float(np.mean([values[c][m] for c in centres])) for m in named}
            views = {
                "macro": macro,
                "pooled": macro,
                "spread": macro,
                "worst": {"auc": {"value": values[worst]["auc"], "centre": worst}},
            }
            rows["scores"] += [
                {**at, "split": "val", "task": t, "summaries": views, "centres": scored}
                for t in ("covid", "source")
            ]
            rows["progress"].append(
                {
                    "run_id": run,
                    "time": when,
                    "stage": "main",
                    "round": r,
                    "activity": "train",
                    "asked_centres": list(centres),
                }
                | NOBODY
            )
            if r:
                share = dict.fromkeys(centres, 1 / len(centres))
                rows["group_weights"] += [
                    {**at, "group": part, "effective_centres": float(len(centres)), "centre_weights": share}
                    for part in ("backbone", "covid", "source")
                ]
                for c in centres:
                    said = {
                        "accepted": True,
                        "reason": "",
                        "scans": 80,
                        "steps": 8,
                        "norm": 1.0,
                        "loss": 0.5,
                        "epsilon": None,
                        "seconds": 20.0,
                    }
                    rows["contributions"].append(
                        {**at, "centre": c, **said, "bytes_up": 6_000_000, "bytes_down": 24_000_000}
                    )
            for doing in ("train", "scores"):
                told = {"run_id": run, "time": when, "stage": "main", "round": r, "activity": doing, "asked_centres": None}
                rows["progress"] += [
                    {
                        **told,
                        "centre": c,
                        "seconds": 20.0,
                        "reason": None,
                        "bytes_up": 6_000_000,
                        "bytes_down": 24_000_000,
                    }
                    for c in centres
                ]
        with ledger.transaction() as database:
            for name, these in rows.items():
                if these:
                    database.execute(tables.schema.tables[name].insert(), these)


NOBODY = {"centre": None, "seconds": None, "reason": None, "bytes_up": None, "bytes_down": None}
