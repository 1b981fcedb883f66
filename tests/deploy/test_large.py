"""A model of 256 MB at four centres for three rounds, over TLS and with the SuperLink's database on disk.

The shapes are EfficientNet-B7's. Nothing may be lost to the database's lock. The coordinator's process may
hold less than three models beyond what it holds after all imports; without compression less than five,
because Flower alone holds a contribution three times. The traffic does not depend on what is learnt: each
centre trains one step on one small scan.
"""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors.numpy import load_file

from server.rounds.run_lifecycle import open_ledger
from tests.deploy.commands import run_server_command
from tests.deploy.process_group import ProcessGroup, list_processes, open_process_group
from tests.deploy.processes import start_centre, start_federation

pytestmark = [pytest.mark.slow, pytest.mark.deploy]
CENTRES = ["north", "east", "south", "west"]
PREPROCESS = ["preprocess.image_size=32", "preprocess.num_slices=2"]
PHANTOM = [
    *PREPROCESS,
    "federation.phantom.scale=0.01",
    "federation.phantom.num_slices=12",
    "federation.phantom.image_size=64",
]
RUN = [
    "federation=folder",
    f"federation.centres=[{','.join(CENTRES)}]",
    "federation.round_timeout=900",
    "federation.join_timeout=300",
    *PREPROCESS,
    "backbone.name=tf_efficientnet_b7",
    "backbone.norm=group",  # a deep network with untrained batch norms gives infinities
    "stage.rounds=3",
    "stage.local_steps=1",
    "stage.batch_size=1",
    "stage.optimiser.name=sgd",
    "stage.optimiser.lr=0.001",
    "evaluation.checkpoint_selection=last",
]


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[ProcessGroup, str]]:
    """A running coordinator with four hospitals: the processes and the operator's address."""
    with open_process_group(tmp_path_factory.mktemp("large")) as processes:
        operator, port = start_federation(processes, CENTRES, PHANTOM)
        for name in CENTRES:
            hospital = processes.folder / "hospitals" / name
            start_centre(processes, hospital, f"localhost:{port}", restarts=True, WARM="yes")
        yield processes, operator


@pytest.mark.parametrize(("compression", "max_models"), [("int8", 3), ("fp32", 5)])
def test_large_model_loses_no_contribution_and_fits_in_memory(
    federation: tuple[ProcessGroup, str], compression: str, max_models: int
) -> None:
    """Every centre counts in every round, no database is locked, and the coordinator's memory is bounded."""
    processes, operator = federation
    runs = processes.folder / "runs"
    memory = MemoryWatch(processes.pid("superexec"), runs)
    start = time.monotonic()
    result = run_server_command(
        "run",
        f"--superlink={operator}",
        f"--ca={processes.folder / 'made/ca.crt'}",
        f"--runs={runs}",
        *RUN,
        f"aggregation.compression={compression}",
        timeout=3000,
    )
    seconds = time.monotonic() - start
    growth = memory.stop()
    logs = processes.read_log_ends(2000)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-2000:] + logs
    assert "locked" not in processes.read_log("superlink")

    run_dir = (runs / "latest").resolve()
    ledger = open_ledger(runs)
    contributions = [row for row in ledger.read_contributions(run_dir.name) if row["round"] > 0]
    assert [row["accepted"] for row in contributions] == [True] * 12
    assert ledger.read_events(run_dir.name)[-1]["kind"] == "finished"

    tensors = load_file(run_dir / "model.safetensors").values()
    model_bytes = sum(4 * math.prod(tensor.shape) for tensor in tensors)
    rounds = json.loads((run_dir / "metrics.json").read_text())["stages"][0]["rounds"][1:]
    print_costs(compression, seconds, rounds, growth, model_bytes)
    assert growth.anonymous < max_models * model_bytes, growth


class Memory(NamedTuple):
    """Bytes that a process holds."""

    anonymous: int  # cannot be page cache
    resident: int  # at most so far, with the files that it has mapped


def print_costs(
    compression: str, seconds: float, rounds: list[dict[str, float]], growth: Memory, model_bytes: int
) -> None:
    """Print time, traffic and memory, the latter two in units of the model."""
    round_seconds = " ".join(f"{entry['seconds']:.0f}" for entry in rounds)
    traffic = []
    for entry in rounds:
        up, down = entry["bytes_up"] / model_bytes, entry["bytes_down"] / model_bytes
        traffic.append(f"{up:.2f}/{down:.2f}")
    print(
        f"\n{compression}: {seconds:.0f} s in all; rounds {round_seconds} s; "
        f"up/down, models: {' '.join(traffic)}; memory, models: "
        f"anonymous {growth.anonymous / model_bytes:.2f}, resident {growth.resident / model_bytes:.2f}"
    )


class MemoryWatch:
    """Watches the memory of the coordinator's app, 50 times a second.

    The growth counts from when the run's folder appears, which is after all imports and before the model is
    made.
    """

    def __init__(self, superexec: int, runs: Path) -> None:
        self.superexec = superexec
        self.runs = runs
        self.earlier_runs = set(runs.glob("*/config.yaml"))
        self.first: Memory | None = None
        self.peak = Memory(0, 0)
        self.is_stopped = threading.Event()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()

    def _watch(self) -> None:
        while not self.is_stopped.wait(0.02):
            if set(self.runs.glob("*/config.yaml")) - self.earlier_runs:
                for pid in list_processes(self.superexec, "flwr-serverapp"):
                    self._note(read_memory(pid))

    def _note(self, memory: Memory | None) -> None:
        if memory is None:
            return
        if self.first is None:
            self.first = memory
        self.peak = Memory(*map(max, self.peak, memory))

    def stop(self) -> Memory:
        """Stop watching, and return by how much the memory grew at most."""
        self.is_stopped.set()
        self.thread.join()
        assert self.first is not None, "the coordinator's app was never seen"
        return Memory(self.peak.anonymous - self.first.anonymous, self.peak.resident - self.first.resident)


def read_memory(pid: int) -> Memory | None:
    """Return a process's memory; None once it has ended."""
    kilobytes = {}
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, value = line.partition(":")
            if name in ("RssAnon", "VmHWM"):
                kilobytes[name] = int(value.split()[0])
    except OSError:
        return None
    if len(kilobytes) < 2:  # a process that is ending
        return None
    return Memory(1024 * kilobytes["RssAnon"], 1024 * kilobytes["VmHWM"])
