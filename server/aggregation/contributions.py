"""From contributions to the next weights: check, spool, screen, weigh, sum, step.

Contributions are spooled to disk as they arrive and summed in the order of the centres' names when the round closes: memory does not grow with
their number, and the sum has the same bits whatever the order of arrival, which a resumed run depends on.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from common.config.schema import AggregationConfig, Compression, Task
from common.learning.class_imbalance import compute_centre_weights, weights_by_group
from common.learning.losses import uses_feature_map
from common.modeling.parameters import Layout, Weights
from common.protocol.messages import TrainReply
from common.protocol.update_codec import decode_update

# Values of the sum that stay in the cache while every contribution is added, by as many threads as keep the memory busy. Not OpenMP's: they wait for
# each other after every block, which on a busy machine costs seconds.
BLOCK_SIZE, MAX_THREADS = 1 << 19, 4


@dataclass
class StoredUpdate:
    """A contribution on disk: `delta` float32 [P], with what is needed to judge it."""

    centre: str
    path: Path
    int_buffers: NDArray[np.int64]
    norm: float  # L2 over parameters; buffers would drown it

    def load_delta(self) -> NDArray[np.float32]:
        """Where it lies on disk; nothing is read before it is used."""
        return np.load(self.path, mmap_mode="c")  # type: ignore[no-any-return]


def decode_reply(reply: TrainReply, layout: Layout, codec: Compression) -> TrainReply:
    """With the change itself in place of its code. Raises ValueError or KeyError for what is none of this layout's or codec's."""
    if not reply.encoded_delta:
        return reply
    return replace(reply, delta=decode_update(reply.encoded_delta, layout, codec), encoded_delta={})


def validation_error(reply: TrainReply, layout: Layout, expect_empty: bool) -> str:
    """Why a contribution cannot be used, or "". `empty`: the stage keeps all weights at the centres, nothing should come."""
    expected = 0 if expect_empty else layout.size
    if reply.delta.shape != (expected,):
        return f"wrong shape: {reply.delta.size} weights instead of {expected}"
    if reply.int_buffers.shape != (layout.int_buffer_size,):
        return f"wrong shape: {reply.int_buffers.size} counters instead of {layout.int_buffer_size}"
    with np.errstate(invalid="ignore"):
        total = reply.delta.sum(dtype=np.float64)  # finite float32 add up to a finite float64
    if not np.isfinite(total):
        return "not finite"
    return ""


def store_update(reply: TrainReply, layout: Layout, folder: Path) -> StoredUpdate:
    """Put a contribution that has no fault on disk, so that its memory can go."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{reply.centre}.npy"
    np.save(path, reply.delta)
    norms = [
        float(np.linalg.norm(reply.delta[e.span]))
        for e in layout.floats
        if e.is_parameter and reply.delta.size
    ]
    return StoredUpdate(reply.centre, path, reply.int_buffers, math.hypot(*norms))


def find_outliers(norms: Mapping[str, float], max_ratio: float) -> dict[str, str]:
    """{centre: reason} of those whose norm exceeds `factor` times the median of the others' norms. Of two nobody can say which one is odd."""
    found = {}
    for centre, norm in norms.items():
        others = [n for c, n in norms.items() if c != centre]
        if len(others) > 1 and median(others) > 0 and norm > max_ratio * median(others):
            found[centre] = (
                f"norm {norm:.3g} is {norm / median(others):.0f} times the others' median (limit {max_ratio:g})"
            )
    return found


def compute_group_weights(
    counts: Mapping[str, Mapping[str, ArrayLike]], settings: AggregationConfig, tasks: Mapping[str, Task]
) -> dict[str, dict[str, float]]:
    """{"backbone", "decoder" or head: {centre: weight}} from each centre's training counts {task: [K + 1]}, the last cell being the unlabelled.

    A head goes by the cells labelled for its task, so that a centre without labels for it never dilutes it; what tasks share by `part_weights`.
    """
    weights: dict[str, dict[str, float]] = {}
    for task in tasks:
        cells = {c: np.asarray(by[task], dtype=np.float64)[:-1] for c, by in counts.items()}
        whole = (
            {c: n.sum(keepdims=True) for c, n in cells.items()} if settings.weight_by == "scans" else cells
        )
        weights[task] = compute_centre_weights(whole, settings.tau)
    labelled = [t for t in tasks if sum(weights[t].values()) > 0]
    parts = {c: weights_by_group({t: weights[t][c] for t in labelled}, tasks) for c in counts}
    shared = (
        ("backbone", "decoder") if any(uses_feature_map(task) for task in tasks.values()) else ("backbone",)
    )
    return {name: {c: parts[c][name] for c in counts} for name in shared} | weights


def weighted_sum(
    updates: list[StoredUpdate], group_weights: Mapping[str, Mapping[str, float]], layout: Layout
) -> NDArray[np.float32]:
    """`sum_c w_c delta_c` in float32 [P], each group of weights by its own w."""

    def add(out: Tensor, deltas: list[Tensor], shares: list[float]) -> None:
        out.zero_()
        for delta, share in zip(deltas, shares, strict=True):
            out.add_(delta, alpha=share)

    return reduce_blockwise(updates, group_weights, layout, add, BLOCK_SIZE)


def reduce_blockwise(
    updates: list[StoredUpdate],
    group_weights: Mapping[str, Mapping[str, float]],
    layout: Layout,
    reduce_block: Callable[[Tensor, list[Tensor], list[float]], None],
    block_size: int,
) -> NDArray[np.float32]:
    """Float32 [P], each part of which `combine(out [B], the centres' [B], their weights above 0)` writes. A group without weights does not move.

    Block by block, so that every contribution is read once, where it lies on disk, and the result is written once.
    """
    total = np.empty(
        layout.size, np.float32
    )  # NumPy asks the system for large pages, which spares half the time
    deltas = {
        one.centre: torch.from_numpy(one.load_delta()) for one in sorted(updates, key=lambda s: s.centre)
    }
    shares = {
        group: {c: share for c in deltas if (share := by.get(c, 0.0))} for group, by in group_weights.items()
    }
    runs = [(group, run) for group, some in layout.group_slices().items() for run in some]
    blocks = [
        (group, slice(at, min(at + block_size, run.stop)))
        for group, run in runs
        for at in range(run.start, run.stop, block_size)
    ]

    def work(job: tuple[str, slice]) -> None:
        group, part = job
        out, of = torch.from_numpy(total[part]), shares.get(group, {})
        reduce_block(out, [deltas[c][part] for c in of], list(of.values())) if of else out.zero_()

    before = torch.get_num_threads()
    with ThreadPoolExecutor(
        min(before, MAX_THREADS), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        deque(pool.map(work, blocks), maxlen=0)  # for what they raise
    torch.set_num_threads(before)
    return total


def server_step(
    weights: Weights,
    mean_delta: NDArray[np.float32],
    updates: list[StoredUpdate],
    settings: AggregationConfig,
    layout: Layout,
    optimiser_state: dict[str, NDArray[np.float32]],
) -> Weights:
    """The next weights, in the memory of `update`; `state` (the server optimiser's moments) changes in place.

    FedAvg adds `lr * update`. FedAdam and FedYogi (Reddi et al., ICLR 2021, algorithm 2) scale it by moments; batch-norm statistics are
    plain averages in every method. Counters are the largest of the centres' and keep their type.
    """
    averages = {
        entry.start: mean_delta[entry.span].copy() for entry in layout.floats if not entry.is_parameter
    }
    if settings.method != "fedavg":
        m = optimiser_state.setdefault("m", np.zeros_like(mean_delta))
        v = optimiser_state.setdefault("v", np.full_like(mean_delta, settings.eps**2))
        square = mean_delta**2
        m += (1 - settings.beta1) * (mean_delta - m)
        v += (1 - settings.beta2) * (
            square - v if settings.method == "fedadam" else square * np.sign(square - v)
        )
        np.divide(m, np.sqrt(v) + settings.eps, out=mean_delta)
    mean_delta *= settings.server_lr
    for entry in layout.floats:
        if not entry.is_parameter:
            mean_delta[entry.span] = averages[entry.start]
    mean_delta += weights.floats
    integers = (
        np.max([s.int_buffers for s in updates], axis=0)
        if updates and layout.int_buffer_size
        else weights.int_buffers
    )
    return Weights(mean_delta, integers)
