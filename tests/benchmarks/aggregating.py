"""Compare the coordinator's weighted sum with Flower's own aggregation, for EfficientNet-B7's shapes.

    .venv/bin/python -m tests.benchmarks.aggregating [--centres 4,16] [--repeats 5] [--memory 4,16,64,256]

Both sides take turns. Flower: `aggregate_arrayrecords` of its strategies, contributions in memory. Ours:
`weighted_sum` (server/aggregation/weighted_mean.py) of contributions that were spooled to disk as they
arrived; "receiving one" is what it costs before that to validate and store one. "read" adds up every value of
the same files and does nothing else: the floor. Memory is the process's anonymous memory (RssAnon) beyond the
model itself, in models of 256 MB.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
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
from tests.benchmarks.measuring import AnonymousMemoryPeak, format_header, format_row, time_call


def draw_reply(layout: Layout, number: int) -> TrainReply:
    """A centre's reply with a random update."""
    delta = np.random.default_rng(number).standard_normal(layout.size, dtype=np.float32)
    return make_reply(layout, number, delta)


def make_reply(layout: Layout, number: int, delta: np.ndarray) -> TrainReply:
    int_buffers = np.zeros(layout.int_buffer_size, np.int64)
    return TrainReply(f"centre{number:03d}", delta, int_buffers, 1, 1, {}, 0.0)


def receive(reply: TrainReply, layout: Layout, folder: Path, updates: list[StoredUpdate]) -> None:
    """Validate and store a reply, as the coordinator does."""
    find_validation_error(reply)
    updates.append(store_update(reply, layout, folder))


def make_flower_reply(reply: TrainReply, layout: Layout) -> RecordDict:
    tensors = [reply.delta[slot.span].reshape(slot.shape) for slot in layout.floats]
    metrics = MetricRecord({"n": 1.0})
    return RecordDict({"arrays": ArrayRecord(numpy_ndarrays=tensors), "m": metrics})


def weigh_equally(updates: list[StoredUpdate], layout: Layout) -> dict[str, dict[str, float]]:
    """{parameter group: {centre: the same weight}}."""
    weight = 1 / len(updates)
    return {group: {update.centre: weight for update in updates} for group in layout.group_slices()}


def read_all(updates: list[StoredUpdate]) -> float:
    return sum(float(torch.from_numpy(update.load_delta()).sum()) for update in updates)


def compare_sums(layout: Layout, num_centres: int, repeats: int, folder: Path) -> str:
    """A row of the table: Flower, ours and the floor."""
    updates: list[StoredUpdate] = []
    flower_replies = []
    receiving_seconds = []
    for number in range(num_centres):
        reply = draw_reply(layout, number)
        receiving_seconds.append(time_call(partial(receive, reply, layout, folder, updates)).wall)
        flower_replies.append(make_flower_reply(reply, layout))
    contenders: dict[str, Callable[[], object]] = {
        "flower": partial(aggregate_arrayrecords, flower_replies, "n"),
        "ours": partial(weighted_sum, updates, weigh_equally(updates, layout), layout),
        "read": partial(read_all, updates),
    }
    for contender in contenders.values():
        contender()  # the first time is not counted
    seconds = {name: np.empty(repeats) for name in contenders}
    for repeat in range(repeats):
        for name, contender in contenders.items():
            seconds[name][repeat] = time_call(contender).wall
    floor = np.median(seconds["read"])
    bandwidth = num_centres * layout.size * 4 / floor / 1e9
    cells = [
        num_centres,
        f"{np.median(seconds['flower']):.2f} s",
        f"{np.median(seconds['ours']):.3f} s",
        f"{np.median(seconds['flower'] / seconds['ours']):.1f}",
        f"{floor:.3f} s ({bandwidth:.0f} GB/s)",
        f"{np.median(seconds['read'] / seconds['ours']):.0%}",
        f"{statistics.median(receiving_seconds):.2f} s",
    ]
    return format_row(cells)


def measure_memory(layout: Layout, num_centres: int, folder: Path) -> str:
    """A row: the peak memory, in models, while contributions come one at a time and are then summed."""
    model = Weights(np.zeros(layout.size, np.float32), np.zeros(layout.int_buffer_size, np.int64))
    delta = draw_reply(layout, 0).delta

    def sum_and_step() -> None:
        mean_delta = weighted_sum(updates, weigh_equally(updates, layout), layout)
        server_step(model, mean_delta, updates, AggregationConfig(), layout, {})

    with AnonymousMemoryPeak() as memory:
        updates: list[StoredUpdate] = []
        for number in range(num_centres):
            reply = make_reply(layout, number, delta.copy())
            updates.append(store_update(reply, layout, folder))
            if number:  # one file under many names, so that the disk need not hold them all
                updates[-1].path.unlink()
                updates[-1].path = updates[0].path
            del reply
        timing = time_call(sum_and_step)
    return format_row([num_centres, f"{memory.peak_bytes / layout.size / 4:.2f}", f"{timing.wall:.2f} s"])


def parse_numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def main() -> None:
    """Run the command that the module's docstring describes."""
    parser = argparse.ArgumentParser(description="The coordinator's weighted sum against Flower's.")
    parser.add_argument("--centres", default="4,16", help="numbers of centres to time, separated by commas")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--memory", default="4,16,64,256", help="numbers of centres for the memory table")
    arguments = parser.parse_args()
    layout = build_layout(timm.create_model("tf_efficientnet_b7", num_classes=0))
    num_threads = torch.get_num_threads()
    print(f"{layout.size / 1e6:.1f} M values, {len(layout.floats)} tensors, {num_threads} threads\n")
    titles = ["centres", "Flower", "ours", "ratio", "read", "of the read bandwidth", "receiving one"]
    print(format_header(titles))
    for num_centres in parse_numbers(arguments.centres):
        with tempfile.TemporaryDirectory() as folder:
            print(compare_sums(layout, num_centres, arguments.repeats, Path(folder)), flush=True)
    print("\n" + format_header(["centres", "peak memory beyond the model, in models", "sum and step"]))
    for num_centres in parse_numbers(arguments.memory):
        with tempfile.TemporaryDirectory() as folder:
            print(measure_memory(layout, num_centres, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
