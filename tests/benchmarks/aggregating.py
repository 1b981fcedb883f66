"""The coordinator's weighted sum against Flower's own aggregation on EfficientNet-B7's shapes, interleaved.

Seconds, ratio, memory.

    .venv/bin/python -m tests.benchmarks.aggregating [--centres 4,16] [--repeats 5] [--memory 4,16,64,256]

Flower: `aggregate_arrayrecords` of its strategies, contributions in memory. Ours:
server/aggregation/weighted_mean.py, `weighted_sum` of contributions spooled to disk as they came, and what it
costs before that to receive one (`fault` and `spool`). "read" adds up every value of the same files and does
nothing else: the floor. Memory is what the process holds of its own (RssAnon), the model itself not counted,
in models of 256 MB.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import timm
import torch
from flwr.app import ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords

from common.config.schema import AggregationConfig
from common.modeling.parameters import Layout, Weights, build_layout
from common.protocol.messages import TrainReply
from server.aggregation.screening import find_validation_error
from server.aggregation.server_optimizer import server_step
from server.aggregation.stored_updates import StoredUpdate, store_update
from server.aggregation.weighted_mean import weighted_sum


def contribution(layout: Layout, number: int) -> TrainReply:
    """A made-up one."""
    delta = np.random.default_rng(number).standard_normal(layout.size, dtype=np.float32)
    return TrainReply(f"centre{number:03d}", delta, np.zeros(layout.int_buffer_size, np.int64), 1, 1, {}, 0.0)


def seconds(step: Callable[[], object]) -> float:
    """Wall time."""
    began = time.perf_counter()
    step()
    return time.perf_counter() - began


def own_memory() -> int:
    """Bytes of this process that are not a file's."""
    line = next(
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon")
    )
    return int(line.split()[1]) * 1024


class Peak:
    """The most memory held while it is open, looked at every millisecond, beyond what was held before."""

    def __enter__(self) -> Peak:
        gc.collect()  # records of the comparison before
        self.before, self.most, self.over = own_memory(), 0, False
        self.watch = threading.Thread(target=self.look)
        self.watch.start()
        return self

    def look(self) -> None:
        while not self.over:
            self.most = max(self.most, own_memory() - self.before)
            time.sleep(0.001)

    def __exit__(self, *_: object) -> None:
        self.over = True
        self.watch.join()


def compare(layout: Layout, centres: int, repeats: int, folder: Path) -> str:
    """One row: Flower, ours and the floor."""
    arrived: list[StoredUpdate] = []
    receiving, records = [], []
    for number in range(centres):
        one = contribution(layout, number)
        receiving.append(
            seconds(
                lambda one=one: (
                    find_validation_error(one, layout, False),
                    arrived.append(store_update(one, layout, folder)),
                )
            )
        )  # type: ignore[misc]
        arrays = {e.name: one.delta[e.span].reshape(e.shape) for e in layout.floats}
        records.append(
            RecordDict(
                {"arrays": ArrayRecord(numpy_ndarrays=list(arrays.values())), "m": MetricRecord({"n": 1.0})}
            )
        )
    weights = {group: {s.centre: 1 / centres for s in arrived} for group in layout.group_slices()}

    def read() -> float:
        return sum(float(torch.from_numpy(s.load_delta()).sum()) for s in arrived)

    def flower() -> object:
        return aggregate_arrayrecords(records, "n")

    def ours() -> object:
        return weighted_sum(arrived, weights, layout)

    flower(), ours(), read()
    times = [(seconds(flower), seconds(ours), seconds(read)) for _ in range(repeats)]
    theirs, mine, floor = (statistics.median(t[k] for t in times) for k in range(3))
    ratio = statistics.median(t[0] / t[1] for t in times)
    share = statistics.median(t[2] / t[1] for t in times)
    speed = f"{centres * layout.size * 4 / floor / 1e9:.0f} GB/s"
    received = statistics.median(receiving)
    return (
        f"| {centres} | {theirs:.2f} s | {mine:.3f} s | {ratio:.1f} | {floor:.3f} s ({speed}) | {share:.0%} "
        f"| {received:.2f} s |"
    )


def memory(layout: Layout, centres: int, folder: Path) -> str:
    """One row: the most memory while contributions come one at a time and are then summed, in models."""
    model = Weights(np.zeros(layout.size, np.float32), np.zeros(layout.int_buffer_size, np.int64))
    same = contribution(layout, 0)
    with Peak() as peak:
        arrived = []
        for number in range(centres):
            came = TrainReply(f"centre{number:03d}", same.delta.copy(), same.int_buffers, 1, 1, {}, 0.0)
            arrived.append(store_update(came, layout, folder))
            if number:  # one file under many names: the disk need not hold them all
                arrived[-1].path.unlink()
                arrived[-1].path = arrived[0].path
            del came
        weights = {group: {s.centre: 1 / centres for s in arrived} for group in layout.group_slices()}
        began = time.perf_counter()
        server_step(model, weighted_sum(arrived, weights, layout), arrived, AggregationConfig(), layout, {})
        spent = time.perf_counter() - began
    return f"| {centres} | {peak.most / layout.size / 4:.2f} | {spent:.2f} s |"


def main() -> None:
    """The command; see the module docstring."""
    parser = argparse.ArgumentParser(description="The weighted sum against Flower's.")
    parser.add_argument("--centres", default="4,16")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", default="4,16,64,256")
    given = parser.parse_args()
    layout = build_layout(timm.create_model("tf_efficientnet_b7", num_classes=0))
    print(
        f"{layout.size / 1e6:.1f} M values, {len(layout.floats)} tensors, {torch.get_num_threads()} threads\n"
    )
    print(
        f"| centres | Flower | ours | ratio | read | of the read bandwidth | receiving one |\n{'|---' * 7}|"
    )
    for centres in given.centres.split(","):
        with tempfile.TemporaryDirectory() as folder:
            print(compare(layout, int(centres), given.repeats, Path(folder)), flush=True)
    print(f"\n| centres | peak memory beyond the model, in models | sum and step |\n{'|---' * 3}|")
    for centres in given.memory.split(","):
        with tempfile.TemporaryDirectory() as folder:
            print(memory(layout, int(centres), Path(folder)), flush=True)


if __name__ == "__main__":
    main()
