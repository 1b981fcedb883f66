"""Weighted sums of updates that lie on disk, block by block.

Updates are summed in the order of the centres' names when the round closes: the sum has the same bits
whatever the order of arrival, which a resumed run depends on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.modeling.parameters import Layout
from server.aggregation.stored_updates import StoredUpdate
from server.aggregation.weighting import GroupWeights

BLOCK_SIZE = 1 << 19  # values of the sum that stay in the cache while every update is added
# As many threads as keep the memory busy. They are not OpenMP's, which wait for each other after every block:
# on a busy machine that costs seconds.
MAX_THREADS = 4

# Writes a block of the result [B] from the centres' blocks [B] and their weights, which are above 0.
BlockReducer = Callable[[Tensor, list[Tensor], list[float]], None]


class Block(NamedTuple):
    """A part of the flat weights that lies within one parameter group."""

    group: str
    span: slice


def weighted_sum(
    updates: Sequence[StoredUpdate], group_weights: GroupWeights, layout: Layout
) -> NDArray[np.float32]:
    """Return `sum_c w_c delta_c` in float32 [P], each parameter group by its own weights."""
    return reduce_blockwise(updates, group_weights, layout, _add_weighted, BLOCK_SIZE)


def _add_weighted(out: Tensor, deltas: list[Tensor], weights: list[float]) -> None:
    out.zero_()
    for delta, weight in zip(deltas, weights, strict=True):
        out.add_(delta, alpha=weight)


def split_into_blocks(span: slice, block_size: int) -> Iterator[slice]:
    """Yield successive parts of a span, each of `block_size` values at most."""
    for start in range(span.start, span.stop, block_size):
        yield slice(start, min(start + block_size, span.stop))


def reduce_blockwise(
    updates: Sequence[StoredUpdate],
    group_weights: GroupWeights,
    layout: Layout,
    reduce_block: BlockReducer,
    block_size: int,
) -> NDArray[np.float32]:
    """Return float32 [P], each block of which `reduce_block` writes; a parameter group without weights is 0.

    Block by block, every update is read once, where it lies on disk, and the result is written once.
    """
    result = np.empty(layout.size, np.float32)  # NumPy asks for large pages, which halves the time
    deltas = {}
    for update in sorted(updates, key=lambda update: update.centre):
        deltas[update.centre] = torch.from_numpy(update.load_delta())
    weights_above_zero: dict[str, dict[str, float]] = {}
    for group, weights in group_weights.items():
        weights_above_zero[group] = {c: weights[c] for c in deltas if weights.get(c, 0.0)}

    def reduce_one(block: Block) -> None:
        out = torch.from_numpy(result[block.span])
        weights = weights_above_zero.get(block.group)
        if weights:
            reduce_block(out, [deltas[centre][block.span] for centre in weights], list(weights.values()))
        else:
            out.zero_()

    num_threads = torch.get_num_threads()
    with ThreadPoolExecutor(
        min(num_threads, MAX_THREADS), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        # The deque keeps nothing; it is there so that an exception in a thread is raised here.
        deque(pool.map(reduce_one, _iterate_blocks(layout, block_size)), maxlen=0)
    torch.set_num_threads(num_threads)
    return result


def _iterate_blocks(layout: Layout, block_size: int) -> Iterator[Block]:
    for group, spans in layout.group_slices().items():
        for span in spans:
            for part in split_into_blocks(span, block_size):
                yield Block(group, part)
