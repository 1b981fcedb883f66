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

from common.errors import ConsiliumError
from server.dashboard.access import IDLE, Forbidden, Gate, Headers, Login, Trust
from server.dashboard.launch import Launcher
from server.dashboard.live import Kept
from server.dashboard.render import page
from server.health import Node
from server.ledger import Ledger
from server.page import DRAW, STYLE

HERE = Path(__file__).resolve().parent
FOR_EVER = {"Cache-Control": "public, max-age=31536000, immutable"}


@dataclass
class Console:
    """What the pages share."""

    ledger: Ledger
    runs: Path
    gate: Gate
    launcher: Launcher
    nodes: Callable[[], list[Node]] | None = None  # of the SuperLink, in a deployment
    certificates: Callable[[], dict[str, datetime]] = dict  # {whose: when it expires}
    kept: Kept = field(default_factory=Kept)


def console(request: Request) -> Console:
    """Of this application."""
    made: Console = request.app.state.console
    return made


def make(
    ledger: Ledger,
    runs: Path,
    launcher: Launcher,
    trust: Trust,
    secure: bool,
    nodes: Callable[[], list[Node]] | None = None,
    certificates: Callable[[], dict[str, datetime]] = dict,
) -> FastAPI:
    """The application. `secure`: it is reached by https only; `nodes`, `certificates`: of a deployment."""
    from server.dashboard import actions, pages  # they import `console` from here

    gate = Gate(ledger, trust)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None, dependencies=[Depends(gate)])
    app.state.console = Console(ledger, runs, gate, launcher, nodes, certificates)
    app.include_router(pages.router)
    app.include_router(actions.router)
    app.add_api_route("/health", lambda: PlainTextResponse("ok"))
    plots = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
    app.add_route("/static/base.css", fixed(Response(STYLE, media_type="text/css", headers={"Cache-Control": "no-cache"})))  # the report's
    app.add_route("/static/draw.js", fixed(Response(DRAW, media_type="text/javascript", headers={"Cache-Control": "no-cache"})))
    app.add_route(f"/static/plotly-{version('plotly')}.js", fixed(FileResponse(plots, media_type="text/javascript", headers=FOR_EVER)))
    app.mount("/static", StaticFiles(directory=HERE / "static"))
    app.add_exception_handler(Login, to_login)
    app.add_exception_handler(ConsiliumError, refused)
    app.add_exception_handler(HTTPException, missing)
    name = "__Host-consilium" if secure else "consilium"
    app.add_middleware(
        SessionMiddleware, secret_key=secrets.token_hex(), session_cookie=name, max_age=IDLE, same_site="strict", https_only=secure
    )
    app.add_middleware(GZipMiddleware, minimum_size=2000, compresslevel=5)
    app.add_middleware(Headers, secure=secure)
    return app


def fixed(response: Response) -> Callable[[Request], Awaitable[Response]]:
    """A route that always answers the same."""

    async def answer(_: Request) -> Response:
        return response

    return answer


async def to_login(request: Request, _: Exception) -> Response:
    """To the log-in page, and back to where the person wanted to go."""
    if request.url.path == "/live":
        return Response(status_code=401)
    wanted = urlsplit(str(request.url)).path if request.method == "GET" else "/"
    return RedirectResponse(f"/login?next={wanted}" if wanted != "/" else "/login", 303)


async def refused(request: Request, error: Exception) -> Response:
    """What a person did wrong, in one sentence."""
    return page(request, "error.html", {"sentence": str(error)}, status=403 if isinstance(error, Forbidden) else 400)


async def missing(request: Request, error: Exception) -> Response:
    """No such page."""
    status = getattr(error, "status_code", 500)
    sentence = "There is no such page." if status == 404 else str(getattr(error, "detail", ""))
    return page(request, "error.html", {"sentence": sentence}, status=status)
