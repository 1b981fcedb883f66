"""Who is there: from a real run's ledger, and from what a SuperLink says."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.superlink.federation import NoOpFederationManager

from common.messages import Contribution, Reply, Request, Train
from server.deployed import understood
from server.health import Node, federation
from server.runs import begin, open_ledger
from tests.inprocess import InProcess, phantom_config, sites


def test_online_degraded_and_offline_with_the_reason(tmp_path: Path) -> None:
    """South falls silent in the last round, west sends what cannot be used; north was left out once and is back."""

    def hook(centre: str, request: Request, reply: Reply) -> Reply | None:
        if isinstance(request, Train) and isinstance(reply, Contribution):
            if (centre, request.round) in (("north", 1), ("west", 2)):
                reply.coded["scales"] = np.full_like(reply.coded["scales"], 0x7F80)  # infinite
            if (centre, request.round) == ("south", 2):
                return None
        return reply

    policy = tmp_path / "policy.yaml"
    policy.write_text("smallest_cell: 2\nrecipes: [multisource]\n")
    config = phantom_config(tmp_path / "data", "federation.quorum=0.5")
    ledger = open_ledger(tmp_path)
    begin(config, InProcess([replace(site, policy=str(policy)) for site in sites()], hook), tmp_path, ledger, "r")
    found = {one.centre: one for one in federation(ledger, "r")}
    assert {name: one.state for name, one in found.items()} == {
        "north": "online", "east": "online", "south": "offline", "west": "degraded"}  # fmt: skip
    assert "no reply within" in found["south"].reason
    assert found["west"].reason == "not finite"
    assert found["south"].seen < found["north"].seen  # type: ignore[operator]
    assert found["east"].facts["policy"] == {"smallest_cell": 2, "recipes": ["multisource"]}
    assert found["east"].facts["scans"]["train"] > 0

    now = datetime.now(UTC)
    nodes = [
        Node("north", True, now - timedelta(hours=3), now),
        Node("east", False, now - timedelta(minutes=9), now - timedelta(minutes=9)),
        Node("west", False, None, None),
    ]
    deployed = {one.centre: one for one in federation(ledger, "r", nodes)}
    assert (deployed["north"].state, deployed["north"].up) == ("online", now - timedelta(hours=3))
    assert (deployed["east"].state, deployed["east"].reason, deployed["east"].seen) == ("offline", "no heartbeat", nodes[1].seen)
    assert deployed["west"].reason == "it has never connected"
    assert "does not know it" in deployed["south"].reason
    assert [one.state for one in federation(ledger, "", nodes)] == ["online", "offline", "offline"]  # before there is any run


def test_a_superlinks_own_words_are_understood() -> None:
    """By Flower's link state, as the SuperLink keeps it: a node that never came, one that is there, one that has left."""
    state = InMemoryLinkState(NoOpFederationManager(), InMemoryObjectStore())
    ids = {name: state.create_node("us", "us", name.encode(), 30.0, name=name) for name in ("north", "east", "west")}
    for name in ("north", "east"):
        state.activate_node(ids[name], 30.0)
    state.deactivate_node(ids["east"])
    found = {one.centre: one for one in map(understood, state.get_node_info())}
    now = datetime.now(UTC)
    assert (found["north"].online, found["east"].online, found["west"].online) == (True, False, False)
    for name in ("north", "east"):
        assert now - timedelta(minutes=1) < found[name].since <= now  # type: ignore[operator]
        assert now - timedelta(minutes=1) < found[name].seen <= now  # type: ignore[operator]
    assert (found["west"].since, found["west"].seen) == (None, None)
