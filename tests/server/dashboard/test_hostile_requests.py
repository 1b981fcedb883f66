"""Requests that no browser sends: refused with a sentence, and never an error of the server."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

import anyio
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient
from starlette.types import Message

from server.dashboard import accounts
from server.ledger.ledger import Ledger
from tests.server.dashboard.console_client import CENTRES, add_rounds, add_run, log_in_as, read_csrf_token

NASTY_TEXTS = (
    "",
    "r",
    "\0",
    "..",
    "../../etc/passwd",
    "${oc.env:HOME}",
    "x\r\nSet-Cookie: a=b",
    "'; DROP TABLE audit; --",
    "<script>",
    "9" * 5000,
    "\ud7ff\ufffe\U0010ffff",
    "federation.centres=[",
    "stage.rounds='",
)
hostile_texts = st.sampled_from(NASTY_TEXTS) | st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
run_ids = st.just("r") | hostile_texts
GET_PATHS = (
    "/login",
    "/start",
    "/compare",
    "/runs/{}",
    "/runs/{}/learning",
    "/runs/{}/privacy",
    "/runs/{}/data",
    "/runs/{}/evidence",
    "/runs/{}/order/{}",
    "/runs/{}/files/{}",
    "/static/{}",
)
QUERY_FIELDS = ("next", "recipe", "overrides", "centre", "run", "seen")
POST_PATHS = ("/login", "/start", "/accounts", "/accounts/close", "/password", "/runs/{}/order/{}")
FORM_FIELDS = (
    "name",
    "password",
    "next",
    "role",
    "proxied",
    "why",
    "centre",
    "recipe",
    "overrides",
    "old",
    "new",
)
requests_of_examples = settings(
    deadline=None, max_examples=150, derandomize=True, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> TestClient:
    """An operator's client, which raises what the server does not handle."""
    ledger = Ledger(f"sqlite:///{tmp_path_factory.mktemp('hostile') / 'ledger.db'}")
    add_run(ledger, "r")
    add_rounds(ledger, "r", CENTRES, 2)
    return log_in_as(ledger)


@requests_of_examples
@given(
    path=st.sampled_from(GET_PATHS),
    parts=st.tuples(run_ids, hostile_texts),
    query=st.dictionaries(st.sampled_from(QUERY_FIELDS), hostile_texts),
)
def test_no_page_fails_for_any_path_and_query(
    client: TestClient, path: str, parts: tuple[str, str], query: dict[str, str]
) -> None:
    quoted = [quote(part, safe="") for part in parts]
    response = client.get(path.format(*quoted), params=query)
    assert response.status_code < 500
    assert "set-cookie: a=b" not in str(response.headers).lower()


@requests_of_examples
@given(
    path=st.sampled_from(POST_PATHS),
    parts=st.tuples(run_ids, st.sampled_from(("exclude", "resume", "stop")) | hostile_texts),
    form=st.dictionaries(st.sampled_from(FORM_FIELDS), hostile_texts),
)
def test_no_form_fails_for_any_field(
    client: TestClient, path: str, parts: tuple[str, str], form: dict[str, str]
) -> None:
    """An empty reason keeps a form whose settings happen to be right from starting a process."""
    if path == "/start":
        form = form | {"why": ""}
    quoted = [quote(part, safe="") for part in parts]
    response = client.post(path.format(*quoted), data=form | {"csrf": read_csrf_token(client)})
    assert response.status_code < 500


def send_raw(client: TestClient, method: str, headers: list[tuple[bytes, bytes]], **scope: object) -> int:
    """Send a request as no client would write it; return the status of the response."""
    cookies = "; ".join(f"{name}={value}" for name, value in client.cookies.items())
    request = {
        "type": "http",
        "http_version": "1.1",
        "method": method,
        "scheme": "http",
        "path": "/login",
        "raw_path": b"/login",
        "query_string": b"",
        "headers": [(b"cookie", cookies.encode()), *headers],
        "client": ("10.1.2.3", 50000),
        "server": ("console", 80),
        **scope,
    }
    statuses = []

    async def receive() -> Message:
        return {"type": "http.request", "body": b"name=ada&password=x", "more_body": False}

    async def send(message: Message) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    async def call() -> None:
        await client.app(request, receive, send)

    anyio.run(call)
    return int(statuses[0])


@pytest.mark.parametrize(
    "length", [b"", b"x", b"-1", b"1e3", b"0x10", b" ", b"1.5", b"9" * 5000, "\u0661".encode(), None]
)
def test_a_form_without_a_number_of_bytes_is_refused(client: TestClient, length: bytes | None) -> None:
    headers = [(b"content-type", b"application/x-www-form-urlencoded")]
    if length is not None:
        headers.append((b"content-length", length))
    assert send_raw(client, "POST", headers) == 400


@pytest.mark.parametrize(("num_bytes", "status"), [(65_536, 401), (65_537, 403)])
def test_a_form_has_at_most_64_kib(client: TestClient, num_bytes: int, status: int) -> None:
    """The whole form, of which the password is the longest field."""
    start = "name=nobody&password="
    body = start + "x" * (num_bytes - len(start))
    headers = {"content-type": "application/x-www-form-urlencoded"}
    assert client.post("/login", content=body, headers=headers).status_code == status


@requests_of_examples
@given(
    name=st.sampled_from((b"host", b"content-type", b"cookie", b"x-forwarded-for", b"accept-encoding", b"x")),
    value=st.binary(max_size=60)
    | st.sampled_from((b"[", b"x/login?", b"x@y", b"a" * 9000, b"multipart/form-data")),
    query=st.binary(max_size=30),
)
def test_no_header_or_query_of_any_bytes_fails(
    client: TestClient, name: bytes, value: bytes, query: bytes
) -> None:
    for method, path in (("GET", "/runs"), ("POST", "/login")):
        headers = [(b"content-length", b"19"), (name, value)]
        status = send_raw(client, method, headers, path=path, query_string=query)
        assert status < 500


@pytest.mark.parametrize("host", [b"x/login?", b"x/login#", b"x/health?", b"[", b""])
def test_no_host_header_makes_a_page_public(client: TestClient, host: bytes) -> None:
    client_without_session = TestClient(client.app)
    status = send_raw(client_without_session, "GET", [(b"host", host)], path="/runs")
    assert status == 303


def test_a_login_leads_to_this_console_only(tmp_path: Path) -> None:
    """Browsers take a backslash for a slash, and leave out tabs and line ends."""
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    client = log_in_as(ledger)
    form = {"name": "ada", "password": accounts.create_account(ledger, "ada", "viewer", "test")}
    for target in (
        "//evil.example",
        "/\\evil.example",
        "\\\\evil.example",
        "/\t/evil.example",
        "https://evil.example",
        "evil.example",
        "/a\\b",
        "/a\r\nb",
        "javascript:alert(1)",
    ):
        response = client.post("/login", data=form | {"next": target})
        assert (response.status_code, response.headers["location"]) == (303, "/"), target
    response = client.post("/login", data=form | {"next": "/runs/r%20s"})
    assert response.headers["location"] == "/runs/r%20s"


def test_postgresql_refuses_a_text_with_nul_in_a_sentence(postgresql: str, tmp_path: Path) -> None:
    client = log_in_as(Ledger(postgresql), runs=tmp_path)
    assert client.get("/runs/%00").status_code == 400
    form = {"csrf": read_csrf_token(client), "name": "\0", "role": "viewer", "why": "\0\0\0", "recipe": "\0"}
    for path in ("/accounts", "/accounts/close", "/start", "/runs/%00/order/stop"):
        assert client.post(path, data=form).status_code == 400, path
    assert client.post("/login", data={"name": "\0", "password": "\0"}).status_code in (400, 401)
