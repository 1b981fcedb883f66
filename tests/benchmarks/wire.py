"""Measure what an update costs on the wire, by codec: bytes, CPU-seconds and error.

    OMP_NUM_THREADS=1 .venv/bin/python -m tests.benchmarks.wire [--backbone tf_efficientnet_b7] [--rounds 5]
    [--like adam|gaussian]

By default for EfficientNet-B7's shapes (64 M values, 256 MB). `draw_updates` says what the updates look like.
Errors are L2 norms over parameters, relative to the true update: of one round, and of the sum of all rounds
with error feedback. Then come both directions of a run, through Flower's records in memory but without a
network. Up: from a centre's update (client/federation/error_feedback.py) to the coordinator's
(server/aggregation/screening.py), the residual on disk. Down: from the server's step
(server/run/broadcast.py) to the weights that a centre trains from (client/federation/parameter_cache.py) and
keeps on disk. The last
line packs and unpacks the same tensors as a Flower ArrayRecord, for comparison.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
from flwr.app import Array, ArrayRecord
from numpy.typing import NDArray

from client.federation import error_feedback, parameter_cache
from common.config.compose import compose_config
from common.config.parse import config_to_dict
from common.config.schema import Compression, Config
from common.modeling.model import make_model
from common.modeling.parameters import Layout, Weights, build_layout
from common.protocol.flower_records import from_records, to_records
from common.protocol.messages import TrainReply, TrainRequest
from common.protocol.update_codec import decode_update, encode_update
from server.aggregation.screening import decode_reply
from server.ledger.ledger import Ledger
from server.run.broadcast import as_delta_request, quantize_server_step
from server.run.run_state import ModelState, Run
from server.run.transport import Transport
from tests.benchmarks.measuring import time_result
from tests.in_process_federation import count_bytes

CODECS: tuple[Compression, ...] = ("fp32", "fp16", "int8", "int4")
LOSSY_CODECS: tuple[Compression, ...] = ("int8", "int4")
STEPS_A_ROUND = 5
Floats = NDArray[np.float32]


# --- updates


def draw_updates(layout: Layout, num_rounds: int, like: str, seed: int = 1) -> list[Floats]:
    """Draw the updates [P] of one run, each tensor with a learning rate of its own.

    adam: five steps a round of a fresh Adam (as client/training/trainer.py makes it) on gradients that are
    half drift, half noise; gaussian: half drift, half noise.
    """
    rng = np.random.default_rng(seed)
    learning_rates = [
        np.full(slot.stop - slot.start, 10 ** rng.uniform(-5, -3), np.float32) for slot in layout.floats
    ]
    learning_rate = np.concatenate(learning_rates)
    drift = rng.standard_normal(layout.size, np.float32)
    if like == "adam":
        return [draw_adam_update(rng, learning_rate, drift) for _ in range(num_rounds)]
    updates = []
    for _ in range(num_rounds):
        updates.append(learning_rate * (drift + rng.standard_normal(layout.size, np.float32)))
    return updates


def draw_adam_update(rng: np.random.Generator, learning_rate: Floats, drift: Floats) -> Floats:
    first_moment = np.zeros_like(drift)
    second_moment = np.zeros_like(drift)
    delta = np.zeros_like(drift)
    for step in range(1, STEPS_A_ROUND + 1):
        gradient = drift + rng.standard_normal(drift.size, np.float32)
        first_moment = 0.9 * first_moment + 0.1 * gradient
        second_moment = 0.999 * second_moment + 0.001 * gradient * gradient
        mean = first_moment / (1 - 0.9**step)
        scale = np.sqrt(second_moment / (1 - 0.999**step)) + 1e-8
        delta -= learning_rate * mean / scale
    return delta


# --- codecs alone


def compute_norm(values: Floats, mask: NDArray[np.bool_]) -> float:
    return float(np.linalg.norm(values[mask]))


def print_codec(codec: Compression, layout: Layout, deltas: list[Floats]) -> None:
    """Encode and decode all rounds with error feedback, and print the cost and error."""
    mask = layout.parameter_mask()
    residual: Floats | None = None
    total_error = np.zeros(layout.size, np.float32)
    encoding_seconds = []
    decoding_seconds = []
    round_errors = []
    for delta in deltas:
        start = time.process_time()
        arrays, residual = encode_update(delta, layout, codec, residual)
        encoded_at = time.process_time()
        decoded = decode_update(arrays, layout, codec)
        encoding_seconds.append(encoded_at - start)
        decoding_seconds.append(time.process_time() - encoded_at)
        total_error += decoded - delta
        round_errors.append(compute_norm(decoded - delta, mask) / compute_norm(delta, mask))
    total = np.asarray(np.sum(deltas, axis=0, dtype=np.float32))
    ratio = 4 * layout.size / sum(array.nbytes for array in arrays.values())
    total_error_norm = compute_norm(total_error, mask) / compute_norm(total, mask)
    print(
        f"{codec:6} {ratio:10.2f}x {np.median(encoding_seconds):8.3f} {np.median(decoding_seconds):8.3f}"
        f"          {round_errors[0]:8.5f} {total_error_norm:12.5f}",
        flush=True,
    )


def print_flower_records(layout: Layout, delta: Floats) -> None:
    tensors = {slot.name: delta[slot.span].reshape(slot.shape) for slot in layout.floats}
    start = time.process_time()
    record = ArrayRecord({name: Array(tensor) for name, tensor in tensors.items()})
    packed_at = time.process_time()
    for array in record.values():
        array.numpy()
    unpacking_seconds = time.process_time() - packed_at
    print(
        f"Flower {1.0:10.2f}x {packed_at - start:8.3f} {unpacking_seconds:8.3f}          "
        "(one record a tensor, no wire)"
    )


# --- both directions of a run


@dataclass
class Leg:
    """One direction of one round."""

    num_bytes: int
    cpu: float
    wall: float


class RoundTrip:
    """A centre and a coordinator that exchange the updates of one stage."""

    def __init__(self, config: Config, layout: Layout, folder: Path) -> None:
        self.config = config
        self.layout = layout
        self.folder = folder
        self.codec = config.aggregation.compression
        floats = np.zeros(layout.size, np.float32)
        weights = Weights(floats, np.zeros(layout.int_buffer_size, np.int64))
        ledger = Ledger(f"sqlite:///{folder}/ledger.db")
        self.run = Run("r", config, folder, cast(Transport, None), ledger, ModelState(layout, weights))
        self.request = TrainRequest("r", config_to_dict(config), "main", 1, weights)
        self.held_digest = ""  # of the weights that the centre holds

    def play_round(self, round_number: int, delta: Floats) -> tuple[Leg, Leg]:
        """Send an update up and the new weights down; return what each cost."""
        request = replace(self.request, round=round_number)
        (received_delta, bytes_up), up = time_result(lambda: self._send_up(request, delta))
        bytes_down, down = time_result(lambda: self._send_down(request, received_delta))
        return Leg(bytes_up, up.cpu, up.wall), Leg(bytes_down, down.cpu, down.wall)

    def _send_up(self, request: TrainRequest, delta: Floats) -> tuple[Floats, int]:
        arrays = error_feedback.encode_with_feedback(self.folder, request, delta, self.layout, self.codec)
        int_buffers = self.run.model.weights.int_buffers
        reply = TrainReply("c", np.empty(0, np.float32), int_buffers, 1, 1, {}, 0.0, arrays)
        received = cast(TrainReply, from_records(to_records(reply)))
        return decode_reply(received, self.layout, self.codec).delta, count_bytes(reply)

    def _send_down(self, request: TrainRequest, received_delta: Floats) -> int:
        model = self.run.model
        next_weights = Weights(model.weights.floats + received_delta, model.weights.int_buffers)
        model.weights = quantize_server_step(self.run, next_weights)
        digest = model.weights.digest
        full_request = replace(request, weights=model.weights)
        short_request = as_delta_request(self.run, full_request, self.held_digest, digest)
        received = cast(TrainRequest, from_records(to_records(short_request)))
        restored = parameter_cache.restore_parameters(self.folder, self.config, received)
        assert restored.weights.digest == digest
        self.held_digest = digest
        return count_bytes(short_request)


def summarise_legs(legs: list[Leg], model_bytes: int) -> tuple[float, float, float]:
    """Medians over the rounds but the first, which goes down in full: fewer bytes, CPU and wall seconds."""
    counted = legs[1:]
    ratio = model_bytes / float(np.median([leg.num_bytes for leg in counted]))
    cpu = float(np.median([leg.cpu for leg in counted]))
    return ratio, cpu, float(np.median([leg.wall for leg in counted]))


def print_round_trips(config: Config, layout: Layout, deltas: list[Floats], folder: Path) -> None:
    """Print bytes and seconds of a round's update up and of the new weights down."""
    trip = RoundTrip(config, layout, folder)
    legs_up = []
    legs_down = []
    for round_number, delta in enumerate(deltas, 1):
        up, down = trip.play_round(round_number, delta)
        legs_up.append(up)
        legs_down.append(down)
    ratio_up, cpu_up, wall_up = summarise_legs(legs_up, 4 * layout.size)
    ratio_down, cpu_down, wall_down = summarise_legs(legs_down, 4 * layout.size)
    print(
        f"{trip.codec}   up   {ratio_up:5.2f}x fewer bytes  {cpu_up:6.2f} CPU s {wall_up:6.2f} s   "
        f"down {ratio_down:5.2f}x {cpu_down:6.2f} CPU s {wall_down:6.2f} s"
    )


def main() -> None:
    """Run the command that the module's docstring describes."""
    parser = argparse.ArgumentParser(description="The cost of an update on the wire, by codec.")
    parser.add_argument("--backbone", default="tf_efficientnet_b7")
    parser.add_argument("--rounds", type=int, default=5, help="at least 2")
    parser.add_argument("--like", choices=["adam", "gaussian"], default="adam", help="shape of the updates")
    arguments = parser.parse_args()
    config = compose_config([f"backbone.name={arguments.backbone}", "tasks.source.classes=[a,b,c,d]"])
    layout = build_layout(make_model(config.backbone, config.tasks, 0))
    deltas = draw_updates(layout, arguments.rounds, arguments.like)
    print(
        f"{arguments.backbone}: {layout.size / 1e6:.1f} M values in {len(layout.floats)} tensors, "
        f"{4 * layout.size / 1e6:.0f} MB"
    )
    rounds_title = f"of {arguments.rounds} rounds"
    print(f"{'':6} {'fewer bytes':>11} {'encode':>8} {'decode':>8}  CPU s   {'error':>8} {rounds_title:>12}")
    for codec in CODECS:
        print_codec(codec, layout, deltas)
    for codec in LOSSY_CODECS:
        aggregation = replace(config.aggregation, compression=codec)
        with tempfile.TemporaryDirectory() as folder:
            print_round_trips(replace(config, aggregation=aggregation), layout, deltas, Path(folder))
    print_flower_records(layout, deltas[0])


if __name__ == "__main__":
    main()
