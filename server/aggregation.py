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

from common.codec import decode
from common.imbalance import centre_weights, part_weights
from common.messages import Contribution
from common.schema import Aggregation, Codec, Task
from common.tasks import reads_map
from common.weights import Layout, Weights

# Values of the sum that stay in the cache while every contribution is added, by as many threads as keep the memory busy. Not OpenMP's: they wait for
# each other after every block, which on a busy machine costs seconds.
BLOCK, THREADS = 1 << 19, 4


@dataclass
class Spooled:
    """A contribution on disk: `delta` float32 [P], with what is needed to judge it."""

    centre: str
    path: Path
    integers: NDArray[np.int64]
    norm: float  # L2 over parameters; buffers would drown it

    def delta(self) -> NDArray[np.float32]:
        """Where it lies on disk; nothing is read before it is used."""
        return np.load(self.path, mmap_mode="c")  # type: ignore[no-any-return]


def decoded(contribution: Contribution, layout: Layout, codec: Codec) -> Contribution:
    """With the change itself in place of its code. Raises ValueError or KeyError for what is none of this layout's or codec's."""
    if not contribution.coded:
        return contribution
    return replace(contribution, delta=decode(contribution.coded, layout, codec), coded={})


def fault(contribution: Contribution, layout: Layout, empty: bool) -> str:
    """Why a contribution cannot be used, or "". `empty`: the stage keeps all weights at the centres, nothing should come."""
    expected = 0 if empty else layout.size
    if contribution.delta.shape != (expected,):
        return f"wrong shape: {contribution.delta.size} weights instead of {expected}"
    if contribution.integers.shape != (layout.integer_size,):
        return f"wrong shape: {contribution.integers.size} counters instead of {layout.integer_size}"
    with np.errstate(invalid="ignore"):
        total = contribution.delta.sum(dtype=np.float64)  # finite float32 add up to a finite float64
    if not np.isfinite(total):
        return "not finite"
    return ""


def spool(contribution: Contribution, layout: Layout, folder: Path) -> Spooled:
    """Put a contribution that has no fault on disk, so that its memory can go."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{contribution.centre}.npy"
    np.save(path, contribution.delta)
    norms = [float(np.linalg.norm(contribution.delta[e.where])) for e in layout.floats if e.parameter and contribution.delta.size]
    return Spooled(contribution.centre, path, contribution.integers, math.hypot(*norms))


def outliers(norms: Mapping[str, float], factor: float) -> dict[str, str]:
    """{centre: reason} of those whose norm exceeds `factor` times the median of the others' norms. Of two nobody can say which one is odd."""
    found = {}
    for centre, norm in norms.items():
        others = [n for c, n in norms.items() if c != centre]
        if len(others) > 1 and median(others) > 0 and norm > factor * median(others):
            found[centre] = f"norm {norm:.3g} is {norm / median(others):.0f} times the others' median (limit {factor:g})"
    return found


def group_weights(
    counts: Mapping[str, Mapping[str, ArrayLike]], settings: Aggregation, tasks: Mapping[str, Task]
) -> dict[str, dict[str, float]]:
    """{"backbone", "decoder" or head: {centre: weight}} from each centre's training counts {task: [K + 1]}, the last cell being the unlabelled.

    A head goes by the cells labelled for its task, so that a centre without labels for it never dilutes it; what tasks share by `part_weights`.
    """
    weights: dict[str, dict[str, float]] = {}
    for task in tasks:
        cells = {c: np.asarray(by[task], dtype=np.float64)[:-1] for c, by in counts.items()}
        whole = {c: n.sum(keepdims=True) for c, n in cells.items()} if settings.count == "scans" else cells
        weights[task] = centre_weights(whole, settings.tau)
    labelled = [t for t in tasks if sum(weights[t].values()) > 0]
    parts = {c: part_weights({t: weights[t][c] for t in labelled}, tasks) for c in counts}
    shared = ("backbone", "decoder") if any(reads_map(task) for task in tasks.values()) else ("backbone",)
    return {name: {c: parts[c][name] for c in counts} for name in shared} | weights


def weighted_sum(spooled: list[Spooled], weights: Mapping[str, Mapping[str, float]], layout: Layout) -> NDArray[np.float32]:
    """`sum_c w_c delta_c` in float32 [P], each group of weights by its own w."""

    def add(out: Tensor, deltas: list[Tensor], shares: list[float]) -> None:
        out.zero_()
        for delta, share in zip(deltas, shares, strict=True):
            out.add_(delta, alpha=share)

    return by_blocks(spooled, weights, layout, add, BLOCK)


def by_blocks(
    spooled: list[Spooled],
    weights: Mapping[str, Mapping[str, float]],
    layout: Layout,
    combine: Callable[[Tensor, list[Tensor], list[float]], None],
    block: int,
) -> NDArray[np.float32]:
    """Float32 [P], each part of which `combine(out [B], the centres' [B], their weights above 0)` writes. A group without weights does not move.

    Block by block, so that every contribution is read once, where it lies on disk, and the result is written once.
    """
    total = np.empty(layout.size, np.float32)  # NumPy asks the system for large pages, which spares half the time
    deltas = {one.centre: torch.from_numpy(one.delta()) for one in sorted(spooled, key=lambda s: s.centre)}
    shares = {group: {c: share for c in deltas if (share := by.get(c, 0.0))} for group, by in weights.items()}
    runs = [(group, run) for group, some in layout.groups().items() for run in some]
    blocks = [(group, slice(at, min(at + block, run.stop))) for group, run in runs for at in range(run.start, run.stop, block)]

    def work(job: tuple[str, slice]) -> None:
        group, part = job
        out, of = torch.from_numpy(total[part]), shares.get(group, {})
        combine(out, [deltas[c][part] for c in of], list(of.values())) if of else out.zero_()

    before = torch.get_num_threads()
    with ThreadPoolExecutor(min(before, THREADS), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        deque(pool.map(work, blocks), maxlen=0)  # for what they raise
    torch.set_num_threads(before)
    return total


def step(
    weights: Weights,
    update: NDArray[np.float32],
    spooled: list[Spooled],
    settings: Aggregation,
    layout: Layout,
    state: dict[str, NDArray[np.float32]],
) -> Weights:
    """The next weights, in the memory of `update`; `state` (the server optimiser's moments) changes in place.

    FedAvg adds `lr * update`. FedAdam and FedYogi (Reddi et al., ICLR 2021, algorithm 2) scale it by moments; batch-norm statistics are
    plain averages in every method. Counters are the largest of the centres' and keep their type.
    """
    averages = {entry.start: update[entry.where].copy() for entry in layout.floats if not entry.parameter}
    if settings.method != "fedavg":
        m = state.setdefault("m", np.zeros_like(update))
        v = state.setdefault("v", np.full_like(update, settings.eps**2))
        square = update**2
        m += (1 - settings.beta1) * (update - m)
        v += (1 - settings.beta2) * (square - v if settings.method == "fedadam" else square * np.sign(square - v))
        np.divide(m, np.sqrt(v) + settings.eps, out=update)
    update *= settings.lr
    for entry in layout.floats:
        if not entry.parameter:
            update[entry.where] = averages[entry.start]
    update += weights.floats
    integers = np.max([s.integers for s in spooled], axis=0) if spooled and layout.integer_size else weights.integers
    return Weights(update, integers)
