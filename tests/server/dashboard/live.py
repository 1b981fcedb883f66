"""A run to look at while it goes on: the coordinator in this process, each centre a process of its own that can be killed.

    python -m tests.server.dashboard.live PHANTOM RUNS RUN SECONDS [OVERRIDE ...]

The centres' process ids are written to RUNS/<centre>.pid; each reply to a training request takes SECONDS longer than it must.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Mapping
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from client.answer import answer
from client.site import Site
from common.errors import ConsiliumError
from common.messages import Presence, Refusal, Request, Train, pack, unpack
from server.runs import begin, open_ledger
from server.transport import Received
from tests.inprocess import phantom_config

LOST = "the centre's connection was lost"


def centre(line: Connection, index: int, slower: float) -> None:
    """A centre's process: one request after another."""
    torch.set_num_threads(1)
    site = Site(index=index, threads=1, device="cpu")
    while True:
        request = unpack(*line.recv())
        reply = answer(site, request)  # type: ignore[arg-type]
        time.sleep(slower * isinstance(request, Train))
        line.send(pack(reply))


class Processes:
    """server/transport.py over pipes."""

    def __init__(self, count: int, slower: float, runs: Path) -> None:
        self.lines: dict[Any, Connection] = {}
        self.runs = runs
        context = multiprocessing.get_context("fork")
        self.started = []
        for k in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=centre, args=(theirs, k, slower), daemon=True)
            process.start()
            theirs.close()
            self.started.append((process, ours))

    def greet(self, request: Request, expected: list[str], wait: float) -> Iterator[Received | None]:
        for process, line in self.started:
            reply = self._heard(line, request)
            if isinstance(reply, Presence):
                self.lines[reply.centre] = line
                (self.runs / f"{reply.centre}.pid").write_text(str(process.pid))
                yield Received(reply.centre, reply)

    def _heard(self, line: Connection, request: Request) -> Any:
        try:
            line.send(pack(request))
            return unpack(*line.recv())
        except (EOFError, OSError):
            return None

    def ask(self, requests: Mapping[str, Request], deadline: float) -> Iterator[Received | None]:
        pending: dict[Connection, str] = {}
        for name, request in requests.items():
            try:
                self.lines[name].send(pack(request))
                pending[self.lines[name]] = name
            except OSError:
                yield Received(name, Refusal(name, LOST))
        while pending:
            ready = wait(list(pending), timeout=0.3)
            for line in ready:
                name = pending.pop(line)  # type: ignore[arg-type]
                try:
                    arrays, facts = line.recv()  # type: ignore[union-attr]
                except (EOFError, OSError):
                    yield Received(name, Refusal(name, LOST))
                    continue
                down = sum(a.nbytes for a in pack(requests[name])[0].values())
                yield Received(name, unpack(arrays, facts), sum(a.nbytes for a in arrays.values()), down)  # type: ignore[arg-type]
            if not ready:
                yield None


def main() -> None:
    phantom, runs, run, slower, *overrides = sys.argv[1:]
    os.makedirs(runs, exist_ok=True)
    config = phantom_config(Path(phantom), *overrides)
    try:
        begin(config, Processes(len(config.federation.centres), float(slower), Path(runs)), Path(runs), open_ledger(Path(runs)), run)
    except ConsiliumError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
