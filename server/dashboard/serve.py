"""`consilium-server dashboard`: the console, served by uvicorn in this process."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import uvicorn

from common.errors import ConsiliumError
from common.logs import set_up
from server.authority import read_certificate
from server.dashboard.access import Trust
from server.dashboard.app import make
from server.dashboard.launch import Launcher
from server.health import Node
from server.runs import open_ledger

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
    deployed = (known_nodes(superlink, ca), expiring(ca)) if superlink else (None, None)
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


def known_nodes(superlink: str, ca: Path) -> Callable[[], list[Node]]:
    """The SuperLink's nodes, asked for at most every five seconds."""
    from server.deployed import nodes

    asked, known = -10.0, []

    def of() -> list[Node]:
        nonlocal asked, known
        if time.monotonic() > asked + 5:
            known, asked = nodes(superlink, ca), time.monotonic()
        return known

    return of


def expiring(ca: Path) -> dict[str, datetime]:
    """When the federation's certificates end, of those that lie here."""
    known = {"authority": ca, "coordinator": ca.with_name("server.crt")}
    return {name: read_certificate(path).not_valid_after_utc for name, path in known.items() if path.is_file()}
