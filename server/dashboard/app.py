"""The console as a web application: log-in before every page, static files, and the routes put together."""

from __future__ import annotations

import secrets
from collections.abc import Awaitable, Callable
from importlib.metadata import version
from pathlib import Path
from urllib.parse import quote

import plotly
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import FileResponse, PlainTextResponse, RedirectResponse
from fastapi.staticfiles import StaticFiles
from starlette.exceptions import HTTPException
from starlette.middleware.gzip import GZipMiddleware
from starlette.middleware.sessions import SessionMiddleware

from common.utils.errors import ConsiliumError
from server.dashboard import command_routes, page_routes
from server.dashboard.auth import (
    SESSION_IDLE_TIMEOUT,
    AuthGate,
    LoginRequired,
    SecurityHeaders,
)
from server.dashboard.console import ConsoleContext, Deployment
from server.dashboard.launcher import Launcher
from server.dashboard.proxy_trust import Forbidden, ProxyTrust
from server.dashboard.render import render_page
from server.ledger.ledger import Ledger
from server.reporting.report_template import PLOT_SCRIPT, REPORT_CSS

PACKAGE_FOLDER = Path(__file__).resolve().parent
REVALIDATE = {"Cache-Control": "no-cache"}
IMMUTABLE = {"Cache-Control": "public, max-age=31536000, immutable"}


def create_app(
    ledger: Ledger,
    runs: Path,
    launcher: Launcher,
    trust: ProxyTrust,
    is_https: bool,
    deployment: Deployment | None = None,
) -> FastAPI:
    """Create the application. `is_https`: it is reached by https only."""
    gate = AuthGate(ledger, trust)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, dependencies=[Depends(gate)])
    app.state.console = ConsoleContext(ledger, runs, gate, launcher, deployment or Deployment())
    app.include_router(page_routes.router)
    app.include_router(command_routes.router)
    app.add_api_route("/health", lambda: PlainTextResponse("ok"))
    _add_static_files(app)
    app.add_exception_handler(LoginRequired, redirect_to_login)
    app.add_exception_handler(ConsiliumError, handle_refusal)
    app.add_exception_handler(HTTPException, handle_missing_page)
    app.add_middleware(
        SessionMiddleware,
        secret_key=secrets.token_hex(),
        session_cookie="__Host-consilium" if is_https else "consilium",
        max_age=SESSION_IDLE_TIMEOUT,
        same_site="strict",
        https_only=is_https,
    )
    app.add_middleware(GZipMiddleware, minimum_size=2000, compresslevel=5)
    app.add_middleware(SecurityHeaders, is_https=is_https)
    return app


async def redirect_to_login(request: Request, _: Exception) -> Response:
    """Redirect to the log-in page, which leads back to where the person wanted to go."""
    path = request.scope["path"]
    if path == "/live":
        return Response(status_code=401)
    next_path = quote(path) if request.method == "GET" else "/"
    if next_path == "/":
        return RedirectResponse("/login", 303)
    return RedirectResponse(f"/login?next={next_path}", 303)


async def handle_refusal(request: Request, error: Exception) -> Response:
    """Show in one sentence why a request was refused."""
    status = 403 if isinstance(error, Forbidden) else 400
    return render_page(request, "error.html", {"sentence": str(error)}, status=status)


async def handle_missing_page(request: Request, error: Exception) -> Response:
    """Show that there is no such page."""
    status = getattr(error, "status_code", 500)
    sentence = "There is no such page." if status == 404 else str(getattr(error, "detail", ""))
    return render_page(request, "error.html", {"sentence": sentence}, status=status)


def _add_static_files(app: FastAPI) -> None:
    """Serve our own files, the report's style and script, and plotly, which the report uses too."""
    style = Response(REPORT_CSS, media_type="text/css", headers=REVALIDATE)
    script = Response(PLOT_SCRIPT, media_type="text/javascript", headers=REVALIDATE)
    plotly_path = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
    plotly_script = FileResponse(plotly_path, media_type="text/javascript", headers=IMMUTABLE)
    app.add_route("/static/base.css", _always_respond(style))
    app.add_route("/static/draw.js", _always_respond(script))
    app.add_route(f"/static/plotly-{version('plotly')}.js", _always_respond(plotly_script))
    app.mount("/static", StaticFiles(directory=PACKAGE_FOLDER / "static"))


def _always_respond(response: Response) -> Callable[[Request], Awaitable[Response]]:
    """Return a route that always gives the same response."""

    async def respond(_: Request) -> Response:
        return response

    return respond
