"""Flower's grid as transport, with a grid of which every node answers at once."""

from __future__ import annotations

import os
import signal
import socket
from typing import Any

import pytest
from flwr.superlink.grid.http_grid import HttpGrid

import server.app
from common.protocol.flower_records import from_records, to_records
from common.protocol.messages import JoinReply, JoinRequest, Refusal
from server.app import FlowerTransport, pause_on_signals
from server.run.run_state import RunPaused


class Note:
    """A Flower message outside a run, where the real one cannot be made."""

    def __init__(self, content: Any, dst_node_id: int = 0, **_: Any) -> None:
        self.content, self.to = content, dst_node_id

    def has_error(self) -> bool:
        return False


class Grid:
    """Node 1 is north; node 2 has no part."""

    def __init__(self) -> None:
        self.sent: dict[str, Note] = {}

    def get_node_ids(self) -> list[int]:
        return [1, 2]

    def push_messages(self, messages: list[Note]) -> list[str]:
        names = [str(len(self.sent) + k) for k in range(len(messages))]
        self.sent |= dict(zip(names, messages, strict=True))
        return names

    def pull_messages(self, ids: list[str]) -> list[Note]:
        found = []
        for note in (self.sent[name] for name in ids):
            run = from_records(note.content).run_id  # type: ignore[union-attr]
            here = JoinReply("north", ["north"], "f", [], [], {}, {}, {}, "cpu", [run])
            found.append(Note(to_records(here if note.to == 1 else Refusal("", "no part"))))
        return found


def test_every_run_of_a_study_meets_the_centres_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.app, "Message", Note)
    transport = FlowerTransport(Grid())  # type: ignore[arg-type]
    for run in ("part-a", "part-b"):
        heard = [
            r.reply
            for r in transport.discover(JoinRequest(run, {}), ["north"], 5.0)
            if r and isinstance(r.reply, JoinReply)
        ]
        assert [said.notes for said in heard] == [[run]]
        # Within a run who is known is not asked again; who refused is.
        assert [r.centre for r in transport.discover(JoinRequest(run, {}), ["south"], 0.0) if r] == ["node 2"]


def test_a_superlink_that_stays_away_pauses_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server.app, "RECONNECT_TIMEOUT", 0.6)
    with socket.socket() as closed:  # bound, and nobody listens
        closed.bind(("127.0.0.1", 0))
        grid = HttpGrid(f"127.0.0.1:{closed.getsockname()[1]}", insecure=True, token="none")
        with pytest.raises(RunPaused, match="SuperLink has been away"):
            list(FlowerTransport(grid).discover(JoinRequest("run", {}), ["north"], 5.0))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_who_ends_the_process_pauses_the_run(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with pytest.raises(RunPaused, match=number.name), pause_on_signals():
        os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before
