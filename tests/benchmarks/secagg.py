"""Secure aggregation against the open.

Bytes and seconds of a round's sum at 4, 16 and 64 centres, and of the masks of a big model.

python -m tests.benchmarks.secagg

The centres' and the coordinator's own code in one process (tests/secure_sums.py); changes are drawn instead
of trained. A centre's seconds are of all its steps together; in a federation the centres work side by side,
and each message costs what a message costs there. CPU-seconds, one thread: the machine is shared.
"""

from __future__ import annotations

import secrets
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
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
from common.protocol.message_packing import pack_message
from common.protocol.messages import MaskedInputRequest, Request, TrainReply, TrainRequest
from common.protocol.update_codec import encode_update
from server.aggregation.screening import decode_reply
from server.aggregation.stored_updates import store_update
from server.aggregation.weighted_mean import weighted_sum
from server.run.secure_aggregation import secure_sum
from server.run.transport import ReceivedReply
from tests.secure_sums import Wire, run_over

BIG = 16_000_000
Cost = tuple[
    float, float, float, float
]  # of a centre: bytes up, bytes down beside the weights, seconds; the coordinator's seconds


@dataclass
class Timed(Wire):
    """`seconds` that all centres together took."""

    seconds: float = 0.0

    def send_and_receive(self, requests: Mapping[str, Request], timeout: float) -> Iterator[ReceivedReply]:
        some = super().send_and_receive(requests, timeout)
        while True:
            began = time.process_time()
            received = next(some, None)
            self.seconds += time.process_time() - began
            if received is None:
                return
            yield received


def config_of(count: int) -> Config:
    names = ",".join(f"c{i:02d}" for i in range(count))
    return compose_config(
        [
            "federation=folder",
            f"federation.centres=[{names}]",
            "privacy=secagg",
            f"tasks.source.classes=[{names}]",
        ]
    )


def drawn(config: Config, layout: Layout) -> Iterator[TrainReply]:
    rng = np.random.default_rng(1)
    for name in config.federation.centres:
        delta = rng.normal(0, 1e-3, layout.size).astype(np.float32)
        yield TrainReply(name, delta, np.zeros(layout.int_buffer_size, np.int64), 5, 2, {}, 0.1)


def size_of(contribution: TrainReply) -> int:
    return sum(array.nbytes for array in pack_message(contribution)[0].values())


def secret(config: Config, layout: Layout, folder: Path, lost: int = 0) -> Cost:
    """`lost` centres drop out when they have shared their secrets: the dearest moment."""
    names = config.federation.centres
    wire = Timed(folder, config, {(MaskedInputRequest, name) for name in names[:lost]})
    weights = Weights(np.zeros(layout.size, np.float32), np.zeros(layout.int_buffer_size, np.int64))
    each = float(len(names))
    request = TrainRequest(
        "r", config_to_dict(config), "main", 1, weights, total_label_weight={"covid": each, "source": each}
    )
    said, up, sealing = {}, 0, 0.0
    for one in drawn(config, layout):
        began = time.process_time()
        said[one.centre] = centre_side.mask_update(
            folder / one.centre, config, request, one, {"covid": 1.0, "source": 1.0}
        )
        sealing += time.process_time() - began
        up += size_of(said[one.centre])
    run, began = run_over(wire, layout), time.process_time()
    found = secure_sum(
        run,
        said,
        sum(e.stop - e.start for e in layout.floats if e.is_parameter),
        secure_aggregation.empty_update_sums(layout),
    )
    secure_aggregation.dequantize_mean(
        found.values, found.sums, layout, secure_aggregation.require_secagg_config(config)
    )
    server = time.process_time() - began - wire.seconds
    bytes_up, bytes_down = run.traffic.sum_up()
    return (
        (up + bytes_up) / len(names),
        bytes_down / len(names),
        (sealing + wire.seconds) / len(names),
        server,
    )


def in_the_open(config: Config, layout: Layout, folder: Path, codec: Compression) -> Cost:
    names = config.federation.centres
    up, coding, server, kept = 0, 0.0, 0.0, []
    for one in drawn(config, layout):
        began = time.process_time()
        if codec != "fp32":
            one.encoded_delta, _ = encode_update(one.delta, layout, codec)
            one.delta = EMPTY_PARAMS
        coding += time.process_time() - began
        up += size_of(one)
        began = time.process_time()
        kept.append(store_update(decode_reply(one, layout, codec), layout, folder))
        server += time.process_time() - began
    began = time.process_time()
    weighted_sum(
        kept, {group: dict.fromkeys(names, 1 / len(names)) for group in layout.group_slices()}, layout
    )
    return up / len(names), 0, coding / len(names), server + time.process_time() - began


def big() -> str:
    """CPU-seconds of each part of the work on a model of 16 M parameters in 64 tensors."""
    layout = Layout(
        [
            TensorSlot(str(i), (BIG // 64,), i * BIG // 64, (i + 1) * BIG // 64, "backbone", True, False)
            for i in range(64)
        ]
    )
    delta = np.random.default_rng(1).normal(0, 1e-3, BIG).astype(np.float32)
    exact, seed, width, spent = np.zeros(1, np.uint64), secrets.token_bytes(32), 4, [time.process_time()]
    values = secure_aggregation.quantize_weighted_update(
        delta, {"backbone": 0.25}, layout, SecureAggregationConfig()
    )[0].astype(secure_aggregation.ring_dtype(width))
    spent.append(time.process_time())
    secure_aggregation.add_mask(seed, 1, exact, values)
    spent.append(time.process_time())
    total = np.zeros(BIG, np.uint32)
    total += secure_aggregation.unpack_ring_values(secure_aggregation.pack_ring_values(values, width), width)
    spent.append(time.process_time())
    on_grid, masked, added = np.diff(spent)
    return (
        f"16 M parameters, CPU-seconds: weighed and put on the grid {on_grid:.2f}, one mask {masked:.3f}, "
        f"one reply added {added:.3f}"
    )


def main() -> None:
    torch.set_num_threads(1)
    rows: list[tuple[str, str, Cost]] = []
    for count in (4, 16, 64):
        config = config_of(count)
        layout = parameter_layout(config)
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder)
            for codec in ("fp32", "int8"):
                rows.append(
                    (str(count), f"in the open, {codec}", in_the_open(config, layout, place / codec, codec))
                )
            rows.append((str(count), "secure sum", secret(config, layout, place / "all")))
            rows.append(
                (
                    str(count),
                    f"secure sum, {count // 4} lost",
                    secret(config, layout, place / "lost", count // 4),
                )
            )
    print(
        f"| centres | a round's change, {layout.size / 1e6:.2f} M values | up, MB | down, MB | a centre, "
        "CPU s | coordinator, CPU s |"
    )
    print("|---|---|---|---|---|---|")
    for count_, how, (up, down, centre, server) in rows:
        print(f"| {count_} | {how} | {up / 1e6:.3f} | {down / 1e6:.3f} | {centre:.3f} | {server:.2f} |")
    print(f"\n{big()}.")


if __name__ == "__main__":
    main()
