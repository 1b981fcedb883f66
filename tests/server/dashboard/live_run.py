"""A run to look at while it goes on: the coordinator in this process, each centre a process of its own that can be killed.

    python -m tests.server.dashboard.live_run PHANTOM RUNS RUN SECONDS [OVERRIDE ...]

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

from client.federation.handlers import handle_request
from client.phantom.federation import write_federation
from client.site.config import Site
from common.protocol.message_packing import pack_message, unpack_message
from common.protocol.messages import JoinReply, Refusal, Request, TrainRequest
from common.utils.errors import ConsiliumError, RefusalCode
from server.rounds.run_lifecycle import open_ledger, start_run
from server.run.transport import ReceivedReply
from tests.in_process_federation import phantom_config

LOST = "the centre's connection was lost"


def centre(line: Connection, index: int, slower: float) -> None:
    """A centre's process: one request after another."""
    torch.set_num_threads(1)
    site = Site(index=index, threads=1, device="cpu")
    while True:
        request = unpack_message(*line.recv())
        reply = handle_request(site, request)  # type: ignore[arg-type]
        time.sleep(slower * isinstance(request, TrainRequest))
        line.send(pack_message(reply))


class Processes:
    """server/run/transport.py over pipes."""

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

    def discover(
        self, request: Request, expected: list[str], timeout: float
    ) -> Iterator[ReceivedReply | None]:
        for process, line in self.started:
            reply = self._heard(line, request)
            if isinstance(reply, JoinReply):
                self.lines[reply.centre] = line
                (self.runs / f"{reply.centre}.pid").write_text(str(process.pid))
                yield ReceivedReply(reply.centre, reply)

    def _heard(self, line: Connection, request: Request) -> Any:
        try:
            line.send(pack_message(request))
            return unpack_message(*line.recv())
        except (EOFError, OSError):
            return None

    def send_and_receive(
        self, requests: Mapping[str, Request], timeout: float
    ) -> Iterator[ReceivedReply | None]:
        pending: dict[Connection, str] = {}
        for name, request in requests.items():
            try:
                self.lines[name].send(pack_message(request))
                pending[self.lines[name]] = name
            except OSError:
                yield ReceivedReply(name, Refusal(name, LOST, code=RefusalCode.OFFLINE))
        while pending:
            ready = wait(list(pending), timeout=0.3)
            for line in ready:
                name = pending.pop(line)  # type: ignore[arg-type]
                try:
                    arrays, facts = line.recv()  # type: ignore[union-attr]
                except (EOFError, OSError):
                    yield ReceivedReply(name, Refusal(name, LOST, code=RefusalCode.OFFLINE))
                    continue
                down = sum(a.nbytes for a in pack_message(requests[name])[0].values())
                yield ReceivedReply(
                    name, unpack_message(arrays, facts), sum(a.nbytes for a in arrays.values()), down
                )  # type: ignore[arg-type]
            if not ready:
                yield None


def main() -> None:
    phantom, runs, run, slower, *overrides = sys.argv[1:]
    os.makedirs(runs, exist_ok=True)
    config = phantom_config(Path(phantom), *overrides)
    assert config.federation.phantom is not None
    write_federation(Path(phantom), config.federation.phantom, config.federation.centres)
    try:
        start_run(
            config,
            Processes(len(config.federation.centres), float(slower), Path(runs)),
            Path(runs),
            open_ledger(Path(runs)),
            run,
        )
    except ConsiliumError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
