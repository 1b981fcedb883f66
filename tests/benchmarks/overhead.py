"""Measure what a round costs beyond the longest centre's training, under Flower's simulation.

    OMP_NUM_THREADS=1 .venv/bin/python -m tests.benchmarks.overhead [--steps 600] [--rounds 3] [overrides ...]

The real centres (client/app.py) run on two phantom hospitals, both at once on two cores, with the real
transport (server/run/flower_transport.py) and coordinator. A round is divided at the transport: the request
for training, the request for scores, and the rest (spool, sum, ledger, checkpoint). The working time that the
centres report (`seconds` of TrainReply and StatisticsReply) is subtracted; what is left is the federation's
own.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.simulation import run_simulation

from client.app import app as client_app
from client.phantom.federation import write_federation
from client.phantom.profiles import CENTRE_PROFILES
from common.config.compose import compose_config
from common.config.parse import config_to_dict
from common.config.schema import Config
from common.protocol.messages import Request, StatisticsReply, TrainReply, TrainRequest
from server.ledger.ledger import Ledger
from server.rounds.coordinator import run_training
from server.run.flower_transport import FlowerTransport
from server.run.records import RoundRecord, RunResult
from server.run.run_state import Run
from server.run.transport import ReceivedReply
from tests.benchmarks.measuring import format_header, format_row

CENTRES = list(CENTRE_PROFILES)[:2]
TITLES = [
    "round",
    "round, s",
    "longest training",
    "training's messages",
    "scores at the centre",
    "scores' messages",
    "coordinator",
    "beyond training",
]


@dataclass(frozen=True)
class Exchange:
    """One request to all centres, until the last reply."""

    is_training: bool
    wall_seconds: float
    cpu_seconds: float  # of this process
    longest_work: float  # seconds of the centre that worked longest

    @property
    def message_seconds(self) -> float:
        return self.wall_seconds - self.longest_work


class RecordingTransport(FlowerTransport):
    """The Flower transport, which also records every exchange."""

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid)
        self.exchanges: list[Exchange] = []

    def send_and_receive(
        self, requests: Mapping[str, Request], timeout: float
    ) -> Iterator[ReceivedReply | None]:
        wall_start = time.perf_counter()
        cpu_start = time.process_time()
        longest_work = 0.0
        for received in super().send_and_receive(requests, timeout):
            if received and isinstance(received.reply, TrainReply | StatisticsReply):
                longest_work = max(longest_work, received.reply.seconds)
            yield received
        exchange = Exchange(
            is_training=isinstance(next(iter(requests.values())), TrainRequest),
            wall_seconds=time.perf_counter() - wall_start,
            cpu_seconds=time.process_time() - cpu_start,
            longest_work=longest_work,
        )
        self.exchanges.append(exchange)


def run_federation(config: Config, folder: Path) -> tuple[RunResult, list[Exchange]]:
    """Train under Flower's simulation; return the result and every exchange."""
    outcomes: list[tuple[RunResult, list[Exchange]]] = []
    server_app = ServerApp()

    @server_app.main()
    def run_server(grid: Grid, context: Context) -> None:
        transport = RecordingTransport(grid)
        ledger = Ledger(f"sqlite:///{folder / 'ledger.db'}")
        config_values = config_to_dict(config)
        ledger.add_run("r", recipe=config.recipe, mode="federated", config=config_values, code_fingerprint="")
        result = run_training(Run("r", config, folder, transport, ledger))
        outcomes.append((result, transport.exchanges))

    backend: Any = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server_app, client_app, len(CENTRES), backend_config=backend)
    return outcomes[0]


def compute_overhead(round_record: RoundRecord, training: Exchange) -> float:
    """The round's time beyond the longest training, as a share of that."""
    return (round_record.seconds - training.longest_work) / training.longest_work


def format_round(round_record: RoundRecord, training: Exchange, scoring: Exchange) -> str:
    seconds = [
        round_record.seconds,
        training.longest_work,
        training.message_seconds,
        scoring.longest_work,
        scoring.message_seconds,
        round_record.seconds - training.wall_seconds - scoring.wall_seconds,
    ]
    overhead = f"{compute_overhead(round_record, training):.1%}"
    return format_row([round_record.round, *(f"{value:.2f}" for value in seconds), overhead])


def print_table(result: RunResult, exchanges: list[Exchange]) -> None:
    """Print a row for each round but 0, and the medians."""
    round_records: list[RoundRecord] = []
    for stage in result.stages:
        round_records += [round_record for round_record in stage.rounds if round_record.round]
    is_training = [exchange.is_training for exchange in exchanges]
    in_rounds = exchanges[is_training.index(True) :]  # training and scoring take turns
    print(format_header(TITLES))
    overheads = []
    for round_record, training, scoring in zip(round_records, in_rounds[::2], in_rounds[1::2], strict=False):
        overheads.append(compute_overhead(round_record, training))
        print(format_round(round_record, training, scoring))
    cpu_seconds = statistics.median(exchange.cpu_seconds for exchange in in_rounds)
    print(
        f"\nmedian beyond training {statistics.median(overheads):.1%}; coordinator's CPU a question "
        f"{cpu_seconds:.2f} s; load {os.getloadavg()[0]:.1f}"
    )


def main() -> None:
    """Run the command that the module's docstring describes."""
    parser = argparse.ArgumentParser(description="A round's cost beyond training, under Flower.")
    parser.add_argument("--steps", type=int, default=600, help="local steps a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("overrides", nargs="*", help="of the configuration")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        overrides = [
            f"federation.data_root={folder / 'data'}",
            f"federation.centres=[{','.join(CENTRES)}]",
            f"stage.local_steps={arguments.steps}",
            f"stage.rounds={arguments.rounds}",
            *arguments.overrides,
        ]
        config = compose_config(overrides)
        assert config.federation.phantom
        write_federation(folder / "data", config.federation.phantom, CENTRES)
        result, exchanges = run_federation(config, folder)
    print_table(result, exchanges)


if __name__ == "__main__":
    main()
