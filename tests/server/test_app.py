"""Flower's grid as transport, with a fake grid whose nodes reply at once; signals; the log of a run's end."""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
from typing import Any

import pytest
from flwr.proto.node_pb2 import NodeInfo
from flwr.superlink.grid.http_grid import HttpGrid

from common.protocol.flower_records import from_records, to_records
from common.protocol.messages import JoinReply, JoinRequest, Refusal
from common.utils.errors import ConsiliumError, RefusalCode
from server.app import drop_traceback
from server.run import flower_transport
from server.run.flower_transport import FlowerTransport
from server.run.run_state import RunPaused
from server.run.stop_signal import StopSignal


class FakeMessage:
    """A Flower message outside a run, where a real one cannot be made."""

    def __init__(self, content: Any, dst_node_id: int = 0, **_: Any) -> None:
        self.content = content
        self.node_id = dst_node_id

    def has_error(self) -> bool:
        return False


class FakeGrid:
    """Node 1 is north; node 2 has no part in the run."""

    def __init__(self) -> None:
        self.sent: dict[str, FakeMessage] = {}

    def get_nodes(self) -> list[NodeInfo]:
        return [NodeInfo(node_id=1), NodeInfo(node_id=2)]

    def push_messages(self, messages: list[FakeMessage]) -> list[str]:
        names = [str(len(self.sent) + k) for k in range(len(messages))]
        self.sent |= dict(zip(names, messages, strict=True))
        return names

    def pull_messages(self, ids: list[str]) -> list[FakeMessage]:
        replies = []
        for message in (self.sent[name] for name in ids):
            run_id = from_records(message.content).run_id  # type: ignore[union-attr]
            reply: JoinReply | Refusal = Refusal("", "no part")
            if message.node_id == 1:
                reply = JoinReply("north", ["north"], "f", [], [], {}, {}, {}, "cpu", [run_id])
            replies.append(FakeMessage(to_records(reply)))
        return replies


class RegisteredGrid(FakeGrid):
    """Three nodes that all say they are north; their keys are registered, or are not, under these names."""

    names = ("", "", "")

    def get_nodes(self) -> list[NodeInfo]:
        return [NodeInfo(node_id=number, name=name) for number, name in enumerate(self.names, 1)]

    def pull_messages(self, ids: list[str]) -> list[FakeMessage]:
        reply = JoinReply("north", ["north"], "f", [], [], {}, {}, {}, "cpu")
        return [FakeMessage(to_records(reply)) for _ in ids]


class SilentGrid(FakeGrid):
    """A SuperLink that is away: no call returns."""

    def get_nodes(self) -> list[NodeInfo]:
        time.sleep(60)
        return []


def test_every_run_of_a_cross_validation_asks_the_nodes_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower_transport, "Message", FakeMessage)
    transport = FlowerTransport(FakeGrid())  # type: ignore[arg-type]
    for run_id in ("fold-a", "fold-b"):
        replies = []
        for received in transport.discover(JoinRequest(run_id, {}), ["north"], 5.0):
            if received and isinstance(received.reply, JoinReply):
                replies.append(received.reply)
        assert [reply.notes for reply in replies] == [[run_id]]
        # Within a run, a centre that has joined is not asked again; one that was refused is.
        again = [r for r in transport.discover(JoinRequest(run_id, {}), ["south"], 0.0) if r]
        assert [received.centre for received in again] == ["node 2"]


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("", "", ""), {"north": 1, "node 2": 0, "node 3": 0}),  # a simulation: the first remains
        (("", "north", "south"), {"node 1": 0, "north": 2, "south": 0}),  # the key decides
    ],
)
def test_no_node_takes_the_name_of_another_centre(
    monkeypatch: pytest.MonkeyPatch, names: tuple[str, str, str], expected: dict[str, int]
) -> None:
    monkeypatch.setattr(flower_transport, "Message", FakeMessage)
    grid = RegisteredGrid()
    grid.names = names
    transport = FlowerTransport(grid)  # type: ignore[arg-type]
    received = [r for r in transport.discover(JoinRequest("r", {}), ["north", "south"], 0.0) if r]
    assert [reply.centre for reply in received] == list(expected)
    joined = [reply.centre for reply in received if isinstance(reply.reply, JoinReply)]
    assert transport.directory.node_ids == {"north": expected["north"]}
    assert joined == ["north"]
    refused = [reply.reply for reply in received if isinstance(reply.reply, Refusal)]
    assert {refusal.code for refusal in refused} == {RefusalCode.BAD_REPLY}


def test_unreachable_superlink_pauses_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower_transport, "RECONNECT_TIMEOUT", 0.6)
    with socket.socket() as closed:  # bound, but not listening
        closed.bind(("127.0.0.1", 0))
        grid = HttpGrid(f"127.0.0.1:{closed.getsockname()[1]}", insecure=True, token="none")
        with pytest.raises(RunPaused, match="SuperLink has been away"):
            list(FlowerTransport(grid).discover(JoinRequest("run", {}), ["north"], 5.0))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_is_noted_and_pauses_the_run_when_polled(number: signal.Signals) -> None:
    handler_before = signal.getsignal(number)
    stop_signal = StopSignal()
    with stop_signal.listen():
        os.kill(os.getpid(), number)  # the handler does not raise
        with pytest.raises(RunPaused, match=number.name):
            stop_signal.raise_if_set()
    assert signal.getsignal(number) is handler_before


def test_signal_ends_the_wait_for_a_superlink_that_is_away() -> None:
    stop_signal = StopSignal()
    stop_signal.set(signal.SIGTERM)
    transport = FlowerTransport(SilentGrid(), stop_signal)  # type: ignore[arg-type]
    with pytest.raises(RunPaused, match="SIGTERM"):
        list(transport.discover(JoinRequest("run", {}), ["north"], 5.0))


def test_expected_errors_are_logged_without_a_traceback() -> None:
    def log_record(error: Exception) -> logging.LogRecord:
        try:
            raise error
        except Exception:
            return logging.LogRecord("flwr", logging.ERROR, "", 0, "%s failed", ("App",), sys.exc_info())

    record = log_record(ConsiliumError("the disk is full"))
    assert drop_traceback(record)
    assert (record.getMessage(), record.exc_info) == ("App failed: the disk is full", None)
    record = log_record(ValueError("a bug"))
    assert drop_traceback(record)
    assert record.exc_info is not None
