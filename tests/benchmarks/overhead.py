"""What a round costs beyond the longest centre's training, under Flower's simulation, and what it is made of.

    OMP_NUM_THREADS=1 .venv/bin/python -m tests.benchmarks.overhead [--steps 600] [--rounds 3] [overrides ...]

The real centres (client/app.py) on two phantom hospitals, both at once on two cores, the real transport
(server/app.py) and coordinator. A round is cut at the transport: asking for training, asking for scores, the
rest (spool, sum, ledger, checkpoint). What centres say they worked (`Contribution.seconds`, `Answer.seconds`)
is taken off; what is left is the federation's own.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from client.app import app as client
from client.phantom.federation import write_federation
from client.phantom.profiles import CENTRE_PROFILES
from common.config.compose import compose_config
from common.config.parse import config_to_dict
from common.protocol.messages import Request, StatisticsReply, TrainReply, TrainRequest
from server.ledger.ledger import Ledger
from server.rounds.coordinator import run_training
from server.run.flower_transport import FlowerTransport
from server.run.records import RunResult
from server.run.run_state import Run
from server.run.transport import ReceivedReply

Asked = tuple[
    str, float, float, float
]  # what, wall seconds, CPU seconds of this process, the longest centre's own seconds
CENTRES = list(CENTRE_PROFILES)[:2]


class Watched(FlowerTransport):
    """The transport, with a note of every question."""

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid)
        self.asked: list[Asked] = []

    def send_and_receive(
        self, requests: Mapping[str, Request], timeout: float
    ) -> Iterator[ReceivedReply | None]:
        began, cpu, longest = time.perf_counter(), time.process_time(), 0.0
        for received in super().send_and_receive(requests, timeout):
            if received and isinstance(received.reply, TrainReply | StatisticsReply):
                longest = max(longest, received.reply.seconds)
            yield received
        what = "train" if isinstance(next(iter(requests.values())), TrainRequest) else "query"
        self.asked.append((what, time.perf_counter() - began, time.process_time() - cpu, longest))


def main() -> None:
    """The command; see the module docstring."""
    parser = argparse.ArgumentParser(description="A round's own cost under Flower.")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("overrides", nargs="*")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        said = [
            f"federation.data_root={folder / 'data'}",
            f"federation.centres=[{','.join(CENTRES)}]",
            f"stage.local_steps={given.steps}",
        ]
        config = compose_config([*said, f"stage.rounds={given.rounds}", *given.overrides])
        assert config.federation.phantom
        write_federation(folder / "data", config.federation.phantom, CENTRES)
        found: list[tuple[list[Asked], RunResult]] = []
        server = ServerApp()

        @server.main()
        def _(grid: Grid, context: Context) -> None:
            transport = Watched(grid)
            ledger = Ledger(f"sqlite:///{folder / 'ledger.db'}")
            ledger.add_run(
                "r",
                recipe=config.recipe,
                mode="federated",
                config=config_to_dict(config),
                code_fingerprint="",
            )
            found.append((transport.asked, run_training(Run("r", config, folder, transport, ledger))))

        one: Any = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
        run_simulation(server, client, len(CENTRES), backend_config=one)
    show(*found[0])


def show(asked: list[Asked], result: RunResult) -> None:
    """The table."""
    rounds = [record for stage in result.stages for record in stage.rounds if record.round]
    first = next(k for k, a in enumerate(asked) if a[0] == "train")
    heads = (
        "round, s | longest training | training's messages | scores at the centre | scores' messages | "
        "coordinator | beyond training"
    )
    print(f"| round | {heads} |\n{'|---' * 8}|")
    beyond = []
    for r, train, query in zip(rounds, asked[first::2], asked[first + 1 :: 2], strict=False):
        rest = r.seconds - train[1] - query[1]
        beyond.append((r.seconds - train[3]) / train[3])
        cells = [r.seconds, train[3], train[1] - train[3], query[3], query[1] - query[3], rest]
        print(f"| {r.round} | {' | '.join(f'{value:.2f}' for value in cells)} | {beyond[-1]:.1%} |")
    cpu = statistics.median(a[2] for a in asked[first:])
    print(
        f"\nmedian beyond training {statistics.median(beyond):.1%}; coordinator's CPU a question "
        f"{cpu:.2f} s; load {os.getloadavg()[0]:.1f}"
    )


if __name__ == "__main__":
    main()
