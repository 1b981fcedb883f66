"""Is every centre there? Online, degraded or offline, with the reason and when it was last seen.

In a deployment the SuperLink's heartbeats say who is connected (server/operations/superlink.py `nodes`); in a simulation a centre was last seen when it last
replied. What a run refused or left out makes a connected centre degraded, until a contribution of it is used again.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any, NamedTuple

from server.ledger import views
from server.ledger.ledger import Ledger, Row

SILENCE_PHRASES = (
    "not connected",
    "no reply within",
    "nothing heard",
    "connection was lost",
    "message was lost",
    "client application failed",
)


class SuperLinkNode(NamedTuple):
    """A centre as the SuperLink knows it."""

    centre: str
    is_online: bool
    status_since: datetime | None  # of its present connection, or of its end; None: it never connected
    last_seen: datetime | None  # its last heartbeat, to a minute


class CentreHealth(NamedTuple):
    """How a centre is. `state`: online | degraded | offline; `reason` is empty of one that is online."""

    centre: str
    state: str
    reason: str
    last_seen: datetime | None
    connected_since: datetime | None = (
        None  # connected without a break since; None: not connected, or a simulation
    )
    metadata: dict[str, Any] = {}  # noqa: RUF012  what it said when it joined the run, as in the ledger (a NamedTuple's default, never changed)


def centre_health(
    ledger: Ledger, run_id: str = "", nodes: Sequence[SuperLinkNode] | None = None
) -> list[CentreHealth]:
    """Every centre of the run, or of the SuperLink where there is no run. `nodes`: None in a simulation."""
    config: dict[str, Any] = next((row["config"] for row in ledger.read_runs() if row["id"] == run_id), {})
    said = {row["centre"]: row for row in ledger.read_centres(run_id)} if run_id else {}
    used = {row["centre"]: row for row in views.last_accepted(ledger, run_id)} if run_id else {}
    faults = {row["centre"]: row for row in views.last_failures(ledger, run_id)} if run_id else {}
    linked = {node.centre: node for node in nodes or []}
    federated = config.get("federation", {})
    expected = ["pooled"] if federated.get("mode") == "central" else federated.get("centres", [])
    names = dict.fromkeys([*expected, *said, *linked])
    return [
        _assess_centre(
            name, said.get(name), used.get(name), faults.get(name), linked.get(name), nodes is not None
        )
        for name in names
    ]


def _assess_centre(
    centre: str,
    joined: Row | None,
    last_accepted: Row | None,
    last_failure: Row | None,
    node: SuperLinkNode | None,
    is_deployed: bool,
) -> CentreHealth:
    replies = [row[key] for row, key in ((joined, "time"), (last_accepted, "closed")) if row]
    good = max(replies, default=None)
    if last_failure and good and last_failure["time"] <= good:
        last_failure = None
    why = last_failure["detail"] if last_failure else ""
    silent = any(text in why for text in SILENCE_PHRASES)
    heard = max([*replies, *([last_failure["time"]] if last_failure and not silent else [])], default=None)
    seen = node.last_seen if node else heard
    facts = dict(joined["facts"]) if joined else {}
    if is_deployed and not node:
        return CentreHealth(
            centre,
            "offline",
            "the SuperLink does not know it: let it in with `consilium-server admit`",
            heard,
            None,
            facts,
        )
    if node and not node.is_online:
        return CentreHealth(
            centre,
            "offline",
            "no heartbeat" if node.status_since else "it has never connected",
            seen,
            None,
            facts,
        )
    up = node.status_since if node else None
    if last_failure:
        return CentreHealth(centre, "offline" if silent and not node else "degraded", why, seen, up, facts)
    if not node and not good:
        return CentreHealth(centre, "offline", "nothing heard of it in this run", None, None, facts)
    return CentreHealth(centre, "online", "", seen, up, facts)
