"""`consilium-server dashboard`: the console, served by uvicorn in this process."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import uvicorn

from common.utils.errors import ConsiliumError
from common.utils.log_setup import configure_logging
from server.dashboard.app import create_app
from server.dashboard.auth import ProxyTrust
from server.dashboard.launcher import Launcher
from server.operations.superlink import list_nodes, read_certificate_expiries
from server.rounds.run_lifecycle import open_ledger

T = TypeVar("T")
log = logging.getLogger("consilium.server")


def serve_console(
    host: str,
    port: int,
    runs: Path,
    ledger_address: str,
    certificate: Path | None,
    key: Path | None,
    proxies: list[str],
    user_header: str,
    scrapers: list[str],
    superlink: str,
    ca: Path,
) -> None:
    """Until it is told to end. Raises ConsiliumError."""
    configure_logging()
    logging.getLogger("consilium").propagate = False  # the command's own handler would say it again
    if (certificate is None) != (key is None):
        raise ConsiliumError("--certificate and --key belong together")
    secure = bool(certificate or proxies)
    reach = ["--superlink", superlink, "--ca", str(ca)] if superlink else []
    address = ledger_address or os.environ.get("CONSILIUM_LEDGER", "")
    book = open_ledger(runs, ledger_address)
    trust = ProxyTrust.from_options(user_header, proxies, scrapers)
    deployed = (
        (
            cache_for(5, lambda: list_nodes(superlink, ca)),
            cache_for(3600, lambda: read_certificate_expiries(superlink, ca)),
        )
        if superlink
        else (None, dict)
    )
    app = create_app(book, runs, Launcher(runs, address, reach), trust, secure, *deployed)
    if not any(row["role"] == "operator" for row in book.read_accounts()):
        log.warning("nobody can log in yet: consilium-server account add NAME --role operator")
    if not secure and host not in ("127.0.0.1", "localhost", "::1"):
        log.warning(
            "%s is served without TLS: passwords can be read on the way; give --certificate and --key, or put it behind a --proxy",
            host,
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


def cache_for(max_age: float, fetch: Callable[[], T]) -> Callable[[], T]:
    """What `ask` says, asked for again only after so many seconds."""
    said: list[tuple[float, T]] = []

    def get_cached() -> T:
        if not said or time.monotonic() > said[-1][0] + max_age:
            said[:] = [(time.monotonic(), fetch())]
        return said[-1][1]

    return get_cached
