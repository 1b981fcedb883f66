"""The console as a web application: the gate before every page, our own files, and the pages' modules put together."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from urllib.parse import urlsplit

import plotly
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import FileResponse, PlainTextResponse, RedirectResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.middleware.gzip import GZipMiddleware
from starlette.middleware.sessions import SessionMiddleware

from common.utils.errors import ConsiliumError
from server.dashboard.auth import (
    SESSION_IDLE_TIMEOUT,
    AuthGate,
    Forbidden,
    LoginRequired,
    ProxyTrust,
    SecurityHeaders,
)
from server.dashboard.events import VersionedCache
from server.dashboard.launcher import Launcher
from server.dashboard.render import render_page
from server.ledger.ledger import Ledger
from server.monitoring.health import SuperLinkNode
from server.reporting.report_template import PLOT_SCRIPT, REPORT_CSS

PACKAGE_FOLDER = Path(__file__).resolve().parent
IMMUTABLE_CACHE_HEADERS = {"Cache-Control": "public, max-age=31536000, immutable"}


@dataclass
class ConsoleContext:
    """What the pages share."""

    ledger: Ledger
    runs: Path
    gate: AuthGate
    launcher: Launcher
    list_nodes: Callable[[], list[SuperLinkNode]] | None = None  # of the SuperLink, in a deployment
    read_certificate_expiries: Callable[[], dict[str, datetime]] = dict  # {whose: when it expires}
    page_cache: VersionedCache = field(default_factory=VersionedCache)


def get_console(request: Request) -> ConsoleContext:
    """Of this application."""
    made: ConsoleContext = request.app.state.console
    return made


def create_app(
    ledger: Ledger,
    runs: Path,
    launcher: Launcher,
    trust: ProxyTrust,
    is_https: bool,
    list_nodes: Callable[[], list[SuperLinkNode]] | None = None,
    read_certificate_expiries: Callable[[], dict[str, datetime]] = dict,
) -> FastAPI:
    """The application. `secure`: it is reached by https only; `nodes`, `certificates`: of a deployment."""
    from server.dashboard import command_routes, page_routes  # they import `console` from here

    gate = AuthGate(ledger, trust)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, dependencies=[Depends(gate)])
    app.state.console = ConsoleContext(ledger, runs, gate, launcher, list_nodes, read_certificate_expiries)
    app.include_router(page_routes.router)
    app.include_router(command_routes.router)
    app.add_api_route("/health", lambda: PlainTextResponse("ok"))
    plots = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
    app.add_route(
        "/static/base.css",
        make_static_route(Response(REPORT_CSS, media_type="text/css", headers={"Cache-Control": "no-cache"})),
    )  # the report's
    app.add_route(
        "/static/draw.js",
        make_static_route(
            Response(PLOT_SCRIPT, media_type="text/javascript", headers={"Cache-Control": "no-cache"})
        ),
    )
    app.add_route(
        f"/static/plotly-{version('plotly')}.js",
        make_static_route(FileResponse(plots, media_type="text/javascript", headers=IMMUTABLE_CACHE_HEADERS)),
    )
    app.mount("/static", StaticFiles(directory=PACKAGE_FOLDER / "static"))
    app.add_exception_handler(LoginRequired, redirect_to_login)
    app.add_exception_handler(ConsiliumError, handle_refusal)
    app.add_exception_handler(HTTPException, handle_missing_page)
    name = "__Host-consilium" if is_https else "consilium"
    app.add_middleware(
        SessionMiddleware,
        secret_key=secrets.token_hex(),
        session_cookie=name,
        max_age=SESSION_IDLE_TIMEOUT,
        same_site="strict",
        https_only=is_https,
    )
    app.add_middleware(GZipMiddleware, minimum_size=2000, compresslevel=5)
    app.add_middleware(SecurityHeaders, is_https=is_https)
    return app


def make_static_route(response: Response) -> Callable[[Request], Awaitable[Response]]:
    """A route that always answers the same."""

    async def answer(_: Request) -> Response:
        return response

    return answer


async def redirect_to_login(request: Request, _: Exception) -> Response:
    """To the log-in page, and back to where the person wanted to go."""
    if request.url.path == "/live":
        return Response(status_code=401)
    wanted = urlsplit(str(request.url)).path if request.method == "GET" else "/"
    return RedirectResponse(f"/login?next={wanted}" if wanted != "/" else "/login", 303)


async def handle_refusal(request: Request, error: Exception) -> Response:
    """What a person did wrong, in one sentence."""
    return render_page(
        request, "error.html", {"sentence": str(error)}, status=403 if isinstance(error, Forbidden) else 400
    )


async def handle_missing_page(request: Request, error: Exception) -> Response:
    """No such page."""
    status = getattr(error, "status_code", 500)
    sentence = "There is no such page." if status == 404 else str(getattr(error, "detail", ""))
    return render_page(request, "error.html", {"sentence": sentence}, status=status)
