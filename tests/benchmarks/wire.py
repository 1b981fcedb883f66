"""What a change of weights costs on the wire, by codec: bytes, CPU seconds, error, for EfficientNet-B7's shapes (63.8 M parameters, 256 MB).

    OMP_NUM_THREADS=1 .venv/bin/python -m tests.benchmarks.wire [--backbone tf_efficientnet_b7] [--rounds 5] [--like adam|gaussian]

What changes look like: `changes`. Errors are L2 over
parameters, relative to the true change: of one round, and of the sum of all rounds with error feedback. The last line is a peer's: Flower's
ArrayRecord of the same tensors, packed and unpacked.
"""

from __future__ import annotations

import argparse
import statistics
import time

import numpy as np
import timm

from common.codec import decode, encode
from common.weights import Layout, layout_of


def changes(layout: Layout, rounds: int, like: str, seed: int = 1) -> list[np.ndarray]:
    """`rounds` changes [P] of one run, each tensor with a learning rate of its own. adam: five steps a round of a fresh Adam (as client/trainer.py
    makes it) on gradients that are half drift, half noise; gaussian: half drift, half noise."""
    rng = np.random.default_rng(seed)
    size = np.concatenate([np.full(e.stop - e.start, 10 ** rng.uniform(-5, -3), np.float32) for e in layout.floats])
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backbone", default="tf_efficientnet_b7")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--like", choices=["adam", "gaussian"], default="adam")
    given = parser.parse_args()
    layout = layout_of(timm.create_model(given.backbone))
    mask, deltas = layout.parameters(), changes(layout, given.rounds, given.like)

    def norm(x: np.ndarray) -> float:
        return float(np.linalg.norm(x[mask]))

    print(f"{given.backbone}: {layout.size / 1e6:.1f} M values in {len(layout.floats)} tensors, {4 * layout.size / 1e6:.0f} MB")
    print(f"{'':6} {'fewer bytes':>11} {'encode':>8} {'decode':>8}  CPU s   {'error':>8} {'of ' + str(given.rounds) + ' rounds':>12}")
    for codec in ("fp32", "fp16", "int8", "int4"):
        residual, error, seconds, single = None, np.zeros(layout.size, np.float32), [], 0.0
        for k, delta in enumerate(deltas):
            began = time.process_time()
            arrays, residual = encode(delta, layout, codec, residual)
            encoded = time.process_time()
            back = decode(arrays, layout, codec)
            seconds.append((encoded - began, time.process_time() - encoded))
            error += back - delta
            single = single or (norm(back - delta) / norm(delta) if k == 0 else 0.0)
        total = np.sum(deltas, axis=0, dtype=np.float32)
        ratio = 4 * layout.size / sum(a.nbytes for a in arrays.values())
        encoding, decoding = (statistics.median(s) for s in zip(*seconds, strict=True))
        print(
            f"{codec:6} {ratio:10.2f}x {encoding:8.3f} {decoding:8.3f}          {single:8.5f} {norm(error) / norm(total):12.5f}", flush=True
        )
    from flwr.app import Array, ArrayRecord

    named = {e.name: deltas[0][e.where].reshape(e.shape) for e in layout.floats}
    began = time.process_time()
    record = ArrayRecord({n: Array(a) for n, a in named.items()})
    packed_at = time.process_time()
    [a.numpy() for a in record.values()]
    print(f"Flower {1.0:10.2f}x {packed_at - began:8.3f} {time.process_time() - packed_at:8.3f}          (1 record a tensor, no wire)")


if __name__ == "__main__":
    main()
