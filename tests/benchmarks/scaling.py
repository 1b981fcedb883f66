"""Measure how a round's time and the coordinator's memory grow with the number of centres.

    .venv/bin/python -m tests.benchmarks.scaling [--centres 4,16,64,256] [--flower 4,16] [--backbone
    tf_efficientnet_b0] [--out FOLDER]

Prints a table and writes a picture (scaling.html). The coordinator's own rounds run, with every request
packed and every reply unpacked as in a federation; the centres answer at once
(tests/benchmarks/instant_centres.py), so that the time is the federation's own. `--centres` calls them in
this process; `--flower` puts Flower's simulation (Ray actors) and the Flower transport between. Each size
runs in a process of its own. Time is between the beginnings of two rounds, the median of several; CPU is
this process's; memory is its anonymous memory (RssAnon) beyond the start of the first round, in models.
Contributions are spooled to a temporary folder: set TMPDIR to a disk with room for one model a centre.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.config.parse import config_to_dict
from common.modeling.model import make_model
from common.modeling.parameters import build_layout
from common.protocol.messages import Request, TrainRequest
from server.ledger.ledger import Ledger
from server.rounds.coordinator import run_training
from server.run.flower_transport import FlowerTransport
from server.run.run_state import Run
from server.run.transport import ReceivedReply, Transport
from tests.benchmarks.instant_centres import InstantCentres, client_app, compose_federation, encode_change
from tests.benchmarks.measuring import AnonymousMemoryPeak, format_header, format_row

COST_MARK = '{"centres"'  # how the line of a `RunCost` begins


@dataclass(frozen=True)
class RunCost:
    """What a round of a run with so many centres costs."""

    centres: int
    seconds: float
    cpu_seconds: float
    memory: float  # in models
    model_bytes: int
    bytes_up: int
    bytes_down: int


# --- one run


class RoundClock:
    """A transport that notes when each round's training is requested."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.wall_times: list[float] = []
        self.cpu_times: list[float] = []

    def discover(
        self, request: Request, expected: list[str], timeout: float
    ) -> Iterator[ReceivedReply | None]:
        return self.transport.discover(request, expected, timeout)

    def send_and_receive(
        self, requests: Mapping[str, Request], timeout: float
    ) -> Iterator[ReceivedReply | None]:
        if isinstance(next(iter(requests.values())), TrainRequest):
            self.wall_times.append(time.perf_counter())
            self.cpu_times.append(time.process_time())
        yield from self.transport.send_and_receive(requests, timeout)


def measure_run(transport: Transport, num_centres: int, backbone: str, folder: Path) -> RunCost:
    """Run `ROUNDS` rounds and measure them."""
    config = compose_federation(num_centres, backbone)
    config_values = config_to_dict(config)
    ledger = Ledger(f"sqlite:///{folder / 'ledger.db'}")
    ledger.add_run("r", recipe="multisource", mode="federated", config=config_values, code_fingerprint="")
    clock = RoundClock(transport)
    run = Run("r", config, folder, clock, ledger)
    make_model(config.backbone, config.tasks, 0)  # what is imported and allocated once
    encode_change(backbone)
    with AnonymousMemoryPeak() as memory:
        result = run_training(run)
    last_round = result.stages[0].rounds[-1]
    num_accepted = sum(centre_round.accepted for centre_round in last_round.centres.values())
    assert num_accepted == num_centres, last_round.centres
    model_bytes = 4 * run.model.layout.size
    return RunCost(
        centres=num_centres,
        seconds=float(np.median(np.diff(clock.wall_times))),
        cpu_seconds=float(np.median(np.diff(clock.cpu_times))),
        memory=memory.peak_bytes / model_bytes,
        model_bytes=model_bytes,
        bytes_up=last_round.bytes_up,
        bytes_down=last_round.bytes_down,
    )


def measure_run_behind_flower(num_centres: int, backbone: str, folder: Path) -> RunCost:
    """The same with Flower's simulation between."""
    from flwr.simulation import run_simulation

    costs: list[RunCost] = []
    server_app = ServerApp()

    @server_app.main()
    def run_server(grid: Grid, context: Context) -> None:
        costs.append(measure_run(FlowerTransport(grid), num_centres, backbone, folder))

    backend: Any = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server_app, client_app, num_centres, backend_config=backend)
    return costs[0]


# --- a process for each size


def measure_in_new_process(between: str, num_centres: int, backbone: str) -> RunCost:
    """Measure one size in a process of its own. Raises CalledProcessError after printing its errors."""
    options = ["--one", between, "--centres", str(num_centres), "--backbone", backbone]
    command = [sys.executable, "-m", "tests.benchmarks.scaling", *options]
    environment = os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    if process.returncode:
        print(process.stderr[-2000:], file=sys.stderr)
        process.check_returncode()
    for line in process.stdout.splitlines():
        if line.startswith(COST_MARK):
            return RunCost(**json.loads(line))
    raise ValueError(f"{num_centres} centres ({between}): the process printed no cost")


def print_cost(between: str, num_centres: int, backbone: str) -> None:
    """What the new process does: measure, and print the cost as JSON."""
    logging.getLogger("consilium").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        if between == "process":
            cost = measure_run(InstantCentres(), num_centres, backbone, Path(folder))
        else:
            cost = measure_run_behind_flower(num_centres, backbone, Path(folder))
    print(json.dumps(asdict(cost)), flush=True)


# --- table and picture


def draw_figure(costs_by_way: dict[str, list[RunCost]]) -> go.Figure:
    """Time a round and memory over the number of centres, both axes of time logarithmic.

    A line of slope one is linear growth.
    """
    figure = go.Figure()
    for between, costs in costs_by_way.items():
        centres = [cost.centres for cost in costs]
        seconds = [cost.seconds for cost in costs]
        memory = [cost.memory for cost in costs]
        figure.add_scatter(x=centres, y=seconds, name=f"time a round, {between}", mode="lines+markers")
        memory_style = {"mode": "lines+markers", "line_dash": "dot", "yaxis": "y2"}
        figure.add_scatter(x=centres, y=memory, name=f"memory, {between}", **memory_style)
    costs = next(iter(costs_by_way.values()))
    figure.add_scatter(
        x=[cost.centres for cost in costs],
        y=[costs[-1].seconds * cost.centres / costs[-1].centres for cost in costs],
        name="linear",
        mode="lines",
        line={"color": "lightgrey"},
    )
    figure.update_layout(
        title="The federation's own cost by number of centres",
        xaxis={"type": "log", "title": "centres"},
        yaxis={"type": "log", "title": "s a round"},
        yaxis2={
            "title": "memory beyond the start, in models",
            "overlaying": "y",
            "side": "right",
            "rangemode": "tozero",
        },
        legend={"orientation": "h", "y": -0.2},
    )
    return figure


def format_cost(between: str, cost: RunCost) -> str:
    cells = [
        cost.centres,
        between,
        f"{cost.seconds:.2f}",
        f"{1000 * cost.seconds / cost.centres:.0f}",
        f"{cost.cpu_seconds:.2f}",
        f"{cost.memory:.1f}",
        f"{cost.bytes_up / 1e6:.0f}",
        f"{cost.bytes_down / 1e6:.0f}",
    ]
    return format_row(cells)


def has_room_for_spool(num_centres: int, model_size: int) -> bool:
    """Whether the temporary folder can hold one model a centre; prints an error if not."""
    folder = tempfile.gettempdir()
    free_bytes = shutil.disk_usage(folder).free
    required_bytes = 5 * num_centres * model_size
    if free_bytes >= required_bytes:
        return True
    print(
        f"{num_centres} centres need {required_bytes / 1e9:.0f} GB, but {folder} has "
        f"{free_bytes / 1e9:.0f} GB free; set TMPDIR to another disk",
        file=sys.stderr,
    )
    return False


def main() -> None:
    """Run the command that the module's docstring describes."""
    parser = argparse.ArgumentParser(description="Time and memory of a round by number of centres.")
    parser.add_argument("--centres", default="4,16,64,256", help="numbers of centres in this process")
    parser.add_argument("--flower", default="4,16", help="numbers of centres behind Flower; may be empty")
    parser.add_argument("--backbone", default="tf_efficientnet_b0")
    parser.add_argument("--out", default=".", help="folder for scaling.html")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print_cost(arguments.one, int(arguments.centres), arguments.backbone)
        return
    sizes = {"process": arguments.centres, "Flower": arguments.flower}
    costs_by_way: dict[str, list[RunCost]] = {}
    path = Path(arguments.out) / "scaling.html"
    config = compose_federation(4, arguments.backbone)
    model_size = build_layout(make_model(config.backbone, config.tasks, 0)).size
    titles = ["centres", "between", "s a round", "ms a centre", "CPU s", "memory, models", "MB up", "MB down"]
    print(format_header(titles))
    for between, numbers in sizes.items():
        for num_centres in [int(number) for number in numbers.split(",") if number]:
            if not has_room_for_spool(num_centres, model_size):
                continue
            cost = measure_in_new_process(between, num_centres, arguments.backbone)
            costs_by_way.setdefault(between, []).append(cost)
            print(format_cost(between, cost), flush=True)
        if costs_by_way:
            draw_figure(costs_by_way).write_html(path, include_plotlyjs=True)
    print(f"\n{model_size / 1e6:.1f} M values; load {os.getloadavg()[0]:.1f}; picture: {path}")


if __name__ == "__main__":
    main()
