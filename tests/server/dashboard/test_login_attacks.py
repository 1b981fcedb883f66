"""Guessing passwords, also through a reverse proxy, and what becomes of sessions and accounts."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from common.utils.errors import ConsiliumError
from server.dashboard import accounts
from server.dashboard.auth import SESSION_IDLE_TIMEOUT, SESSION_MAX_AGE
from server.dashboard.proxy_trust import ProxyTrust
from server.ledger.ledger import Ledger
from tests.server.dashboard.console_client import log_in_as, open_console, read_csrf_token

PROXY = "10.0.0.5"
TRUST = ProxyTrust.from_options("X-Forwarded-User", [PROXY], [])


def try_password(client: TestClient, name: str, password: str, *forwarded_for: str) -> int:
    """Return the status of a log-in for which the proxy names these addresses."""
    headers = [("X-Forwarded-For", text) for text in forwarded_for]
    return client.post("/login", data={"name": name, "password": password}, headers=headers).status_code


def share_console(client: TestClient, address: str) -> TestClient:
    """Return a client of the same console at another address, without a session."""
    return TestClient(client.app, base_url="http://console", client=(address, 50000), follow_redirects=False)


# --- attempts


def test_strangers_behind_the_proxy_lock_out_neither_each_other_nor_a_known_address(ledger: Ledger) -> None:
    """Each address has its own count; one that the owner logged in from is not stopped by all others."""
    client = open_console(ledger, PROXY, TRUST)
    password = accounts.create_account(ledger, "ada", "operator", "test")
    assert try_password(client, "ada", password, "192.0.2.1") == 303
    for index in range(20):
        assert try_password(client, f"nobody{index}", "wrong", f"198.51.100.{index}") == 401
    assert try_password(client, "nobody", "wrong", "203.0.113.1") == 401, "one address for all"
    for index in range(60):
        try_password(client, "ada", "wrong", f"203.0.113.{index}")
    assert try_password(client, "ada", password, "203.0.113.99") == 403, "guesses from many addresses"
    assert try_password(client, "ada", password, "192.0.2.1") == 303


def test_an_address_that_the_client_claims_does_not_count(ledger: Ledger) -> None:
    """Left of what the proxy added stands what the client sent; without a proxy all of it is the client's."""
    behind_proxy = open_console(ledger, PROXY, TRUST)
    statuses = []
    for index in range(6):
        claimed = f"192.0.2.{index}"
        statuses.append(try_password(behind_proxy, "ada", "wrong", f"{claimed}, 203.0.113.7"))
    assert statuses == [401] * 5 + [403]
    statuses = []
    for index in range(6):
        statuses.append(try_password(behind_proxy, "ada", "wrong", f"192.0.2.{index}", "203.0.113.8"))
    assert statuses == [401] * 5 + [403], "two headers"
    direct = open_console(ledger, "203.0.113.9", TRUST)
    assert [try_password(direct, "ada", "wrong", f"192.0.2.{i}") for i in range(6)] == [401] * 5 + [403]


def test_addresses_of_one_ipv6_network_count_as_one(ledger: Ledger) -> None:
    client = open_console(ledger, PROXY, TRUST)
    statuses = [try_password(client, "ada", "wrong", f"2001:db8::{index}") for index in range(6)]
    assert statuses == [401] * 5 + [403]


def test_a_parallel_burst_gets_no_more_attempts_than_others(ledger: Ledger) -> None:
    client = open_console(ledger)
    accounts.create_account(ledger, "ada", "operator", "test")
    barrier = threading.Barrier(10)

    def guess(_: int) -> int:
        own_client = share_console(client, "10.1.2.3")
        barrier.wait(60)
        return try_password(own_client, "ada", "wrong")

    with ThreadPoolExecutor(10) as executor:
        statuses = sorted(executor.map(guess, range(10)))
    assert statuses == [401] * 5 + [403] * 5


def test_a_right_password_clears_the_count_of_its_account(ledger: Ledger) -> None:
    client = open_console(ledger)
    password = accounts.create_account(ledger, "ada", "operator", "test")
    for _ in range(3):
        assert [try_password(client, "ada", text) for text in ("wrong", "wrong", password)] == [401, 401, 303]


def test_a_stolen_session_cannot_guess_the_present_password(ledger: Ledger) -> None:
    client = log_in_as(ledger)
    form = {"csrf": read_csrf_token(client), "old": "wrong", "new": "long enough by far"}
    statuses = [client.post("/password", data=form).status_code for _ in range(7)]
    assert statuses == [400] * 5 + [403] * 2


# --- the proxy's user header


def test_two_user_headers_are_refused(ledger: Ledger) -> None:
    """Of two, one may be the client's; the one that a proxy adds does not replace it."""
    accounts.create_account(ledger, "vera", "viewer", "test", uses_proxy=True)
    accounts.create_account(ledger, "ada", "operator", "test", uses_proxy=True)
    client = open_console(ledger, PROXY, TRUST)
    names = [("X-Forwarded-User", "ada"), ("x-forwarded-user", "vera")]
    response = client.get("/", headers=names)
    assert response.status_code == 403
    assert "the proxy must remove the client" in response.text
    assert client.get("/", headers=names[:1]).status_code == 200


# --- sessions


@pytest.fixture
def pass_time(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Lets seconds pass for everything that asks for the time of day."""
    now = time.time
    passed = [0.0]

    def pass_seconds(seconds: float) -> None:
        passed[0] += seconds

    monkeypatch.setattr(time, "time", lambda: now() + passed[0])
    return pass_seconds


def test_a_session_ends_after_its_longest_age_although_it_is_used(
    ledger: Ledger, pass_time: Callable[[float], None]
) -> None:
    client = log_in_as(ledger)
    step = SESSION_IDLE_TIMEOUT - 60
    for _ in range(SESSION_MAX_AGE // step):
        pass_time(step)
        assert client.get("/runs").status_code == 200
    pass_time(SESSION_MAX_AGE % step + 60)
    assert client.get("/runs").status_code == 303


def test_a_session_ends_when_it_is_not_used(ledger: Ledger, pass_time: Callable[[float], None]) -> None:
    client = log_in_as(ledger)
    cookies = dict(client.cookies)
    pass_time(SESSION_IDLE_TIMEOUT + 60)
    copy = share_console(client, "10.1.2.3")
    copy.cookies.update(cookies)
    assert copy.get("/runs").status_code == 303


def test_a_copied_cookie_stays_worthless_after_others_log_out(
    ledger: Ledger, pass_time: Callable[[float], None]
) -> None:
    client = log_in_as(ledger)
    copy = share_console(client, "10.1.2.3")
    copy.cookies.update(dict(client.cookies))
    assert copy.get("/runs").status_code == 200
    response = client.post("/logout", data={"csrf": read_csrf_token(client)})
    assert "expires=Thu, 01 Jan 1970" in response.headers["set-cookie"]
    pass_time(SESSION_IDLE_TIMEOUT / 2)
    other = share_console(client, "10.1.2.3")
    password = accounts.create_account(ledger, "vera", "viewer", "test")
    assert try_password(other, "vera", password) == 303
    assert other.post("/logout", data={"csrf": read_csrf_token(other)}).status_code == 303
    assert copy.get("/runs").status_code == 303


# --- accounts


@pytest.mark.parametrize("kind", ["sqlite", "postgresql"])
def test_two_operators_who_demote_each_other_at_once_leave_one(
    request: pytest.FixtureRequest, tmp_path: Path, kind: str
) -> None:
    """Each sees the other as an operator until one has written; one of the two is refused."""
    address = f"sqlite:///{tmp_path}/ledger.db"
    if kind == "postgresql":
        address = request.getfixturevalue("postgresql")
    ledger = Ledger(address)
    for _ in range(5):
        for name in ("ada", "ben"):
            accounts.create_account(ledger, name, "operator", "test")
        barrier = threading.Barrier(2)

        def demote(name: str, barrier: threading.Barrier = barrier) -> str:
            barrier.wait(60)
            try:
                accounts.create_account(ledger, name, "viewer", "test")
            except ConsiliumError as error:
                return str(error)
            return "demoted"

        with ThreadPoolExecutor(2) as executor:
            outcomes = list(executor.map(demote, ("ada", "ben")))
        assert outcomes.count("demoted") == 1, outcomes
        assert any("is the last operator" in outcome for outcome in outcomes)
    ledger.close()


def test_a_new_password_does_not_give_back_a_role_that_was_taken_meanwhile(ledger: Ledger) -> None:
    old = accounts.create_account(ledger, "ada", "operator", "test")
    accounts.create_account(ledger, "ben", "operator", "test")
    account = accounts.authenticate(ledger, "ada", old)
    assert account
    accounts.disable_account(ledger, "ada", "ben")
    with pytest.raises(ConsiliumError, match="was changed meanwhile"):
        ledger.add_account("ada", account["role"], account["password_hash"], previous_id=account["id"])
    assert accounts.find_account(ledger, "ada") is None
