"""`consilium-server dashboard`: the console, served by uvicorn in this process."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import uvicorn

from common.errors import ConsiliumError
from common.logs import set_up
from server.dashboard.access import Trust
from server.dashboard.app import make
from server.dashboard.launch import Launcher
from server.deployed import certificates, nodes
from server.runs import open_ledger

T = TypeVar("T")
log = logging.getLogger("consilium.server")


def serve(
    host: str,
    port: int,
    runs: Path,
    ledger: str,
    certificate: Path | None,
    key: Path | None,
    proxies: list[str],
    header: str,
    watchers: list[str],
    superlink: str,
    ca: Path,
) -> None:
    """Until it is told to end. Raises ConsiliumError."""
    set_up()
    logging.getLogger("consilium").propagate = False  # the command's own handler would say it again
    if (certificate is None) != (key is None):
        raise ConsiliumError("--certificate and --key belong together")
    secure = bool(certificate or proxies)
    reach = ["--superlink", superlink, "--ca", str(ca)] if superlink else []
    address = ledger or os.environ.get("CONSILIUM_LEDGER", "")
    book = open_ledger(runs, ledger)
    trust = Trust.of(header, proxies, watchers)
    deployed = (kept(5, lambda: nodes(superlink, ca)), kept(3600, lambda: certificates(superlink, ca))) if superlink else (None, dict)
    app = make(book, runs, Launcher(runs, address, reach), trust, secure, *deployed)
    if not any(row["role"] == "operator" for row in book.accounts()):
        log.warning("nobody can log in yet: consilium-server account add NAME --role operator")
    if not secure and host not in ("127.0.0.1", "localhost", "::1"):
        log.warning(
            "%s is served without TLS: passwords can be read on the way; give --certificate and --key, or put it behind a --proxy", host
        )
    log.info("the console: %s://%s:%d", "https" if certificate else "http", host, port)
    uvicorn.run(
        app,
        host=host,
        port=port,
        ssl_certfile=certificate,
        ssl_keyfile=key,
        proxy_headers=False,  # an address that anybody can claim; the trusted header has its own rule
        server_header=False,
        access_log=False,
        log_level="warning",
        timeout_graceful_shutdown=2,  # live pages never end by themselves
    )


def kept(seconds: float, ask: Callable[[], T]) -> Callable[[], T]:
    """What `ask` says, asked for again only after so many seconds."""
    said: list[tuple[float, T]] = []

    def of() -> T:
        if not said or time.monotonic() > said[-1][0] + seconds:
            said[:] = [(time.monotonic(), ask())]
        return said[-1][1]

    return of
