"""Execute a run that the console can watch.

The coordinator is this process; each centre is a process of its own, which can be killed.

    python -m tests.server.dashboard.live_run PHANTOM RUNS RUN DELAY [OVERRIDE ...]

The centres' process ids are written to RUNS/<centre>.pid. Each reply to a training request is delayed by
DELAY seconds.
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

CONNECTION_LOST = "the centre's connection was lost"


def serve_centre(connection: Connection, index: int, delay: float) -> None:
    """Handle one request after another, as a centre's process."""
    torch.set_num_threads(1)
    site = Site(index=index, threads=1, device="cpu")
    while True:
        request = unpack_message(*connection.recv())
        reply = handle_request(site, request)  # type: ignore[arg-type]
        if isinstance(request, TrainRequest):
            time.sleep(delay)
        connection.send(pack_message(reply))


class PipeTransport:
    """The transport of server/run/transport.py over pipes to processes of this machine."""

    def __init__(self, num_centres: int, delay: float, runs: Path) -> None:
        self.connections: dict[str, Connection] = {}  # {centre: connection}, once it has joined
        self.runs = runs
        self.processes = []
        context = multiprocessing.get_context("fork")
        for index in range(num_centres):
            coordinator_end, centre_end = context.Pipe()
            process = context.Process(target=serve_centre, args=(centre_end, index, delay), daemon=True)
            process.start()
            centre_end.close()
            self.processes.append((process, coordinator_end))

    def discover(
        self, request: Request, expected: list[str], timeout: float
    ) -> Iterator[ReceivedReply | None]:
        """Ask every centre to join."""
        for process, connection in self.processes:
            reply = self._exchange(connection, request)
            if isinstance(reply, JoinReply):
                self.connections[reply.centre] = connection
                (self.runs / f"{reply.centre}.pid").write_text(str(process.pid))
                yield ReceivedReply(reply.centre, reply)

    def _exchange(self, connection: Connection, request: Request) -> Any:
        try:
            connection.send(pack_message(request))
            return unpack_message(*connection.recv())
        except (EOFError, OSError):
            return None

    def send_and_receive(
        self, requests: Mapping[str, Request], timeout: float
    ) -> Iterator[ReceivedReply | None]:
        """Send every request, and yield replies as they come; None while there is none."""
        pending: dict[Any, str] = {}  # {connection: centre}
        for centre, request in requests.items():
            connection = self.connections[centre]
            try:
                connection.send(pack_message(request))
                pending[connection] = centre
            except OSError:
                yield _make_lost_reply(centre)
        while pending:
            ready = wait(list(pending), timeout=0.3)
            for connection in ready:
                centre = pending.pop(connection)
                yield _receive_reply(connection, centre, requests[centre])  # type: ignore[arg-type]
            if not ready:
                yield None


def _receive_reply(connection: Connection, centre: str, request: Request) -> ReceivedReply:
    try:
        arrays, metadata = connection.recv()
    except (EOFError, OSError):
        return _make_lost_reply(centre)
    sent_arrays, _ = pack_message(request)
    bytes_up = sum(array.nbytes for array in arrays.values())
    bytes_down = sum(array.nbytes for array in sent_arrays.values())
    reply = unpack_message(arrays, metadata)
    return ReceivedReply(centre, reply, bytes_up, bytes_down)  # type: ignore[arg-type]


def _make_lost_reply(centre: str) -> ReceivedReply:
    return ReceivedReply(centre, Refusal(centre, CONNECTION_LOST, code=RefusalCode.OFFLINE))


def main() -> None:
    """Execute the run of the command line."""
    phantom_folder, runs_folder, run_id, delay, *overrides = sys.argv[1:]
    phantom, runs = Path(phantom_folder), Path(runs_folder)
    os.makedirs(runs, exist_ok=True)
    config = phantom_config(phantom, *overrides)
    assert config.federation.phantom is not None
    write_federation(phantom, config.federation.phantom, config.federation.centres)
    transport = PipeTransport(len(config.federation.centres), float(delay), runs)
    try:
        start_run(config, transport, runs, open_ledger(runs), run_id)
    except ConsiliumError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
