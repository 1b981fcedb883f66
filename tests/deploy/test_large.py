"""A model of 256 MB (EfficientNet-B7's shapes) at four centres for three rounds: TLS, node authentication, the SuperLink's database on disk.

Nothing may be lost to the database's lock, and the coordinator's process may hold less than three models beyond what it holds once everything is
imported; five without a codec, when Flower alone holds a contribution that comes three times. What the wire costs is the same whatever was learnt:
each centre trains one step on one small scan.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from server.rounds.run_lifecycle import open_ledger
from tests.deploy import processes as p

pytestmark = [pytest.mark.slow, pytest.mark.deploy]
CENTRES = ["north", "east", "south", "west"]
SMALL = ["preprocess.image_size=32", "preprocess.num_slices=2"]
DRAWN = [
    *SMALL,
    "federation.phantom.scale=0.01",
    "federation.phantom.num_slices=12",
    "federation.phantom.image_size=64",
]
BACKBONE = [
    "backbone.name=tf_efficientnet_b7",
    "backbone.norm=group",
]  # a deep network with untrained batch norms answers with infinities


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[p.Started, str]]:
    """A running coordinator with four hospitals behind nginx, where there is one: the processes and the operator's address."""
    with p.started(tmp_path_factory.mktemp("large")) as processes:
        operator, port = p.federation(processes, CENTRES, DRAWN)
        for name in CENTRES:
            p.start_centre(
                processes,
                processes.folder / "hospitals" / name,
                f"localhost:{port}",
                restart=True,
                WARM="yes",
            )
        yield processes, operator


@pytest.mark.parametrize(("codec", "models"), [("int8", 3), ("fp32", 5)])
def test_three_rounds(federation: tuple[p.Started, str], codec: str, models: int) -> None:
    """Every centre's contribution counts in every round; no lock; the memory."""
    processes, operator = federation
    folder, runs = processes.folder, processes.folder / "runs"
    memory = Memory(processes.processes["superexec"].pid, runs)
    began = time.monotonic()
    ran = p.server(
        *("run", "--superlink", operator, "--ca", str(folder / "made/ca.crt"), "--runs", str(runs)),
        *(
            "federation=folder",
            f"federation.centres=[{','.join(CENTRES)}]",
            "federation.round_timeout=900",
            "federation.join_timeout=300",
            *SMALL,
        ),
        *(
            *BACKBONE,
            f"aggregation.compression={codec}",
            "stage.rounds=3",
            "stage.local_steps=1",
            "stage.batch_size=1",
        ),
        *("stage.optimiser.name=sgd", "stage.optimiser.lr=0.001", "evaluation.checkpoint_selection=last"),
        timeout=3000,
    )
    took = time.monotonic() - began
    found = memory.end()
    logs = "\n".join(f"== {name}\n{processes.log(name)[-2000:]}" for name in processes.processes)
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-2000:] + logs
    assert "locked" not in processes.log("superlink")
    run = (runs / "latest").resolve()
    ledger = open_ledger(runs)
    assert [row["accepted"] for row in ledger.read_contributions(run.name) if row["round"] > 0] == [True] * 12
    assert ledger.read_events(run.name)[-1]["kind"] == "finished"
    model = sum(4 * math.prod(tensor.shape) for tensor in load_file(run / "model.safetensors").values())
    rounds = json.loads((run / "metrics.json").read_text())["stages"][0]["rounds"][1:]
    seconds = " ".join(f"{entry['seconds']:.0f}" for entry in rounds)
    moved = " ".join(f"{entry['bytes_up'] / model:.2f}/{entry['bytes_down'] / model:.2f}" for entry in rounds)
    held = ", ".join(f"{key} {value / model:.2f}" for key, value in found.items())
    print(
        f"\n{codec}: {took:.0f} s in all; rounds {seconds} s; up/down, models: {moved}; memory, models: {held}"
    )
    assert found["own"] < models * model, held


class Memory:
    """What the coordinator's app holds, looked at 50 times a second: bytes beyond what it held when the run's folder appeared, which is after
    all imports and before the model is made. `own`: anonymous memory, which no page cache can be; `resident`: with the files it has mapped."""

    def __init__(self, superexec: int, runs: Path) -> None:
        self.superexec, self.runs, self.before = superexec, runs, set(runs.glob("*/config.yaml"))
        self.first: dict[str, int] = {}
        self.most: dict[str, int] = {}
        self.over = False
        self.watch = threading.Thread(target=self.look)
        self.watch.start()

    def look(self) -> None:
        while not self.over:
            if set(self.runs.glob("*/config.yaml")) - self.before:
                for pid in p.children(self.superexec, "flwr-serverapp"):
                    now = held(pid)
                    self.first = self.first or now
                    self.most = {key: max(value, self.most.get(key, 0)) for key, value in now.items()}
            time.sleep(0.02)

    def end(self) -> dict[str, int]:
        self.over = True
        self.watch.join()
        return {key: value - self.first[key] for key, value in self.most.items()}


def held(pid: int) -> dict[str, int]:
    """Bytes of a process: `own` and `resident`; none of one that has gone."""
    try:
        lines = (Path("/proc") / str(pid) / "status").read_text().splitlines()
    except OSError:
        return {}
    said: dict[str, Any] = {
        line.split(":")[0]: line.split()[1] for line in lines if line.startswith(("RssAnon", "VmHWM"))
    }
    return (
        {"own": 1024 * int(said["RssAnon"]), "resident": 1024 * int(said["VmHWM"])} if len(said) == 2 else {}
    )
