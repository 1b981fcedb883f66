"""Who is there: from a real run's ledger, and from what a SuperLink says."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.superlink.federation import NoOpFederationManager

from common.protocol.messages import Reply, Request, TrainReply, TrainRequest
from server.monitoring.health import SuperLinkNode, centre_health
from server.operations.superlink import to_node
from server.rounds.run_lifecycle import open_ledger, start_run
from tests.in_process_federation import InProcess, phantom_config, sites


def test_online_degraded_and_offline_with_the_reason(tmp_path: Path) -> None:
    """South falls silent in the last round, west sends what cannot be used; north was left out once and is back."""

    def hook(centre: str, request: Request, reply: Reply) -> Reply | None:
        if isinstance(request, TrainRequest) and isinstance(reply, TrainReply):
            if (centre, request.round) in (("north", 1), ("west", 2)):
                reply.encoded_delta["scales"] = np.full_like(
                    reply.encoded_delta["scales"], 0x7F80
                )  # infinite
            if (centre, request.round) == ("south", 2):
                return None
        return reply

    policy = tmp_path / "policy.yaml"
    policy.write_text("min_cell_count: 2\nrecipes: [multisource]\n")
    config = phantom_config(tmp_path / "data", "federation.quorum=0.5")
    ledger = open_ledger(tmp_path)
    start_run(
        config,
        InProcess([replace(site, policy=str(policy)) for site in sites()], hook),
        tmp_path,
        ledger,
        "r",
    )
    found = {one.centre: one for one in centre_health(ledger, "r")}
    assert {name: one.state for name, one in found.items()} == {
        "north": "online", "east": "online", "south": "offline", "west": "degraded"}  # fmt: skip
    assert "no reply within" in found["south"].reason
    assert found["west"].reason == "not finite"
    assert found["south"].last_seen < found["north"].last_seen  # type: ignore[operator]
    assert found["east"].metadata["policy"] == {"min_cell_count": 2, "recipes": ["multisource"]}
    assert found["east"].metadata["scans"]["train"] > 0

    now = datetime.now(UTC)
    nodes = [
        SuperLinkNode("north", True, now - timedelta(hours=3), now),
        SuperLinkNode("east", False, now - timedelta(minutes=9), now - timedelta(minutes=9)),
        SuperLinkNode("west", False, None, None),
    ]
    deployed = {one.centre: one for one in centre_health(ledger, "r", nodes)}
    assert (deployed["north"].state, deployed["north"].connected_since) == (
        "online",
        now - timedelta(hours=3),
    )
    assert (deployed["east"].state, deployed["east"].reason, deployed["east"].last_seen) == (
        "offline",
        "no heartbeat",
        nodes[1].last_seen,
    )
    assert deployed["west"].reason == "it has never connected"
    assert "does not know it" in deployed["south"].reason
    assert [one.state for one in centre_health(ledger, "", nodes)] == [
        "online",
        "offline",
        "offline",
    ]  # before there is any run


def test_a_superlinks_own_words_are_understood() -> None:
    """By Flower's link state, as the SuperLink keeps it: a node that never came, one that is there, one that has left."""
    state = InMemoryLinkState(NoOpFederationManager(), InMemoryObjectStore())
    ids = {
        name: state.create_node("us", "us", name.encode(), 30.0, name=name)
        for name in ("north", "east", "west")
    }
    for name in ("north", "east"):
        state.activate_node(ids[name], 30.0)
    state.deactivate_node(ids["east"])
    found = {one.centre: one for one in map(to_node, state.get_node_info())}
    now = datetime.now(UTC)
    assert (found["north"].is_online, found["east"].is_online, found["west"].is_online) == (
        True,
        False,
        False,
    )
    for name in ("north", "east"):
        assert now - timedelta(minutes=1) < found[name].status_since <= now  # type: ignore[operator]
        assert now - timedelta(minutes=1) < found[name].last_seen <= now  # type: ignore[operator]
    assert (found["west"].status_since, found["west"].last_seen) == (None, None)
