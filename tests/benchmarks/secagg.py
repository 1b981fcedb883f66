"""Compare secure aggregation with sums in the open.

    .venv/bin/python -m tests.benchmarks.secagg [--centres 4,16,64]

Prints the bytes and seconds of a round's sum by number of centres, and the time of each step for a large
model. The centres' and the coordinator's own code runs in one process (tests/secure_sums.py); updates are
drawn instead of trained. A centre's seconds are those of all its steps; in a federation the centres work side
by side, and each message has its own cost there. Seconds are CPU-seconds of one thread.
"""

from __future__ import annotations

import argparse
import secrets
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from client.federation import secure_aggregation as centre_side
from client.federation.parameter_cache import parameter_layout
from common.config.compose import compose_config
from common.config.parse import config_to_dict
from common.config.schema import Compression, Config, SecureAggregationConfig
from common.modeling.parameters import EMPTY_PARAMS, Layout, TensorSlot, Weights
from common.privacy import secure_aggregation
from common.protocol.messages import MaskedInputRequest, Request, TrainReply, TrainRequest
from common.protocol.update_codec import encode_update
from server.aggregation.screening import decode_reply
from server.aggregation.stored_updates import StoredUpdate, store_update
from server.aggregation.weighted_mean import weighted_sum
from server.run.secure_aggregation import secure_sum
from server.run.transport import ReceivedReply
from tests.benchmarks.measuring import format_header, format_row, time_call, time_result
from tests.in_process_federation import count_bytes
from tests.secure_sums import Wire, run_over

LARGE_MODEL_SIZE = 16_000_000
LARGE_MODEL_TENSORS = 64
OPEN_CODECS: tuple[Compression, ...] = ("fp32", "int8")


@dataclass(frozen=True)
class SumCost:
    """What one sum costs: bytes and seconds of a centre, and seconds of the coordinator."""

    bytes_up: float
    bytes_down: float  # beside the weights
    centre_seconds: float
    coordinator_seconds: float


@dataclass
class TimedWire(Wire):
    """Measures the CPU-seconds that all centres together take to answer."""

    centre_seconds: float = 0.0

    def send_and_receive(self, requests: Mapping[str, Request], timeout: float) -> Iterator[ReceivedReply]:
        replies = super().send_and_receive(requests, timeout)
        while True:
            received, timing = time_result(lambda: next(replies, None))
            self.centre_seconds += timing.cpu
            if received is None:
                return
            yield received


def compose_federation(num_centres: int) -> Config:
    names = ",".join(f"c{number:02d}" for number in range(num_centres))
    overrides = [
        "federation=folder",
        f"federation.centres=[{names}]",
        "privacy=secagg",
        f"tasks.source.classes=[{names}]",
    ]
    return compose_config(overrides)


def draw_replies(config: Config, layout: Layout) -> Iterator[TrainReply]:
    """Yield each centre's reply with a random update."""
    rng = np.random.default_rng(1)
    for name in config.federation.centres:
        delta = rng.normal(0, 1e-3, layout.size).astype(np.float32)
        yield TrainReply(name, delta, np.zeros(layout.int_buffer_size, np.int64), 5, 2, {}, 0.1)


def measure_secure_sum(config: Config, layout: Layout, folder: Path, num_lost: int = 0) -> SumCost:
    """Measure a secure sum.

    `num_lost` centres drop out after sharing their secrets, which costs the most.
    """
    names = config.federation.centres
    wire = TimedWire(folder, config, {(MaskedInputRequest, name) for name in names[:num_lost]})
    weights = Weights(np.zeros(layout.size, np.float32), np.zeros(layout.int_buffer_size, np.int64))
    total_label_weight = {"covid": float(len(names)), "source": float(len(names))}
    request = TrainRequest(
        "r", config_to_dict(config), "main", 1, weights, total_label_weight=total_label_weight
    )
    label_weights = {"covid": 1.0, "source": 1.0}
    key_replies = {}
    bytes_up = 0
    masking_seconds = 0.0
    for reply in draw_replies(config, layout):
        state_dir = folder / reply.centre
        mask = partial(centre_side.mask_update, state_dir, config, request, reply, label_weights)
        key_replies[reply.centre], timing = time_result(mask)
        masking_seconds += timing.cpu
        bytes_up += count_bytes(key_replies[reply.centre])
    run = run_over(wire, layout)

    def sum_securely() -> None:
        empty_sums = secure_aggregation.empty_update_sums(layout)
        total = secure_sum(run, key_replies, layout.num_parameters, empty_sums)
        settings = secure_aggregation.require_secagg_config(config)
        secure_aggregation.dequantize_mean(total.values, total.sums, layout, settings)

    summing = time_call(sum_securely)
    traffic = run.traffic.sum_up()
    return SumCost(
        bytes_up=(bytes_up + traffic.bytes_up) / len(names),
        bytes_down=traffic.bytes_down / len(names),
        centre_seconds=(masking_seconds + wire.centre_seconds) / len(names),
        coordinator_seconds=summing.cpu - wire.centre_seconds,
    )


def measure_open_sum(config: Config, layout: Layout, folder: Path, codec: Compression) -> SumCost:
    """Measure a sum of updates that travel in the open."""
    names = config.federation.centres
    bytes_up = 0
    encoding_seconds = 0.0
    coordinator_seconds = 0.0
    updates = []

    for reply in draw_replies(config, layout):
        encoding_seconds += time_call(partial(encode_reply, reply, layout, codec)).cpu
        bytes_up += count_bytes(reply)
        update, timing = time_result(partial(receive, reply, layout, codec, folder))
        updates.append(update)
        coordinator_seconds += timing.cpu
    weights = {group: dict.fromkeys(names, 1 / len(names)) for group in layout.group_slices()}
    coordinator_seconds += time_call(partial(weighted_sum, updates, weights, layout)).cpu
    return SumCost(bytes_up / len(names), 0, encoding_seconds / len(names), coordinator_seconds)


def receive(reply: TrainReply, layout: Layout, codec: Compression, folder: Path) -> StoredUpdate:
    """Decode and store a reply, as the coordinator does."""
    return store_update(decode_reply(reply, layout, codec), layout, folder)


def encode_reply(reply: TrainReply, layout: Layout, codec: Compression) -> None:
    """Put the encoded form in place of the update, as a centre does."""
    if codec != "fp32":
        reply.encoded_delta = encode_update(reply.delta, layout, codec).arrays
        reply.delta = EMPTY_PARAMS


def make_large_layout() -> Layout:
    """16 M parameters in 64 tensors."""
    tensor_size = LARGE_MODEL_SIZE // LARGE_MODEL_TENSORS
    slots = []
    for number in range(LARGE_MODEL_TENSORS):
        start = number * tensor_size
        slots.append(
            TensorSlot(str(number), (tensor_size,), start, start + tensor_size, "backbone", True, False)
        )
    return Layout(slots)


def describe_large_model() -> str:
    """The CPU-seconds of each step of the work on a large model."""
    layout = make_large_layout()
    ring_bytes = 4
    delta = np.random.default_rng(1).normal(0, 1e-3, LARGE_MODEL_SIZE).astype(np.float32)
    fixed_point_sums = np.zeros(1, np.uint64)
    seed = secrets.token_bytes(32)
    start = time.process_time()
    update = secure_aggregation.quantize_weighted_update(
        delta, {"backbone": 0.25}, layout, SecureAggregationConfig()
    )
    values = update.values.astype(secure_aggregation.ring_dtype(ring_bytes))
    quantized = time.process_time()
    secure_aggregation.add_mask(seed, 1, fixed_point_sums, values)
    masked = time.process_time()
    total = np.zeros(LARGE_MODEL_SIZE, np.uint32)
    packed = secure_aggregation.pack_ring_values(values, ring_bytes)
    total += secure_aggregation.unpack_ring_values(packed, ring_bytes)
    added = time.process_time()
    return (
        f"16 M parameters, CPU-seconds: weighting and quantization {quantized - start:.2f}, "
        f"one mask {masked - quantized:.3f}, adding one reply {added - masked:.3f}"
    )


def main() -> None:
    """Run the command that the module's docstring describes."""
    parser = argparse.ArgumentParser(description="Secure aggregation against sums in the open.")
    parser.add_argument("--centres", default="4,16,64", help="numbers of centres, separated by commas")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for num_centres in [int(number) for number in arguments.centres.split(",")]:
        config = compose_federation(num_centres)
        layout = parameter_layout(config)
        costs: dict[str, SumCost] = {}
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            for codec in OPEN_CODECS:
                costs[f"in the open, {codec}"] = measure_open_sum(config, layout, folder / codec, codec)
            costs["secure sum"] = measure_secure_sum(config, layout, folder / "all")
            num_lost = num_centres // 4
            lossy_sum = measure_secure_sum(config, layout, folder / "lost", num_lost)
            costs[f"secure sum, {num_lost} lost"] = lossy_sum
        for name, cost in costs.items():
            megabytes = [f"{cost.bytes_up / 1e6:.3f}", f"{cost.bytes_down / 1e6:.3f}"]
            seconds = [f"{cost.centre_seconds:.3f}", f"{cost.coordinator_seconds:.2f}"]
            rows.append(format_row([num_centres, name, *megabytes, *seconds]))
    size = f"{layout.size / 1e6:.2f} M values"
    seconds_titles = ["a centre, CPU s", "coordinator, CPU s"]
    print(format_header(["centres", f"a round's change, {size}", "up, MB", "down, MB", *seconds_titles]))
    print("\n".join(rows))
    print(f"\n{describe_large_model()}.")


if __name__ == "__main__":
    main()
