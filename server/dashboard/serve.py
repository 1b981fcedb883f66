"""Serve the console by uvicorn in this process (`consilium-server dashboard`)."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import uvicorn

from common.utils.errors import ConsiliumError
from common.utils.log_setup import configure_logging
from server.dashboard.app import create_app
from server.dashboard.console import Deployment
from server.dashboard.launcher import Launcher
from server.dashboard.proxy_trust import ProxyTrust
from server.ledger.ledger import Ledger
from server.operations.superlink import list_nodes, read_certificate_expiries
from server.rounds.run_lifecycle import open_ledger

T = TypeVar("T")
NODES_MAX_AGE = 5  # seconds
CERTIFICATES_MAX_AGE = 3600  # seconds
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
log = logging.getLogger("consilium.server")


@dataclass(frozen=True)
class ConsoleOptions:
    """Where the console listens, whom it trusts, and what it shows."""

    runs: Path
    ledger_address: str = ""
    host: str = "127.0.0.1"
    port: int = 8080
    certificate: Path | None = None
    key: Path | None = None
    proxies: list[str] = field(default_factory=list)  # addresses of reverse proxies that speak TLS
    user_header: str = ""  # in which a proxy names the user
    scrapers: list[str] = field(default_factory=list)  # addresses that may read /metrics without a log-in
    superlink: str = ""  # host:port; empty: runs are simulations
    ca: Path = Path("ca.crt")

    @property
    def is_https(self) -> bool:
        """Return whether browsers reach the console by https."""
        return bool(self.certificate or self.proxies)


def serve_console(options: ConsoleOptions) -> None:
    """Serve until the process is told to end.

    Raises:
        ConsiliumError: the options contradict each other, or the ledger cannot be opened.
    """
    configure_logging()
    logging.getLogger("consilium").propagate = False  # the command's own handler would print it again
    if (options.certificate is None) != (options.key is None):
        raise ConsiliumError("--certificate and --key belong together; give both or neither")
    ledger = open_ledger(options.runs, options.ledger_address)
    ledger_address = options.ledger_address or os.environ.get("CONSILIUM_LEDGER", "")
    superlink_options: list[str] = []
    if options.superlink:
        superlink_options = ["--superlink", options.superlink, "--ca", str(options.ca)]
    app = create_app(
        ledger,
        options.runs,
        Launcher(options.runs, ledger_address, superlink_options),
        ProxyTrust.from_options(options.user_header, options.proxies, options.scrapers),
        options.is_https,
        _connect_deployment(options.superlink, options.ca),
    )
    _log_warnings(ledger, options)
    scheme = "https" if options.certificate else "http"
    log.info("the console is at %s://%s:%d", scheme, options.host, options.port)
    uvicorn.run(
        app,
        host=options.host,
        port=options.port,
        ssl_certfile=options.certificate,
        ssl_keyfile=options.key,
        proxy_headers=False,  # anybody can claim an address; the trusted header has its own rule
        server_header=False,
        access_log=False,
        log_level="warning",
        timeout_graceful_shutdown=2,  # live pages never end by themselves
    )


def cache_for(max_age: float, fetch: Callable[[], T]) -> Callable[[], T]:
    """Return a function that gives what `fetch` returned, and fetches again after `max_age` seconds."""
    cached: list[tuple[float, T]] = []

    def get_cached() -> T:
        if not cached or time.monotonic() > cached[0][0] + max_age:
            cached[:] = [(time.monotonic(), fetch())]
        return cached[0][1]

    return get_cached


def _connect_deployment(superlink: str, ca: Path) -> Deployment:
    if not superlink:
        return Deployment()
    return Deployment(
        cache_for(NODES_MAX_AGE, lambda: list_nodes(superlink, ca)),
        cache_for(CERTIFICATES_MAX_AGE, lambda: read_certificate_expiries(superlink, ca)),
    )


def _log_warnings(ledger: Ledger, options: ConsoleOptions) -> None:
    if not any(row["role"] == "operator" for row in ledger.read_accounts()):
        log.warning("nobody can log in yet; run consilium-server account add NAME --role operator")
    if not options.is_https and options.host not in LOCAL_HOSTS:
        log.warning(
            "%s is served without TLS, so that passwords can be read on the way; "
            "give --certificate and --key, or use a --proxy",
            options.host,
        )
