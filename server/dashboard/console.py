"""What all pages of the console share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from fastapi import Request

from server.dashboard.auth import AuthGate
from server.dashboard.events import VersionedCache
from server.dashboard.launcher import Launcher
from server.ledger.ledger import Ledger
from server.monitoring.health import SuperLinkNode
from server.monitoring.run_history import RoundCache

NodeLister = Callable[[], list[SuperLinkNode]]
ExpiryReader = Callable[[], dict[str, datetime]]  # {certificate: when it expires}


@dataclass(frozen=True)
class Deployment:
    """What a deployed SuperLink can be asked; in a simulation there is none."""

    list_nodes: NodeLister | None = None
    read_certificate_expiries: ExpiryReader = dict


@dataclass
class ConsoleContext:
    """What the pages share."""

    ledger: Ledger
    runs: Path
    gate: AuthGate
    launcher: Launcher
    deployment: Deployment = field(default_factory=Deployment)
    page_cache: VersionedCache = field(default_factory=VersionedCache)
    round_cache: RoundCache = field(default_factory=RoundCache)

    @property
    def list_nodes(self) -> NodeLister | None:
        """Return the function that lists the SuperLink's nodes; None in a simulation."""
        return self.deployment.list_nodes

    def read_certificate_expiries(self) -> dict[str, datetime]:
        """Return when the deployment's certificates expire."""
        return self.deployment.read_certificate_expiries()


def get_console(request: Request) -> ConsoleContext:
    """Return the context of the application that answers a request."""
    context: ConsoleContext = request.app.state.console
    return context
