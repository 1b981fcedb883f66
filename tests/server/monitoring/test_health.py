"""The health of centres, from a real run's ledger and from the nodes of a SuperLink."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
from flwr.server.superlink.linkstate.in_memory_linkstate import InMemoryLinkState
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.superlink.federation import NoOpFederationManager

from common.protocol.messages import Reply, Request, TrainReply, TrainRequest
from common.utils.errors import RefusalCode
from server.ledger.ledger import Ledger
from server.monitoring.health import CentreState, SuperLinkNode, centre_health
from server.operations.superlink import to_node
from server.rounds.run_lifecycle import open_ledger, start_run
from server.run.records import CentreRound, RoundRecord
from tests.in_process_federation import InProcess, phantom_config, sites

INFINITE_BF16 = 0x7F80
START = datetime(2026, 3, 1, 12, tzinfo=UTC)


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Ledger:
    """The ledger of a run in which centres fail.

    North is left out in the first round and accepted in the second. In the second round south does not reply,
    and west sends an update that cannot be used.
    """
    folder = tmp_path_factory.mktemp("health")

    def fail(centre: str, request: Request, reply: Reply) -> Reply | None:
        if isinstance(request, TrainRequest) and isinstance(reply, TrainReply):
            if (centre, request.round) in (("north", 1), ("west", 2)):
                scales = reply.encoded_delta["scales"]
                reply.encoded_delta["scales"] = np.full_like(scales, INFINITE_BF16)
            if (centre, request.round) == ("south", 2):
                return None
        return reply

    policy = folder / "policy.yaml"
    policy.write_text("min_cell_count: 2\nallowed_labels: [covid, source]\n")
    config = phantom_config(folder / "data", "federation.quorum=0.5")
    ledger = open_ledger(folder)
    nodes = [replace(site, policy=str(policy)) for site in sites()]
    start_run(config, InProcess(nodes, fail), folder, ledger, "r")
    return ledger


def test_state_follows_from_the_last_replies(ledger: Ledger) -> None:
    health = {centre.centre: centre for centre in centre_health(ledger, "r")}
    assert {name: centre.state for name, centre in health.items()} == {
        "north": CentreState.ONLINE,
        "east": CentreState.ONLINE,
        "south": CentreState.OFFLINE,
        "west": CentreState.DEGRADED,
    }
    assert "no reply within" in health["south"].reason
    assert health["west"].reason == "not finite"
    assert health["south"].last_seen < health["north"].last_seen  # type: ignore[operator]


def test_report_holds_what_a_centre_said_when_it_joined(ledger: Ledger) -> None:
    health = {centre.centre: centre for centre in centre_health(ledger, "r")}
    report = health["east"].report
    assert report is not None
    assert report.policy == {"min_cell_count": 2, "allowed_labels": ["covid", "source"]}
    assert report.scans["train"] > 0


def test_state_follows_from_the_superlinks_heartbeats(ledger: Ledger) -> None:
    now = datetime.now(UTC)
    nodes = [
        SuperLinkNode("north", True, now - timedelta(hours=3), now),
        SuperLinkNode("east", False, now - timedelta(minutes=9), now - timedelta(minutes=9)),
        SuperLinkNode("west", False, None, None),
    ]
    health = {centre.centre: centre for centre in centre_health(ledger, "r", nodes)}
    assert health["north"].state == CentreState.ONLINE
    assert health["north"].connected_since == now - timedelta(hours=3)
    assert health["east"].state == CentreState.OFFLINE
    assert health["east"].reason == "no heartbeat"
    assert health["east"].last_seen == nodes[1].last_seen
    assert health["west"].reason == "it has never connected"
    assert "unknown to the SuperLink" in health["south"].reason
    states_before_any_run = [centre.state for centre in centre_health(ledger, "", nodes)]
    assert states_before_any_run == [CentreState.ONLINE, CentreState.OFFLINE, CentreState.OFFLINE]


@pytest.mark.parametrize(
    ("code", "state"),
    [
        (RefusalCode.OFFLINE, CentreState.OFFLINE),
        (RefusalCode.BAD_REPLY, CentreState.DEGRADED),
        (RefusalCode.POLICY, CentreState.DEGRADED),
    ],
)
def test_state_follows_from_the_code_and_not_the_words(
    tmp_path: Path, code: RefusalCode, state: CentreState
) -> None:
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    config = {"federation": {"centres": ["north"]}}
    ledger.add_run("r", recipe="multisource", mode="federated", config=config, code_fingerprint="f")
    accepted = RoundRecord(1, centres={"north": CentreRound(accepted=True)})
    ledger.add_round("r", "main", accepted, started=START, close_reason="all replied")
    ledger.log_event("r", "left_out", "no reply within 60 s", "north", code)
    (north,) = centre_health(ledger, "r")
    assert north.state == state


def test_nodes_are_read_from_flowers_link_state() -> None:
    """North is connected, east has left, and west has never come."""
    link_state = InMemoryLinkState(NoOpFederationManager(), InMemoryObjectStore())
    node_ids = {}
    for name in ("north", "east", "west"):
        node_ids[name] = link_state.create_node("us", "us", name.encode(), 30.0, name=name)
    for name in ("north", "east"):
        link_state.activate_node(node_ids[name], 30.0)
    link_state.deactivate_node(node_ids["east"])
    nodes = {node.centre: node for node in map(to_node, link_state.get_node_info())}
    now = datetime.now(UTC)
    is_online = {name: node.is_online for name, node in nodes.items()}
    assert is_online == {"north": True, "east": False, "west": False}
    for name in ("north", "east"):
        assert now - timedelta(minutes=1) < nodes[name].status_since <= now  # type: ignore[operator]
        assert now - timedelta(minutes=1) < nodes[name].last_seen <= now  # type: ignore[operator]
    assert (nodes["west"].status_since, nodes["west"].last_seen) == (None, None)
