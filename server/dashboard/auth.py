"""Authentication and authorisation: one gate before every page.

Every page requires a log-in unless it is in PUBLIC_PATHS. Every POST requires an operator unless it is in
SELF_SERVICE_PATHS, and carries the session's own token in its form (CSRF).
"""

from __future__ import annotations

import re
import secrets
import time
from typing import Any, NamedTuple

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.utils.errors import ConsiliumError
from server.dashboard import accounts
from server.dashboard.login_limits import LOGIN, LoginLimits, describe_origin
from server.dashboard.proxy_trust import Forbidden, ProxyTrust
from server.ledger.ledger import Ledger

PUBLIC_PATHS = ("/login", "/health")
SELF_SERVICE_PATHS = ("/logout", "/password")  # POSTs that every person may send
SESSION_IDLE_TIMEOUT = 2 * 3600  # seconds without a request
SESSION_MAX_AGE = 12 * 3600  # seconds
MAX_FORM_BYTES = 65_536
# The style elements that plotly.js makes: an empty one, which it fills, and one for maps (plotly 7.1.0).
PLOTLY_STYLE_HASHES = (
    "'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=' "
    "'sha256-ji27qzEtxXZW+7dun6UwjHXJ18e6WAin1VvNtkzIE/o='"
)
CONTENT_SECURITY_POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        f"style-src 'self' {PLOTLY_STYLE_HASHES}",
        "img-src 'self' data: blob:",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
    ]
)


class LoginRequired(Exception):
    """The person must log in first."""


class SessionUser(NamedTuple):
    """Whose session it is; `csrf` stands in every form of theirs."""

    name: str
    role: str
    csrf: str


class AuthGate:
    """The dependency of every route.

    Sessions are cookies signed by a key that lives as long as this process.
    """

    def __init__(self, ledger: Ledger, trust: ProxyTrust) -> None:
        self.ledger = ledger
        self.trust = trust
        self.ended_sessions: dict[str, float] = {}  # {id of a session logged out: when it would have expired}
        self.login_limits = LoginLimits(ledger)

    async def __call__(self, request: Request) -> None:
        """Admit a request, or raise LoginRequired or Forbidden.

        Sets `request.state.person`, None on a public page, and `request.state.form` of a POST.
        """
        path = request.scope["path"]  # that of `request.url` is parsed from a text that the client wrote
        is_post = request.method == "POST"
        request.state.person = None
        if is_post:
            await _read_form(request)
        if path in PUBLIC_PATHS or (path == "/metrics" and self.trust.is_scraper(request)):
            return
        user = await run_in_threadpool(self.identify_user, request)
        request.state.person = user
        if is_post:
            _authorise_post(request, user)

    def identify_user(self, request: Request) -> SessionUser:
        """Return whose request it is.

        Raises:
            LoginRequired: nobody is logged in.
            Forbidden: the person whom the proxy names has no account.
        """
        proxy_user = self.trust.read_user_name(request)
        if proxy_user:
            return self._identify_proxy_user(request, proxy_user)
        session: dict[str, Any] = request.session
        account = accounts.find_account(self.ledger, session.get("name", ""))
        age = time.time() - session.get("began", 0)
        has_ended = session.get("id") in self.ended_sessions or age >= SESSION_MAX_AGE
        # A new password or role gives the account another id.
        if account is None or account["id"] != session.get("account") or has_ended:
            session.clear()
            raise LoginRequired
        session["last_request"] = int(time.time())  # only a session that changed gets a new cookie
        return SessionUser(account["name"], account["role"], session["csrf"])

    def log_in(self, request: Request, name: str, password: str) -> None:
        """Begin a session.

        Raises ConsiliumError, with the same text for a wrong name and a wrong password.
        """
        address = self.trust.read_client_address(request)
        self.login_limits.count_attempt(name, address)
        account = accounts.authenticate(self.ledger, name, password)
        if account is None:
            raise ConsiliumError("name or password is wrong")
        self.login_limits.clear_account(name, address)
        request.session.clear()
        request.session.update(
            name=name,
            account=account["id"],
            id=secrets.token_urlsafe(),
            csrf=secrets.token_urlsafe(),
            began=time.time(),
        )
        self.ledger.log_audit(name, LOGIN, describe_origin(address))

    def change_password(self, request: Request, name: str, old_password: str, new_password: str) -> None:
        """Change a person's own password. A stolen session must not be a way to guess the present one.

        Raises ConsiliumError, for too many attempts too.
        """
        self.login_limits.count_attempt(name, self.trust.read_client_address(request))
        accounts.change_password(self.ledger, name, old_password, new_password)

    def log_out(self, request: Request) -> None:
        """End the session, so that a copy of its cookie is worthless."""
        now = time.time()
        still_valid = {key: expiry for key, expiry in self.ended_sessions.items() if expiry > now}
        still_valid[request.session.get("id", "")] = now + SESSION_MAX_AGE
        self.ended_sessions = still_valid
        request.session.clear()

    def _identify_proxy_user(self, request: Request, name: str) -> SessionUser:
        account = accounts.find_account(self.ledger, name)
        if account is None:
            raise Forbidden(
                f"'{name}' has no account here; an operator can create one with "
                f"consilium-server account add {name} --by-proxy"
            )
        csrf = request.session.setdefault("csrf", secrets.token_urlsafe())
        return SessionUser(name, account["role"], csrf)


async def _read_form(request: Request) -> None:
    length = request.headers.get("content-length", "")
    if not re.fullmatch("[0-9]{1,18}", length):
        raise ConsiliumError("a form must say its Content-Length, a number of bytes")
    if int(length) > MAX_FORM_BYTES:
        raise Forbidden(f"a form may have at most {MAX_FORM_BYTES} bytes")
    request.state.form = await request.form()


def _authorise_post(request: Request, user: SessionUser) -> None:
    token = str(request.state.form.get("csrf", ""))
    if not secrets.compare_digest(token.encode(), user.csrf.encode()):
        raise Forbidden(
            "this form belongs to another session, or is older than your log-in; "
            "go back, reload the page and try again"
        )
    if user.role != "operator" and request.scope["path"] not in SELF_SERVICE_PATHS:
        raise Forbidden("only an operator may do this; you are a viewer")


class SecurityHeaders:
    """Adds headers to every response: only our own files, no frame around a page, no copy kept."""

    def __init__(self, app: ASGIApp, is_https: bool) -> None:
        self.app = app
        self.is_https = is_https

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._add_headers(MutableHeaders(scope=message))
            await send(message)

        await self.app(scope, receive, send_with_headers if scope["type"] == "http" else send)

    def _add_headers(self, headers: MutableHeaders) -> None:
        headers.setdefault("Content-Security-Policy", CONTENT_SECURITY_POLICY)
        headers.setdefault("Cache-Control", "no-store")
        headers["X-Content-Type-Options"] = "nosniff"
        headers["Referrer-Policy"] = "same-origin"
        headers["Cross-Origin-Opener-Policy"] = "same-origin"
        if self.is_https:
            headers["Strict-Transport-Security"] = "max-age=31536000"
