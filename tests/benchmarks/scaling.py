"""How a round's time and the coordinator's memory grow with the number of centres.

4, 16, 64, 256; a table and a picture (HTML).

    .venv/bin/python -m tests.benchmarks.scaling [--centres 4,16,64,256] [--flower 4,16] [--backbone
    tf_efficientnet_b0] [--out FOLDER]

The coordinator's own `conduct` with every request packed and every reply unpacked as server/app.py does, and
centres that answer at once with valid counts, scores and coded contributions, so that what is timed is the
federation's own cost. `--centres` calls them in this process; `--flower` has them behind Flower's simulation
(Ray actors) and server/app.py's transport. Each size is a process of its own. Time is between the beginnings
of two rounds, the median of several; CPU is this process's; memory is what it holds of its own (RssAnon)
beyond what it held before the first round, in models. Contributions are spooled to a temporary folder: give a
disk with room for one model a centre by TMPDIR.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go
from flwr.app import Context, Message
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from common.config.compose import compose_config
from common.config.parse import config_to_dict, parse_config
from common.config.schema import Config
from common.learning.losses import class_names
from common.modeling.model import make_model
from common.modeling.parameters import Layout, build_layout
from common.protocol.code_fingerprint import fingerprint_code
from common.protocol.flower_records import from_records, to_records
from common.protocol.message_packing import pack_message
from common.protocol.messages import (
    JoinReply,
    JoinRequest,
    Reply,
    Request,
    StatisticsReply,
    StatisticsRequest,
    Sums,
    TrainReply,
    TrainRequest,
)
from common.protocol.update_codec import encode_update, select_codec
from server.ledger.ledger import Ledger
from server.rounds.coordinator import run_training
from server.run.flower_transport import FlowerTransport
from server.run.run_state import Run
from server.run.transport import ReceivedReply
from tests.benchmarks.aggregating import Peak

ROUNDS = 4  # three intervals between the beginnings of two; the first round's has what happens once
SOURCES = [f"scanner{k}" for k in range(8)]


def config_for(centres: int, backbone: str) -> Config:
    """The first paper's recipe at so many centres."""
    names = ",".join(f"centre{k:03d}" for k in range(centres))
    said = [
        f"federation.centres=[{names}]",
        f"tasks.source.classes=[{','.join(SOURCES)}]",
        f"stage.rounds={ROUNDS}",
        "federation.join_timeout=300",
    ]
    return compose_config([*said, f"backbone.name={backbone}", "evaluation.checkpoint_selection=last"])


# --- centres that answer at once ---


@functools.lru_cache(1)
def coded(backbone: str) -> tuple[dict[str, Any], int]:
    """A round's change of the model as it travels, and its counters' number; the same from every centre."""
    config = config_for(4, backbone)
    layout = build_layout(make_model(config.backbone, config.tasks, 0))
    delta = np.random.default_rng(1).standard_normal(layout.size, dtype=np.float32) * np.float32(1e-3)
    return dict(encode_update(delta, layout, select_codec(config))[0]), layout.int_buffer_size


def answer_at_once(index: int, request: Request) -> Reply:
    """What centre `index` says; nothing of it is computed from scans."""
    config = parse_config(request.config)
    centre = config.federation.centres[index]
    if isinstance(request, JoinRequest):
        source = SOURCES[index % len(SOURCES)]
        return JoinReply(
            centre, [centre], fingerprint_code(), [source], ["covid", "source"], {"train": 80}, {}, {}, "cpu"
        )
    if isinstance(request, TrainRequest):
        arrays, counters = coded(config.backbone.name)
        empty, losses = np.empty(0, np.float32), {"covid": [8.0, 80.0]}
        return TrainReply(centre, empty, np.zeros(counters, np.int64), 80, 20, losses, 0.0, arrays)
    assert isinstance(request, StatisticsRequest)
    sums: Sums = {}
    for task, of in config.tasks.items():
        cells = len(class_names(task, of))
        if request.name == "counts":
            sums |= {
                f"{centre}/{split}/{task}": np.array([40.0] * cells + [0.0])
                for split in ("train", "val", "test")
            }
        elif of.type == "binary":
            sums |= {
                f"{centre}/{task}/hist": np.full((2, config.evaluation.histogram_bins), 0.25),
                f"{centre}/{task}/loss": np.array([40.0, 80.0]),
            }
        else:
            sums |= {
                f"{centre}/{task}/confusion": np.eye(cells) * 10,
                f"{centre}/{task}/loss": np.array([40.0, 80.0]),
            }
    return StatisticsReply(centre, sums)


class AtOnce:
    """server/run/transport.py in this process.

    Requests and replies go through the records that travel, one at a time.
    """

    def discover(self, request: Request, expected: list[str], timeout: float) -> Iterator[ReceivedReply]:
        for k, centre in enumerate(expected):
            yield ReceivedReply(centre, answer_at_once(k, request))

    def send_and_receive(self, requests: Mapping[str, Request], timeout: float) -> Iterator[ReceivedReply]:
        made: dict[type, Any] = {}
        for k, (centre, request) in enumerate(requests.items()):
            down = sum(a.nbytes for a in pack_message(from_records(to_records(request)))[0].values())
            reply = answer_at_once(k, request)
            if isinstance(reply, TrainReply):  # packed once: that is the centres' work
                travels = made.setdefault(TrainReply, to_records(reply))
                reply = replace(from_records(travels), centre=centre)  # type: ignore[type-var]
            yield ReceivedReply(centre, reply, sum(a.nbytes for a in pack_message(reply)[0].values()), down)  # type: ignore[arg-type]


# --- a run ---


def carry_out(transport: Any, centres: int, backbone: str, folder: Path) -> dict[str, Any]:
    """One run of ROUNDS rounds; what it cost."""
    config = config_for(centres, backbone)
    ledger = Ledger(f"sqlite:///{folder / 'ledger.db'}")
    ledger.add_run(
        "r", recipe="multisource", mode="federated", config=config_to_dict(config), code_fingerprint=""
    )
    run = Run("r", config, folder, transport, ledger)
    began: list[tuple[float, float]] = []
    ask = transport.send_and_receive

    def watched(requests: Mapping[str, Request], deadline: float) -> Iterator[ReceivedReply]:
        if isinstance(next(iter(requests.values())), TrainRequest):
            began.append((time.perf_counter(), time.process_time()))
        yield from ask(requests, deadline)

    transport.send_and_receive = watched
    make_model(config.backbone, config.tasks, 0)  # what is imported and allocated once
    coded(backbone)
    with Peak() as peak:
        result = run_training(run)
    steps = [(b[0] - a[0], b[1] - a[1]) for a, b in itertools.pairwise(began)]
    entry = result.stages[0].rounds[-1]
    assert sum(centre.accepted for centre in entry.centres.values()) == centres, entry.centres
    model = 4 * layout_size(run.model.layout)
    return {
        "centres": centres,
        "seconds": statistics.median(s for s, _ in steps),
        "cpu": statistics.median(c for _, c in steps),
        "memory": peak.most / model,
        "model": model,
        "up": entry.bytes_up,
        "down": entry.bytes_down,
    }


def layout_size(layout: Layout) -> int:
    """Values of the model."""
    return layout.size


def behind_flower(centres: int, backbone: str, folder: Path) -> dict[str, Any]:
    """The same with Flower's simulation in between."""
    from flwr.simulation import run_simulation

    from tests.benchmarks.scaling import client  # by its name, for the actors: here it may be __main__'s

    found: list[dict[str, Any]] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        found.append(carry_out(FlowerTransport(grid), centres, backbone, folder))

    one: Any = {"client_resources": {"num_cpus": 1, "num_gpus": 0.0}}
    run_simulation(server, client, centres, backend_config=one)
    return found[0]


client = ClientApp()


def _reply(message: Message, context: Context) -> Message:
    request: Any = from_records(message.content)
    return Message(
        content=to_records(answer_at_once(int(context.node_config["partition-id"]), request)),
        reply_to=message,
    )


client.query()(_reply)
client.train()(_reply)


# --- table and picture ---


def measured(way: str, centres: int, backbone: str) -> dict[str, Any]:
    """One size in a process of its own. Raises CalledProcessError with what it said."""
    command = [
        sys.executable,
        "-m",
        "tests.benchmarks.scaling",
        "--one",
        way,
        "--centres",
        str(centres),
        "--backbone",
        backbone,
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"RAY_USAGE_STATS_ENABLED": "0"}
    )
    if done.returncode:
        print(done.stderr[-2000:], file=sys.stderr)
        done.check_returncode()
    found: dict[str, Any] = json.loads(
        next(line for line in done.stdout.splitlines() if line.startswith('{"centres"'))
    )
    return found


def one(way: str, centres: int, backbone: str) -> None:
    """What `measured` calls."""
    logging.getLogger("consilium").setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as folder:
        work = carry_out if way == "process" else behind_flower
        found = (
            work(AtOnce(), centres, backbone, Path(folder))
            if way == "process"
            else work(centres, backbone, Path(folder))
        )  # type: ignore[call-arg,arg-type]
    print(json.dumps(found), flush=True)


def picture(rows: dict[str, list[dict[str, Any]]]) -> go.Figure:
    """Time a round and memory over the number of centres, both axes of time logarithmic.

    A line of slope one is linear.
    """
    figure = go.Figure()
    for way, of in rows.items():
        x = [row["centres"] for row in of]
        figure.add_scatter(
            x=x, y=[row["seconds"] for row in of], name=f"time a round, {way}", mode="lines+markers"
        )
        figure.add_scatter(
            x=x,
            y=[row["memory"] for row in of],
            name=f"memory, {way}",
            mode="lines+markers",
            line_dash="dot",
            yaxis="y2",
        )
    first = next(iter(rows.values()))
    last = first[-1]
    figure.add_scatter(
        x=[row["centres"] for row in first],
        y=[last["seconds"] * row["centres"] / last["centres"] for row in first],
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


def main() -> None:
    """The command; see the module docstring."""
    parser = argparse.ArgumentParser(description="Time and memory by number of centres.")
    parser.add_argument("--centres", default="4,16,64,256")
    parser.add_argument("--flower", default="4,16")
    parser.add_argument("--backbone", default="tf_efficientnet_b0")
    parser.add_argument("--out", default=".", help="where scaling.html goes")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        return one(given.one, int(given.centres), given.backbone)
    sizes = {"process": given.centres, "Flower": given.flower}
    rows: dict[str, list[dict[str, Any]]] = {}
    path = Path(given.out) / "scaling.html"
    print(
        "| centres | between | s a round | ms a centre | CPU s | memory, models | MB up | MB down "
        f"|\n{'|---' * 8}|"
    )
    for way, of in sizes.items():
        for centres in [int(n) for n in of.split(",") if n]:
            layout = build_layout(
                make_model(config_for(4, given.backbone).backbone, config_for(4, given.backbone).tasks, 0)
            )
            if (free := shutil.disk_usage(tempfile.gettempdir()).free) < 5 * centres * layout.size:
                print(
                    f"{centres} centres: {free / 1e9:.0f} GB free in {tempfile.gettempdir()} are too "
                    "few; set TMPDIR",
                    file=sys.stderr,
                )
                continue
            row = measured(way, centres, given.backbone)
            rows.setdefault(way, []).append(row)
            cells = [
                f"{row['seconds']:.2f}",
                f"{1000 * row['seconds'] / centres:.0f}",
                f"{row['cpu']:.2f}",
                f"{row['memory']:.1f}",
            ]
            print(
                f"| {centres} | {way} | {' | '.join(cells)} | {row['up'] / 1e6:.0f} | "
                f"{row['down'] / 1e6:.0f} |",
                flush=True,
            )
        if rows:
            picture(rows).write_html(path, include_plotlyjs=True)
    print(
        f"\n{next(iter(rows.values()))[0]['model'] / 4e6:.1f} M values; load {os.getloadavg()[0]:.1f}; "
        f"picture: {path}"
    )


if __name__ == "__main__":
    main()
