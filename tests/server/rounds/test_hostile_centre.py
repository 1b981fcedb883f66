"""A federation in which west replies as it likes: the run goes on, and the others' results are the same."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from flwr.proto.node_pb2 import NodeInfo
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from starlette.testclient import TestClient

import tests.upgrade.tiny_backbone  # noqa: F401  # registers tiny_net
from common.config.compose import compose_config
from common.config.schema import Config
from common.protocol.flower_records import from_records
from common.protocol.messages import Request
from server.ledger.ledger import Ledger
from server.rounds.run_lifecycle import open_ledger, start_run
from server.run import flower_transport
from server.run.flower_transport import FlowerTransport
from server.run.records import RunResult, RunStatus
from tests.benchmarks.instant_centres import SOURCES, answer
from tests.hostile_replies import MARKER, change, put_on_wire
from tests.server.dashboard.console_client import PAGES, log_in_as

HONEST = ("north", "east", "south")
WEST = 4  # the node of west, which is asked like the others
SETTINGS = [
    "federation.centres=[north,east,south,west]",
    "federation.quorum=0.75",
    "federation.join_timeout=0",
    "federation.round_retries=0",
    f"tasks.source.classes=[{','.join(SOURCES)}]",
    "backbone.name=tiny_net",
    "evaluation.histogram_bins=8",
    "evaluation.cross_site=last",
    "stage.rounds=1",
]
NUM_RUNS = int(os.environ.get("CONSILIUM_FUZZ_RUNS", "25"))


class Message:
    """A Flower message, where a real one cannot be made."""

    def __init__(self, content: Any, dst_node_id: int = 0, **_: Any) -> None:
        self.content = content
        self.node_id = dst_node_id

    def has_error(self) -> bool:
        return False


class Grid:
    """A SuperLink whose nodes reply at once; west's replies are changed at random."""

    def __init__(self, dice: random.Random | None) -> None:
        self.dice = dice
        self.sent: dict[str, Message] = {}
        self.num_changed = 0

    def get_nodes(self) -> list[NodeInfo]:
        nodes = range(1, 5) if self.dice else range(1, 4)
        return [NodeInfo(node_id=node) for node in nodes]

    def push_messages(self, messages: list[Message]) -> list[str]:
        names = [str(len(self.sent) + number) for number in range(len(messages))]
        self.sent |= dict(zip(names, messages, strict=True))
        return names

    def pull_messages(self, ids: list[str]) -> list[Message]:
        return [self._answer(self.sent[name]) for name in ids]

    def _answer(self, message: Message) -> Message:
        request = from_records(message.content)
        assert isinstance(request, Request)
        wire = put_on_wire(answer(message.node_id - 1, request))
        # Half of what west sends is honest, so that it is still there for later messages.
        if self.dice and message.node_id == WEST and self.dice.random() < 0.5:
            change(wire, self.dice)
            self.num_changed += 1
        return Message(wire.to_records())


@contextmanager
def fake_messages() -> Iterator[None]:
    with (
        patch.object(flower_transport, "Message", Message),
        patch.object(flower_transport, "DISCOVERY_INTERVAL", 0),
    ):
        yield


def run_federation(grid: Grid, runs: Path, ledger: Ledger, run_id: str) -> RunResult:
    """Return the result of a run. Raises where it ends otherwise than finished."""
    transport = FlowerTransport(grid)  # type: ignore[arg-type]
    with fake_messages():
        return start_run(compose_settings(), transport, runs, ledger, run_id)


def compose_settings() -> Config:
    return compose_config(SETTINGS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile") / "a" / "b" / "c"


@pytest.fixture(scope="module")
def ledger(folder: Path) -> Ledger:
    return open_ledger(folder / "runs")


@pytest.fixture(scope="module")
def honest_result(folder: Path, ledger: Ledger) -> RunResult:
    """The result of the run without west."""
    return run_federation(Grid(None), folder / "runs", ledger, "honest")


@pytest.fixture(scope="module")
def console(folder: Path, ledger: Ledger) -> TestClient:
    return log_in_as(ledger, runs=folder / "runs")


@settings(max_examples=NUM_RUNS, deadline=None, derandomize=True, phases=[Phase.generate])
@given(seed=st.integers(0, 2**32 - 1))
def test_run_survives_a_centre_that_replies_at_random(
    folder: Path, ledger: Ledger, honest_result: RunResult, console: TestClient, seed: int
) -> None:
    run_id = f"run-{seed}-{len(list((folder / 'runs').glob('run-*')))}"
    grid = Grid(random.Random(seed))
    result = run_federation(grid, folder / "runs", ledger, run_id)
    assert result.status is RunStatus.FINISHED
    assert (folder / "runs" / run_id / "report.html").is_file()
    for task, scores in honest_result.test.items():
        for centre in HONEST:
            assert result.test[task].centres[centre] == scores.centres[centre]
        assert result.test[task].centres.keys() <= {*HONEST, "west"}
    assert set(result.centres) <= {*HONEST, "west"}
    assert {left_out.centre for left_out in result.left_out} <= {"west"}
    for left_out in result.left_out:
        assert left_out.reason.isprintable()
        assert left_out.reason != ""
    assert_nothing_is_outside(folder)
    for page in (*PAGES, "/metrics"):
        path = page.replace("/runs/r", f"/runs/{run_id}")
        response = console.get(path)
        assert response.status_code == 200, path
        assert f"<script>{MARKER}" not in response.text


def assert_nothing_is_outside(folder: Path) -> None:
    """Every file is below the folder of the runs."""
    root = folder.parent.parent
    outside = [path for path in root.rglob("*") if path.is_file() and folder / "runs" not in path.parents]
    assert outside == []
    assert not Path(f"/tmp/{MARKER}").exists()
