"""What a change of weights costs on the wire, by codec.

Bytes, CPU seconds, error, for EfficientNet-B7's shapes (63.8 M parameters, 256 MB).

    OMP_NUM_THREADS=1 .venv/bin/python -m tests.benchmarks.wire [--backbone tf_efficientnet_b7] [--rounds 5]
    [--like adam|gaussian]

What changes look like: `changes`. Errors are L2 over parameters, relative to the true change: of one round,
and of the sum of all rounds with error feedback. Then the way that a run goes, Flower's records in memory but
no network: up from a centre's change (client/federation/error_feedback.py) to the server's
(server/aggregation/screening.py), residual on disk; down from the server's step (server/run/broadcast.py) to
the weights that a centre trains from (client/federation/parameter_cache.py), which it keeps on disk. The last
line is a peer's: Flower's ArrayRecord of the same tensors, packed and unpacked.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from client.federation import error_feedback, parameter_cache
from common.config.compose import compose_config
from common.config.parse import config_to_dict
from common.config.schema import Compression, Config
from common.modeling.model import make_model
from common.modeling.parameters import Layout, Weights, build_layout
from common.protocol.flower_records import from_records, to_records
from common.protocol.message_packing import pack_message
from common.protocol.messages import Reply, Request, TrainReply, TrainRequest
from common.protocol.update_codec import decode_update, encode_update
from server.aggregation.screening import decode_reply
from server.ledger.ledger import Ledger
from server.run.broadcast import as_delta_request, quantize_server_step
from server.run.run_state import ModelState, Run
from server.run.transport import Transport


def changes(layout: Layout, rounds: int, like: str, seed: int = 1) -> list[np.ndarray]:
    """`rounds` changes [P] of one run, each tensor with a learning rate of its own.

    Adam: five steps a round of a fresh Adam (as client/training/trainer.py makes it) on gradients that are
    half drift, half noise; gaussian: half drift, half noise.
    """
    rng = np.random.default_rng(seed)
    size = np.concatenate(
        [np.full(e.stop - e.start, 10 ** rng.uniform(-5, -3), np.float32) for e in layout.floats]
    )
    drift = rng.standard_normal(layout.size, np.float32)
    out = []
    for _ in range(rounds):
        if like == "gaussian":
            out.append(size * (drift + rng.standard_normal(layout.size, np.float32)))
            continue
        m, v, delta = (np.zeros(layout.size, np.float32) for _ in range(3))
        for t in range(1, 6):
            g = drift + rng.standard_normal(layout.size, np.float32)
            m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
            delta -= size * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
        out.append(delta)
    return out


def carried(message: Request | Reply) -> tuple[Request | Reply, int]:
    """The message behind Flower's records, and the bytes of its arrays."""
    return from_records(to_records(message)), sum(a.nbytes for a in pack_message(message)[0].values())


def both_ways(config: Config, layout: Layout, deltas: list[np.ndarray], folder: Path) -> None:
    """Prints bytes and CPU seconds of a round's change up and down, medians over the rounds but the first,
    which goes down whole.
    """
    start = Weights(np.zeros(layout.size, np.float32), np.zeros(layout.int_buffer_size, np.int64))
    model = ModelState(layout, start)
    run = Run("r", config, folder, Transport, Ledger(f"sqlite:///{folder}/ledger.db"), model)  # type: ignore[arg-type]
    request, held, rows = TrainRequest("r", config_to_dict(config), "main", 1, model.weights), "", []
    for number, delta in enumerate(deltas, 1):
        began, clock = time.process_time(), time.perf_counter()
        arrays = error_feedback.encode_with_feedback(
            folder, replace(request, round=number), delta, layout, config.aggregation.compression
        )
        reply, up = carried(
            TrainReply("c", np.empty(0, np.float32), model.weights.int_buffers, 1, 1, {}, 0.0, arrays)
        )
        update = decode_reply(reply, layout, config.aggregation.compression).delta  # type: ignore[arg-type]
        there, there_clock = time.process_time(), time.perf_counter()
        model.weights = quantize_server_step(
            run, Weights(model.weights.floats + update, model.weights.int_buffers)
        )
        digest = model.weights.digest
        short, down = carried(
            as_delta_request(run, replace(request, round=number, weights=model.weights), held, digest)
        )
        arrived = parameter_cache.restore_parameters(folder, config, short)  # type: ignore[arg-type]
        back, back_clock = time.process_time(), time.perf_counter()
        assert arrived.weights is not None
        assert arrived.weights.digest == digest
        held = digest
        rows.append((up, there - began, there_clock - clock, down, back - there, back_clock - there_clock))
    whole = 4 * layout.size
    up, cpu, wall, down, cpu_back, wall_back = (
        statistics.median(column[1:]) for column in zip(*rows, strict=True)
    )
    print(
        f"up   {whole / up:5.2f}x fewer bytes  {cpu:6.2f} CPU s {wall:6.2f} s   down "
        f"{whole / down:5.2f}x {cpu_back:6.2f} CPU s {wall_back:6.2f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backbone", default="tf_efficientnet_b7")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--like", choices=["adam", "gaussian"], default="adam")
    given = parser.parse_args()
    config = compose_config([f"backbone.name={given.backbone}", "tasks.source.classes=[a,b,c,d]"])
    layout = build_layout(make_model(config.backbone, config.tasks, 0))
    mask, deltas = layout.parameter_mask(), changes(layout, given.rounds, given.like)

    def norm(x: np.ndarray) -> float:
        return float(np.linalg.norm(x[mask]))

    print(
        f"{given.backbone}: {layout.size / 1e6:.1f} M values in {len(layout.floats)} tensors, "
        f"{4 * layout.size / 1e6:.0f} MB"
    )
    print(
        f"{'':6} {'fewer bytes':>11} {'encode':>8} {'decode':>8}  CPU s   {'error':>8} "
        f"{'of ' + str(given.rounds) + ' rounds':>12}"
    )
    for codec in ("fp32", "fp16", "int8", "int4"):
        residual, error, seconds, single = None, np.zeros(layout.size, np.float32), [], 0.0
        for k, delta in enumerate(deltas):
            began = time.process_time()
            arrays, residual = encode_update(delta, layout, codec, residual)
            encoded = time.process_time()
            back = decode_update(arrays, layout, codec)
            seconds.append((encoded - began, time.process_time() - encoded))
            error += back - delta
            single = single or (norm(back - delta) / norm(delta) if k == 0 else 0.0)
        total = np.sum(deltas, axis=0, dtype=np.float32)
        ratio = 4 * layout.size / sum(a.nbytes for a in arrays.values())
        encoding, decoding = (statistics.median(s) for s in zip(*seconds, strict=True))
        print(
            f"{codec:6} {ratio:10.2f}x {encoding:8.3f} {decoding:8.3f}          {single:8.5f} "
            f"{norm(error) / norm(total):12.5f}",
            flush=True,
        )
    codecs: tuple[Compression, ...] = ("int8", "int4")
    for codec in codecs:
        with tempfile.TemporaryDirectory() as folder:
            print(f"{codec}   ", end="")
            both_ways(
                replace(config, aggregation=replace(config.aggregation, compression=codec)),
                layout,
                deltas,
                Path(folder),
            )
    from flwr.app import Array, ArrayRecord

    named = {e.name: deltas[0][e.span].reshape(e.shape) for e in layout.floats}
    began = time.process_time()
    record = ArrayRecord({n: Array(a) for n, a in named.items()})
    packed_at = time.process_time()
    [a.numpy() for a in record.values()]
    print(
        f"Flower {1.0:10.2f}x {packed_at - began:8.3f} {time.process_time() - packed_at:8.3f}          "
        "(1 record a tensor, no wire)"
    )


if __name__ == "__main__":
    main()
