"""Aggregate in spite of centres that send anything at all: coordinate-wise median, trimmed mean, Krum.

`num_byzantine` (f) of n centres may send anything. A plain mean goes wherever one of them wants; these rules
stay among what the honest ones sent, and keep the centres' weights:

- `median`, `trimmed_mean` (Yin et al., "Byzantine-robust distributed learning: towards optimal statistical
  rates", ICML 2018, definitions 1 and 2), value by value. `trimmed_mean` removes the f largest and the f
  smallest values, by number and not by weight, and averages the rest by the centres' weights. `median` is the
  weighted one: a centre with more than half of the weight decides alone (`aggregation.tau=1` keeps a large
  one from it).
- `krum` (Blanchard et al., "Machine learning with adversaries", NeurIPS 2017, section 4; Multi-Krum with m =
  n - f): the f updates farthest from their n - f - 2 nearest are left out, the others averaged by their
  weights. It compares whole updates: a head that few centres train is not protected.

None of them can tell a hostile centre from an honest one whose patients differ, and all of them trust the
sums that centres send (counts, scores).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.config.schema import AggregationConfig
from common.modeling.parameters import Layout
from server.aggregation.stored_updates import StoredUpdate
from server.aggregation.weighted_mean import BLOCK_SIZE, BlockReducer, reduce_blockwise, split_into_blocks
from server.aggregation.weighting import GroupWeights

WEIGHT_TOLERANCE = 1e-9  # of the total weight: sums of rounded numbers that are closer are equal
COORDINATE_WISE_RULES = ("median", "trimmed_mean")
MIN_BLOCK_SIZE = 1 << 12  # values; smaller blocks cost more time than they save memory


def weighted_median(out: Tensor, deltas: list[Tensor], weights: list[float]) -> None:
    """Write the weighted median of each value [B] to `out`.

    It is the middle between the lowest and the highest value that leave no more than half of the weight on
    either side.
    """
    values, cumulative_weights = _sort_with_cumulative_weights(deltas, weights)
    total = sum(weights)
    reaches_half = cumulative_weights >= total * (0.5 - WEIGHT_TOLERANCE)
    exceeds_half = cumulative_weights > total * (0.5 + WEIGHT_TOLERANCE)
    low = reaches_half.to(torch.uint8).argmax(0, keepdim=True)
    high = exceeds_half.to(torch.uint8).argmax(0, keepdim=True)
    torch.lerp(values.gather(0, low)[0], values.gather(0, high)[0], 0.5, out=out)


def trimmed_mean(out: Tensor, deltas: list[Tensor], weights: list[float], trim_count: int) -> None:
    """Write the weighted mean of each value [B], without its `trim_count` largest and smallest, to `out`."""
    values, cumulative_weights = _sort_with_cumulative_weights(deltas, weights)
    zero = torch.zeros_like(cumulative_weights[:1])
    sorted_weights = torch.diff(cumulative_weights, dim=0, prepend=zero)
    inner = slice(trim_count, len(deltas) - trim_count)
    inner_weights = sorted_weights[inner]
    out.copy_((values[inner] * inner_weights).sum(0) / inner_weights.sum(0))


def _sort_with_cumulative_weights(deltas: list[Tensor], weights: list[float]) -> tuple[Tensor, Tensor]:
    """Return each column's values in ascending order [n, B], and the weight up to each, float64 [n, B]."""
    values, order = torch.stack(deltas).sort(dim=0, stable=True)
    return values, torch.tensor(weights, dtype=torch.float64)[order].cumsum(0)


def robust_update(
    updates: Sequence[StoredUpdate],
    group_weights: GroupWeights,
    layout: Layout,
    settings: AggregationConfig,
) -> NDArray[np.float32]:
    """Return the update [P] by `median` or `trimmed_mean`.

    In each parameter group only centres with a weight count. Memory does not grow with the number of centres.
    """
    reduce_block: BlockReducer = weighted_median
    if settings.robust_rule == "trimmed_mean":
        reduce_block = partial(trimmed_mean, trim_count=settings.num_byzantine)
    block_size = max(MIN_BLOCK_SIZE, BLOCK_SIZE // (8 * len(updates)))
    return reduce_blockwise(updates, group_weights, layout, reduce_block, block_size)


def find_quorum_error(group_weights: GroupWeights, settings: AggregationConfig) -> str:
    """Return why `median` or `trimmed_mean` would not protect some parameter group, or ""."""
    if settings.robust_rule not in COORDINATE_WISE_RULES:
        return ""
    for group, weights in group_weights.items():
        num_centres = sum(weight > 0 for weight in weights.values())
        if 0 < num_centres < settings.min_contributions:
            return (
                f"{num_centres} updates train '{group}', and aggregation.robust_rule={settings.robust_rule} "
                f"against {settings.num_byzantine} hostile centres needs {settings.min_contributions}; "
                "wait for more centres, or start a run without the rule or without that task"
            )
    return ""


def compute_squared_distances(updates: Sequence[StoredUpdate], layout: Layout) -> NDArray[np.float64]:
    """Return the squared distances [n, n] between updates over their parameters, without buffers."""
    deltas = [torch.from_numpy(update.load_delta()) for update in updates]
    distances = torch.zeros(len(deltas), len(deltas), dtype=torch.float64)
    for slot in layout.parameter_slots:
        for span in split_into_blocks(slot.span, BLOCK_SIZE // 8):
            values = torch.stack([delta[span] for delta in deltas]).double()
            # Of updates that hardly differ, products of raw values would be large and their differences lost.
            values -= values.mean(0)
            products = values @ values.T
            norms = products.diagonal()
            distances += norms[:, None] + norms[None] - 2 * products
    return distances.clamp_(min=0).numpy()


def select_krum_outliers(updates: Sequence[StoredUpdate], layout: Layout, num_byzantine: int) -> list[str]:
    """Return the centres that Multi-Krum leaves out, the worst first.

    They have the largest sums of squared distances to their n - f - 2 nearest.
    """
    sorted_updates = sorted(updates, key=lambda update: update.centre)  # independent of the order of arrival
    distances = compute_squared_distances(sorted_updates, layout)
    np.fill_diagonal(distances, 0)
    num_nearest = len(sorted_updates) - num_byzantine - 2
    scores = np.sort(distances, axis=1)[:, 1 : num_nearest + 1].sum(1)
    worst_first = np.argsort(-scores, kind="stable")
    return [sorted_updates[index].centre for index in worst_first[:num_byzantine]]
