"""Who may see and do what in the console, and that its responses are safe."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from common.utils.errors import ConsiliumError
from server.dashboard import accounts
from server.dashboard.proxy_trust import ProxyTrust
from server.ledger.ledger import Ledger
from tests.server.dashboard.console_client import (
    PAGES,
    add_rounds,
    add_run,
    log_in_as,
    open_console,
    read_csrf_token,
)


def test_every_page_requires_a_login(ledger: Ledger) -> None:
    client = open_console(ledger)
    for path in (*PAGES, "/start", "/runs/r/order/stop", "/runs/r/files/config.yaml", "/compare?run=r&run=r"):
        response = client.get(path)
        assert response.status_code == 303, path
        assert response.headers["location"].split("?")[0] == "/login", path
    assert client.get("/live").status_code == 401
    assert client.get("/metrics").status_code == 303
    assert client.post("/runs/r/order/stop", data={"why": "because"}).status_code == 303
    assert client.get("/openapi.json").status_code == 404
    assert ledger.read_audit() == []


def test_responses_carry_security_headers_and_strict_cookies(ledger: Ledger) -> None:
    """Only our own files, no inline script or style, no frame, no cached copy.

    Neither scripts nor other sites get the cookie.
    """
    client = log_in_as(ledger, is_https=True)
    page = client.get("/runs/r")
    policy = page.headers["content-security-policy"]
    assert "script-src 'self';" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert page.headers["cache-control"] == "no-store"
    assert not re.search(r"<script(?![^>]*(src=|application/json))|\sstyle=|\son\w+=|<style", page.text)
    assert not re.search(r'(?:src|href)="(?:https?:)?//', page.text)
    password = accounts.create_account(ledger, "operator", "operator", "test")
    cookie = client.post("/login", data={"name": "operator", "password": password}).headers["set-cookie"]
    assert cookie.startswith("__Host-consilium=")
    attributes = {part.strip().lower() for part in cookie.split(";")}
    assert {"httponly", "secure", "samesite=strict"} <= attributes


def test_viewer_sees_every_page_and_cannot_change_anything(ledger: Ledger) -> None:
    client = log_in_as(ledger, "viewer")
    for path in PAGES:
        assert client.get(path).status_code == 200
    assert "/order/" not in client.get("/runs/r").text
    form = {"csrf": read_csrf_token(client), "why": "because", "name": "x", "role": "operator"}
    for path in ("/runs/r/order/stop", "/start", "/accounts", "/accounts/close"):
        assert client.post(path, data=form).status_code == 403, path
    assert {entry["action"] for entry in ledger.read_audit()} == {"account", "login"}


def test_command_requires_csrf_token_and_reason(ledger: Ledger) -> None:
    client = log_in_as(ledger)
    csrf = read_csrf_token(client)

    def post_command(command: str, **form: str) -> int:
        return client.post(f"/runs/r/order/{command}", data=form).status_code

    assert post_command("pause", why="another site's form") == 403
    assert post_command("pause", why="another site's form", csrf="x") == 403
    assert post_command("pause", why=" ", csrf=csrf) == 400
    assert ledger.read_audit("r") == []
    assert post_command("pause", why="<b>the scanner", csrf=csrf) == 303
    assert post_command("exclude", why="moves", csrf=csrf, centre="west") == 303
    entries = ledger.read_audit("r")
    assert [(entry["actor"], entry["action"], entry["centre"], entry["reason"]) for entry in entries] == [
        ("operator", "pause", "", "<b>the scanner"),
        ("operator", "exclude", "west", "moves"),
    ]
    audit_page = client.get("/audit").text
    assert "&lt;b&gt;the scanner" in audit_page
    assert "<b>the scanner" not in audit_page


def test_login_attempts_are_limited_and_logout_ends_the_session(ledger: Ledger) -> None:
    client = log_in_as(ledger)
    cookies = dict(client.cookies)
    csrf = read_csrf_token(client)
    assert client.post("/logout", data={"csrf": csrf}).status_code == 303
    client_with_copy = open_console(ledger)
    client_with_copy.app = client.app
    client_with_copy.cookies.update(cookies)
    assert client_with_copy.get("/").status_code == 303, "a copied cookie outlived its session"
    wrong_login = {"name": "operator", "password": "wrong"}
    statuses = [client.post("/login", data=wrong_login).status_code for _ in range(7)]
    assert statuses == [401] * 5 + [403] * 2
    password = accounts.create_account(ledger, "operator", "operator", "test")
    right_login = {"name": "operator", "password": password}
    assert client.post("/login", data=right_login).status_code == 403, "the right password, too soon"


def test_new_role_ends_sessions_and_last_operator_is_protected(ledger: Ledger) -> None:
    client = log_in_as(ledger)
    assert client.get("/").status_code == 200
    accounts.create_account(ledger, "ben", "operator", "test")
    accounts.create_account(ledger, "operator", "viewer", "test")
    assert client.get("/").status_code == 303
    with pytest.raises(ConsiliumError, match="'ben' is the last operator"):
        accounts.create_account(ledger, "ben", "viewer", "test")
    with pytest.raises(ConsiliumError, match="'ben' is the last operator"):
        accounts.disable_account(ledger, "ben", "test")
    with pytest.raises(ConsiliumError, match="role 'admin' is unknown"):
        accounts.create_account(ledger, "eve", "admin", "test")


def test_user_changes_own_password(ledger: Ledger) -> None:
    client = open_console(ledger)
    old = accounts.create_account(ledger, "vera", "viewer", "test")
    client.post("/login", data={"name": "vera", "password": old})
    csrf = read_csrf_token(client)

    def post_password(old: str, new: str) -> int:
        return client.post("/password", data={"csrf": csrf, "old": old, "new": new}).status_code

    assert post_password(old, "too short") == 400
    assert post_password("wrong", "long enough by far") == 400
    assert post_password(old, "long enough by far") == 303
    assert accounts.authenticate(ledger, "vera", old) is None
    assert accounts.authenticate(ledger, "vera", "long enough by far")
    assert "long enough" not in str(ledger.read_accounts())


def test_user_header_is_trusted_from_the_proxy_only(ledger: Ledger) -> None:
    """/metrics is open to the scraper's address, but not to what comes through the proxy."""
    trust = ProxyTrust.from_options("X-Forwarded-User", ["10.0.0.0/24"], ["10.0.0.9", "10.9.9.9"])
    accounts.create_account(ledger, "vera", "viewer", "test", uses_proxy=True)
    vera = {"X-Forwarded-User": "vera"}
    stranger = {"X-Forwarded-User": "eve"}
    behind_proxy = open_console(ledger, "10.0.0.5", trust)
    assert behind_proxy.get("/", headers=vera).status_code == 200
    assert open_console(ledger, "10.0.1.5", trust).get("/", headers=vera).status_code == 303
    assert open_console(ledger, "10.0.0.5", trust).get("/", headers=stranger).status_code == 403
    login = {"name": "vera", "password": ""}
    assert open_console(ledger, "10.0.0.5", trust).post("/login", data=login).status_code == 401
    assert b"consilium_" in open_console(ledger, "10.9.9.9", trust).get("/metrics").content
    assert open_console(ledger, "10.0.0.9", trust).get("/metrics").status_code == 303
    with pytest.raises(ConsiliumError, match="--trust-header needs --proxy"):
        ProxyTrust.from_options("X-Forwarded-User", [], [])


def test_names_and_reasons_from_centres_are_escaped(tmp_path: Path) -> None:
    """A hostile centre's name and reason cannot end an element, nor the data of the figures."""
    script = "</script><script>alert(1)</script>"
    ledger = Ledger(f"sqlite:///{tmp_path / 'ledger.db'}")
    add_run(ledger, "r", "federation.centres=[north]")
    report = {
        "counts": {},
        "sources": [script],
        "versions": {script: script},
        "skipped": {script: 1},
        "device": script,
    }
    ledger.add_centre("r", script, report)
    ledger.log_event("r", "left_out", script, script)
    add_rounds(ledger, "r", (script, "north"), 3)
    client = log_in_as(ledger)
    for path in PAGES:
        assert "<script>alert" not in client.get(path).text, path
