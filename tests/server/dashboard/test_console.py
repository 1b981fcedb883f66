"""The console without a browser: who may see and do what, what the pages tell browsers."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import sqlalchemy as sa

from common.protocol.image_statistics import IMAGE_STATISTICS
from common.utils.errors import ConsiliumError
from server.analysis.image_drift import summarise_histograms
from server.dashboard import accounts
from server.dashboard.auth import ProxyTrust
from server.dashboard.launcher import LaunchedProcess
from server.ledger.audit_trail import first_broken_link
from server.ledger.ledger import ArtifactKind, Ledger
from server.run.outcome import Outcome, write_outcome
from tests.deploy.processes import postgresql
from tests.server.dashboard.console_client import (
    CENTRES,
    PAGES,
    browser,
    config,
    logged_in,
    many,
    started,
    token,
)


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    made = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    started(made, "r")
    return made


def test_nothing_is_to_be_seen_without_a_log_in(ledger: Ledger) -> None:
    client = browser(ledger)
    for path in (*PAGES, "/start", "/runs/r/order/stop", "/runs/r/files/config.yaml", "/compare?run=r&run=r"):
        answer = client.get(path)
        assert (answer.status_code, answer.headers["location"].split("?")[0]) == (303, "/login"), path
    assert client.get("/live").status_code == 401
    assert client.get("/metrics").status_code == 303
    assert client.post("/runs/r/order/stop", data={"why": "because"}).status_code == 303
    assert client.get("/openapi.json").status_code == 404
    assert [e["action"] for e in ledger.read_audit()] == []


def test_every_page_answers_before_anything_has_happened(ledger: Ledger) -> None:
    client = logged_in(ledger)
    for path in (*PAGES, "/start", "/runs/r/order/stop"):
        assert client.get(path).status_code == 200, path
    assert client.get("/runs/none").status_code == 400
    assert client.get("/none").status_code == 404


def test_where_one_site_holds_all_scans_each_cohort_is_shown(ledger: Ledger) -> None:
    """Central mode: one answers, as `pooled`, of four cohorts."""
    ledger.add_run(
        "c",
        recipe="multisource",
        mode="central",
        config=config("federation.mode=central"),
        code_fingerprint="0123456789abcdef",
    )
    bins = {name: len(of.bin_edges) - 1 for name, of in IMAGE_STATISTICS.items()}
    surveyed = {
        f"{c}/quality/{name}": np.roll(np.arange(1.0, n + 1), k)
        for k, c in enumerate(CENTRES)
        for name, n in bins.items()
    }
    statistics = {name: asdict(statistic) for name, statistic in summarise_histograms(surveyed).items()}
    ledger.add_artifact("c", ArtifactKind.IMAGE_STATISTICS, statistics)
    many(ledger, "c", CENTRES, 2)
    client = logged_in(ledger)
    for path in ("/runs/c/data", "/runs/c/learning"):
        drawn = client.get(path).text.partition("<script")[2]
        assert all(f'"name": "{c}"' in drawn or f'"name":"{c}"' in drawn for c in CENTRES), path
    drift = client.get("/runs/c/data").text.partition("<h2>Drift</h2>")[2]
    assert all(f"<span>{c}</span>" in drift for c in CENTRES)


def test_a_run_that_could_not_be_taken_up_says_why(ledger: Ledger, tmp_path: Path) -> None:
    ledger.log_event("r", "paused", "enough for today")
    client = logged_in(ledger)
    launcher = client.app.state.console.launcher  # type: ignore[attr-defined]
    write_outcome(tmp_path, "r", Outcome(False, "the SuperLink cannot be reached"))
    for when, shown in ((datetime.now(UTC), True), (datetime.now(UTC) - timedelta(hours=1), False)):
        process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        launcher.launched["r"] = LaunchedProcess(process, when)
        with pytest.raises(ConsiliumError, match="already being resumed" if shown else "no run 'r'"):
            launcher.resume_run("r", ledger.read_run("r")["since"])  # type: ignore[index]
        process.communicate()  # the end of its input is the end of it, with an error
        assert ("the SuperLink cannot be reached" in client.get("/runs/r").text) is shown


def test_what_browsers_are_told(ledger: Ledger) -> None:
    """Only files of ours, no script or style in the page itself, no frame, no copy; cookies that neither scripts nor other sites get."""
    client = logged_in(ledger, secure=True)
    page = client.get("/runs/r")
    policy = page.headers["content-security-policy"]
    assert "script-src 'self';" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert page.headers["cache-control"] == "no-store"
    assert not re.search(r"<script(?![^>]*(src=|application/json))|\sstyle=|\son\w+=|<style", page.text)
    assert not re.search(r'(?:src|href)="(?:https?:)?//', page.text)
    cookie = client.post(
        "/login",
        data={
            "name": "operator",
            "password": accounts.create_account(ledger, "operator", "operator", "test"),
        },
    ).headers["set-cookie"]
    assert cookie.startswith("__Host-consilium=")
    assert {"httponly", "secure", "samesite=strict"} <= {part.strip().lower() for part in cookie.split(";")}


def test_a_viewer_sees_and_does_nothing(ledger: Ledger) -> None:
    client = logged_in(ledger, "viewer")
    assert all(client.get(path).status_code == 200 for path in PAGES)
    assert "/order/" not in client.get("/runs/r").text
    csrf = token(client)
    for path in ("/runs/r/order/stop", "/start", "/accounts", "/accounts/close"):
        assert (
            client.post(
                path, data={"csrf": csrf, "why": "because", "name": "x", "role": "operator"}
            ).status_code
            == 403
        ), path
    assert {e["action"] for e in ledger.read_audit()} == {"account", "login"}


def test_an_order_needs_the_session_s_token_and_a_reason(ledger: Ledger) -> None:
    client = logged_in(ledger)
    csrf = token(client)
    assert client.post("/runs/r/order/pause", data={"why": "another site's form"}).status_code == 403
    assert (
        client.post("/runs/r/order/pause", data={"csrf": "x", "why": "another site's form"}).status_code
        == 403
    )
    assert client.post("/runs/r/order/pause", data={"csrf": csrf, "why": " "}).status_code == 400
    assert ledger.read_audit("r") == []
    assert client.post("/runs/r/order/pause", data={"csrf": csrf, "why": "<b>the scanner"}).status_code == 303
    assert (
        client.post(
            "/runs/r/order/exclude", data={"csrf": csrf, "why": "moves", "centre": "west"}
        ).status_code
        == 303
    )
    assert [(e["actor"], e["action"], e["centre"], e["reason"]) for e in ledger.read_audit("r")] == [
        ("operator", "pause", "", "<b>the scanner"),
        ("operator", "exclude", "west", "moves"),
    ]
    shown = client.get("/audit").text
    assert "&lt;b&gt;the scanner" in shown
    assert "<b>the scanner" not in shown


def test_log_ins_are_counted_and_sessions_end(ledger: Ledger) -> None:
    client = logged_in(ledger)
    copy = dict(client.cookies)
    csrf = token(client)
    assert client.post("/logout", data={"csrf": csrf}).status_code == 303
    again = browser(ledger)
    again.app = client.app
    again.cookies.update(copy)
    assert again.get("/").status_code == 303, "a copied cookie outlived its session"
    answers = [
        client.post("/login", data={"name": "operator", "password": "wrong"}).status_code for _ in range(7)
    ]
    assert answers == [401] * 5 + [403] * 2
    password = accounts.create_account(ledger, "operator", "operator", "test")
    assert client.post("/login", data={"name": "operator", "password": password}).status_code == 403, (
        "the right one, too soon"
    )


def test_a_new_password_or_a_closed_account_ends_its_sessions(ledger: Ledger) -> None:
    client = logged_in(ledger)
    assert client.get("/").status_code == 200
    accounts.create_account(ledger, "operator", "viewer", "test")
    assert client.get("/").status_code == 303
    accounts.create_account(ledger, "ben", "operator", "test")
    with pytest.raises(ConsiliumError, match="'ben' is the last operator"):
        accounts.disable_account(ledger, "ben", "test")
    with pytest.raises(ConsiliumError, match="role 'admin' is unknown"):
        accounts.create_account(ledger, "eve", "admin", "test")


def test_a_person_changes_the_own_password(ledger: Ledger) -> None:
    client = browser(ledger)
    old = accounts.create_account(ledger, "vera", "viewer", "test")
    client.post("/login", data={"name": "vera", "password": old})
    csrf = token(client)
    assert client.post("/password", data={"csrf": csrf, "old": old, "new": "too short"}).status_code == 400
    assert (
        client.post("/password", data={"csrf": csrf, "old": "wrong", "new": "long enough by far"}).status_code
        == 400
    )
    assert (
        client.post("/password", data={"csrf": csrf, "old": old, "new": "long enough by far"}).status_code
        == 303
    )
    assert accounts.authenticate(ledger, "vera", old) is None
    assert accounts.authenticate(ledger, "vera", "long enough by far")
    assert "long enough" not in str(ledger.read_accounts())


def test_a_proxy_s_header_holds_from_the_proxy_only(ledger: Ledger) -> None:
    """And /metrics is open to the watcher's address, not to what comes by way of the proxy."""
    trust = ProxyTrust.from_options("X-Forwarded-User", ["10.0.0.0/24"], ["10.0.0.9", "10.9.9.9"])
    accounts.create_account(ledger, "vera", "viewer", "test", uses_proxy=True)
    said = {"X-Forwarded-User": "vera"}
    assert browser(ledger, "10.0.0.5", trust).get("/", headers=said).status_code == 200
    assert browser(ledger, "10.0.1.5", trust).get("/", headers=said).status_code == 303
    assert browser(ledger, "10.0.0.5", trust).get("/", headers={"X-Forwarded-User": "eve"}).status_code == 403
    assert (
        browser(ledger, "10.0.0.5", trust).post("/login", data={"name": "vera", "password": ""}).status_code
        == 401
    )
    assert b"consilium_" in browser(ledger, "10.9.9.9", trust).get("/metrics").content
    assert browser(ledger, "10.0.0.9", trust).get("/metrics").status_code == 303
    with pytest.raises(ConsiliumError, match="--trust-header needs --proxy"):
        ProxyTrust.from_options("X-Forwarded-User", [], [])


def test_settings_that_do_not_fit_start_nothing(ledger: Ledger) -> None:
    client = logged_in(ledger)
    given = {"csrf": token(client), "recipe": "multisource", "why": "a try"}
    answer = client.post("/start", data={**given, "overrides": "stage.rouds=3"})
    assert (answer.status_code, "did you mean &#39;rounds&#39;?" in answer.text) == (400, True)
    assert client.post("/start", data={**given, "overrides": "stage.rounds=3", "why": ""}).status_code == 400
    assert "start" not in {e["action"] for e in ledger.read_audit()}


@pytest.mark.skipif(
    not list(Path("/usr/lib/postgresql").glob("*/bin/initdb")),
    reason="no PostgreSQL here: apt install postgresql",
)
def test_on_postgresql(tmp_path: Path) -> None:
    """The pages, the orders and the chain, as in deployment."""
    with postgresql() as (address, _):
        ledger = Ledger(address)
        started(ledger, "r")
        many(ledger, "r", CENTRES, 5)
        client = logged_in(ledger, runs=tmp_path)
        for path in PAGES:
            assert client.get(path).status_code == 200, path
        assert (
            client.post(
                "/runs/r/order/exclude", data={"csrf": token(client), "why": "moves", "centre": "west"}
            ).status_code
            == 303
        )
        assert "west is excluded by operator: moves" in client.get("/").text
        assert first_broken_link(ledger.read_audit()) is None
        with pytest.raises(ConsiliumError, match="append-only"), ledger.transaction() as database:
            database.execute(sa.text("DELETE FROM audit"))
        ledger._engine.dispose()


def test_names_are_text(tmp_path: Path) -> None:
    """A hostile centre's name and reason reach neither the page's elements nor the data of its figures."""
    evil = "</script><script>alert(1)</script>"
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    started(ledger, "r", "federation.centres=[north]")
    ledger.add_centre(
        "r",
        evil,
        {"counts": {}, "sources": [evil], "versions": {evil: evil}, "skipped": {evil: 1}, "device": evil},
    )
    ledger.log_event("r", "left_out", evil, evil)
    many(ledger, "r", (evil, "north"), 3)
    client = logged_in(ledger)
    for path in PAGES:
        assert "<script>alert" not in client.get(path).text, path


def test_the_trail_s_chain_is_checked(ledger: Ledger) -> None:
    client = logged_in(ledger)
    assert "each follows from the one before" in client.get("/audit").text
    with ledger.transaction() as database:
        database.execute(sa.text('DROP TRIGGER "audit_no_UPDATE"'))
        database.execute(sa.text("UPDATE audit SET actor = 'eve' WHERE id = 1"))
    assert "Entry 1 was changed" in client.get("/audit").text
