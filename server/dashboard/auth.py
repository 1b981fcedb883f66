"""Who is asking, and may they? One gate before every page: a page is closed unless it is named in OPEN, and every POST is an operator's unless it is
named in OWN, with the session's own token in its form (CSRF)."""

from __future__ import annotations

import ipaddress
import secrets
import time
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastapi import Request
from fastapi.concurrency import run_in_threadpool
from limits import parse
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from common.utils.errors import ConsiliumError
from server.dashboard import accounts
from server.ledger.ledger import Ledger

PUBLIC_PATHS = ("/login", "/health")
SELF_SERVICE_PATHS = ("/logout", "/password")  # POSTs that every person may send
SESSION_IDLE_TIMEOUT, SESSION_MAX_AGE = (
    2 * 3600,
    12 * 3600,
)  # seconds of a session without a request, and in all
MAX_FORM_BYTES = 65_536  # bytes of a form
LOGIN_LIMIT_PER_NAME, LOGIN_LIMIT_PER_ADDRESS = parse("5/minute"), parse("20/minute")  # failed log-ins
# The style elements that plotly.js makes: an empty one, which it fills rule by rule, and one for maps (plotly 7.1.0)
PLOTLY_STYLE_HASHES = "'sha256-47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=' 'sha256-ji27qzEtxXZW+7dun6UwjHXJ18e6WAin1VvNtkzIE/o='"
CONTENT_SECURITY_POLICY = (
    f"default-src 'none'; script-src 'self'; style-src 'self' {PLOTLY_STYLE_HASHES}; img-src 'self' data: blob:; connect-src 'self'; form-action 'self'; "
    "base-uri 'none'; frame-ancestors 'none'"
)


Networks = tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]


class LoginRequired(Exception):
    """The person must log in first."""


class Forbidden(ConsiliumError):
    """The person may not."""


class SessionUser(NamedTuple):
    """Whose session it is; `csrf` stands in every form of theirs."""

    name: str
    role: str
    csrf: str


@dataclass
class ProxyTrust:
    """Whom the network vouches for: a reverse proxy that has logged people in, whose `header` then names the person; and from where Prometheus may
    read /metrics without logging in."""

    user_header: str = ""
    proxy_networks: Networks = ()
    scraper_networks: Networks = ()

    @classmethod
    def from_options(cls, header: str, proxies: list[str], scrapers: list[str]) -> ProxyTrust:
        """Raises ConsiliumError."""
        if header and not proxies:
            raise ConsiliumError(
                "--trust-header needs --proxy ADDRESS: from any other address the header could be anybody's"
            )
        try:
            return cls(
                header, tuple(map(ipaddress.ip_network, proxies)), tuple(map(ipaddress.ip_network, scrapers))
            )
        except ValueError as error:
            raise ConsiliumError(
                f"{error}; write an address or a network, e.g. 10.0.0.5 or 10.0.0.0/24"
            ) from None

    def read_user_name(self, request: Request) -> str:
        """The person that the proxy names; "" where none does."""
        return (
            request.headers.get(self.user_header, "")
            if self.user_header and _is_in_networks(request, self.proxy_networks)
            else ""
        )

    def is_scraper(self, request: Request) -> bool:
        """Prometheus at an address of its own: what comes by way of a proxy may be anybody."""
        return _is_in_networks(request, self.scraper_networks) and not _is_in_networks(
            request, self.proxy_networks
        )


def _is_in_networks(request: Request, networks: Networks) -> bool:
    try:
        address = ipaddress.ip_address(request.client.host) if request.client else None
    except ValueError:  # a test client's
        address = None
    return address is not None and any(address in network for network in networks)


class AuthGate:
    """The dependency of every route. Sessions are signed cookies, by a key that lives as long as this process."""

    def __init__(self, ledger: Ledger, trust: ProxyTrust) -> None:
        self.ledger, self.trust = ledger, trust
        self.ended_sessions: dict[str, float] = {}  # {session logged out: when it would have ended}
        self.failed_logins = MovingWindowRateLimiter(MemoryStorage())

    async def __call__(self, request: Request) -> None:
        """Raises Login or Forbidden; else `request.state` has the `person`, None on an open page, and of a POST the `form`."""
        path, post = request.url.path, request.method == "POST"
        request.state.person = None
        if post:
            if int(request.headers.get("content-length", MAX_FORM_BYTES + 1)) > MAX_FORM_BYTES:
                raise Forbidden(f"a form has {MAX_FORM_BYTES} bytes at most")
            request.state.form = await request.form()
        if path in PUBLIC_PATHS or (path == "/metrics" and self.trust.is_scraper(request)):
            return
        request.state.person = person = await run_in_threadpool(self.identify_user, request)
        if post:
            if not secrets.compare_digest(
                str(request.state.form.get("csrf", "")).encode(), person.csrf.encode()
            ):
                raise Forbidden(
                    "this form is of another session, or older than your log-in; go back, reload the page and try again"
                )
            if person.role != "operator" and path not in SELF_SERVICE_PATHS:
                raise Forbidden("only an operator may do this; you are a viewer")

    def identify_user(self, request: Request) -> SessionUser:
        """Raises Login where nobody is logged in, Forbidden where the proxy's person has no account."""
        session: dict[str, Any] = request.session
        if name := self.trust.read_user_name(request):
            account = accounts.find_account(self.ledger, name)
            if account is None:
                raise Forbidden(
                    f"'{name}' has no account here; an operator can make one: consilium-server account add {name} --by-proxy"
                )
            return SessionUser(name, account["role"], session.setdefault("csrf", secrets.token_urlsafe()))
        account = accounts.find_account(self.ledger, session.get("name", ""))
        now = time.time()
        alive = (
            session.get("id") not in self.ended_sessions and now - session.get("began", 0) < SESSION_MAX_AGE
        )
        if (
            account is None or account["id"] != session.get("account") or not alive
        ):  # another id: its password or role has changed
            session.clear()
            raise LoginRequired
        return SessionUser(account["name"], account["role"], session["csrf"])

    def log_in(self, request: Request, name: str, password: str) -> None:
        """Begin a session. Raises ConsiliumError, the same for a wrong name and a wrong password."""
        address = request.client.host if request.client else ""
        keys = (LOGIN_LIMIT_PER_NAME, name[:64], address), (LOGIN_LIMIT_PER_ADDRESS, address)
        if not all(self.failed_logins.test(*key) for key in keys):
            raise Forbidden("too many attempts; wait a minute")
        account = accounts.authenticate(self.ledger, name, password)
        if account is None:
            for key in keys:
                self.failed_logins.hit(*key)
            raise ConsiliumError("name or password is wrong")
        request.session.clear()
        request.session.update(
            name=name,
            account=account["id"],
            id=secrets.token_urlsafe(),
            csrf=secrets.token_urlsafe(),
            began=time.time(),
        )
        self.ledger.log_audit(name, "login", f"from {address}")

    def log_out(self, request: Request) -> None:
        """End the session: its cookie is worth nothing any more, whoever has a copy."""
        now = time.time()
        self.ended_sessions = {key: until for key, until in self.ended_sessions.items() if until > now} | {
            request.session.get("id", ""): now + SESSION_MAX_AGE
        }
        request.session.clear()


class SecurityHeaders:
    """What every answer tells the browser: nothing but our own files, no frame around it, no copy kept."""

    def __init__(self, app: ASGIApp, is_https: bool) -> None:
        self.app, self.is_https = app, is_https

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.setdefault("Content-Security-Policy", CONTENT_SECURITY_POLICY)
                headers.setdefault("Cache-Control", "no-store")
                headers["X-Content-Type-Options"] = "nosniff"
                headers["Referrer-Policy"] = "same-origin"
                headers["Cross-Origin-Opener-Policy"] = "same-origin"
                if self.is_https:
                    headers["Strict-Transport-Security"] = "max-age=31536000"
            await send(message)

        await self.app(scope, receive, send_with_headers if scope["type"] == "http" else send)
