"""Is every centre there? Online, degraded or offline, with the reason and when it was last seen.

In a deployment the SuperLink's heartbeats say who is connected (server/deployed.py `nodes`); in a simulation a centre was last seen when it last
replied. What a run refused or left out makes a connected centre degraded, until a contribution of it is used again.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

from server import latest
from server.ledger import Ledger, Row

SILENT = ("not connected", "no reply within", "nothing heard", "connection was lost", "message was lost", "client application failed")


class Node(NamedTuple):
    """A centre as the SuperLink knows it."""

    centre: str
    online: bool
    since: datetime | None  # of its present connection, or of its end; None: it never connected
    seen: datetime | None  # its last heartbeat, to a minute


class Health(NamedTuple):
    """How a centre is. `state`: online | degraded | offline; `reason` is empty of one that is online."""

    centre: str
    state: str
    reason: str
    seen: datetime | None
    up: datetime | None = None  # connected without a break since; None: not connected, or a simulation
    facts: dict[str, Any] = {}  # noqa: RUF012  what it said when it joined the run, as in the ledger (a NamedTuple's default, never changed)


def federation(ledger: Ledger, run: str = "", nodes: Sequence[Node] | None = None) -> list[Health]:
    """Every centre of the run, or of the SuperLink where there is no run. `nodes`: None in a simulation."""
    config: dict[str, Any] = next((row["config"] for row in ledger.runs() if row["id"] == run), {})
    said = {row["centre"]: row for row in ledger.centres(run)} if run else {}
    used = {row["centre"]: row for row in latest.used(ledger, run)} if run else {}
    faults = {row["centre"]: row for row in latest.faults(ledger, run)} if run else {}
    linked = {node.centre: node for node in nodes or []}
    federated = config.get("federation", {})
    expected = ["pooled"] if federated.get("mode") == "central" else federated.get("centres", [])
    names = dict.fromkeys([*expected, *said, *linked])
    return [_health(name, said.get(name), used.get(name), faults.get(name), linked.get(name), nodes is not None) for name in names]


def _health(centre: str, said: Row | None, used: Row | None, fault: Row | None, node: Node | None, deployed: bool) -> Health:
    replies = [row[key] for row, key in ((said, "time"), (used, "closed")) if row]
    good = max(replies, default=None)
    if fault and good and fault["time"] <= good:
        fault = None
    why = fault["detail"] if fault else ""
    silent = any(text in why for text in SILENT)
    heard = max([*replies, *([fault["time"]] if fault and not silent else [])], default=None)
    seen = node.seen if node else heard
    facts = dict(said["facts"]) if said else {}
    if deployed and not node:
        return Health(centre, "offline", "the SuperLink does not know it: let it in with `consilium-server admit`", heard, None, facts)
    if node and not node.online:
        return Health(centre, "offline", "no heartbeat" if node.since else "it has never connected", seen, None, facts)
    up = node.since if node else None
    if fault:
        return Health(centre, "offline" if silent and not node else "degraded", why, seen, up, facts)
    if not node and not good:
        return Health(centre, "offline", "nothing heard of it in this run", None, None, facts)
    return Health(centre, "online", "", seen, up, facts)
