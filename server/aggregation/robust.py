"""The next weights in spite of centres that lie: coordinate-wise median, trimmed mean, Krum; each keeps the centres' weights.

`hostile` (f) of n centres may send anything at all. A plain mean goes wherever one of them wants; these stay among what the honest ones sent:

- `median`, `trimmed_mean` (Yin et al., "Byzantine-robust distributed learning: towards optimal statistical rates", ICML 2018, definitions 1 and 2),
  value by value. `trimmed_mean` takes the f largest and the f smallest away, by number and not by weight, and averages what is left by the centres'
  weights. `median` is the weighted one: a centre with more than half of the weight decides alone (`aggregation.tau=1` keeps a big one from it).
- `krum` (Blanchard et al., "Machine learning with adversaries", NeurIPS 2017, section 4; Multi-Krum with m = n - f): the f contributions farthest
  from their n - f - 2 nearest are left out, the others averaged by their weights. It looks at the whole vector: a head that few centres teach
  is not protected.

None of them tells a liar from an honest centre whose patients differ, and all of them believe the sums that centres send (counts, scores).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from common.config.schema import AggregationConfig
from common.modeling.parameters import Layout
from server.aggregation.contributions import BLOCK_SIZE, StoredUpdate, reduce_blockwise

WEIGHT_TOLERANCE = (
    1e-9  # shares of the weight that differ by less are the same: they are sums of rounded numbers
)


def weighted_median(out: Tensor, deltas: list[Tensor], weights: list[float]) -> None:
    """The weighted median of each value [B]: the middle of the lowest and the highest that leave no more than half of the weight on either side."""
    values, below = _sort_with_cumulative_weights(deltas, weights)
    total = sum(weights)
    low = (below >= total * (0.5 - WEIGHT_TOLERANCE)).to(torch.uint8).argmax(0, keepdim=True)
    high = (below > total * (0.5 + WEIGHT_TOLERANCE)).to(torch.uint8).argmax(0, keepdim=True)
    torch.lerp(values.gather(0, low)[0], values.gather(0, high)[0], 0.5, out=out)


def trimmed_mean(out: Tensor, deltas: list[Tensor], weights: list[float], trim_count: int) -> None:
    """The weighted mean of each value [B] without its `cut` largest and `cut` smallest."""
    values, below = _sort_with_cumulative_weights(deltas, weights)
    kept = torch.diff(below, dim=0, prepend=torch.zeros_like(below[:1]))[
        trim_count : len(deltas) - trim_count
    ]
    out.copy_((values[trim_count : len(deltas) - trim_count] * kept).sum(0) / kept.sum(0))


def _sort_with_cumulative_weights(deltas: list[Tensor], weights: list[float]) -> tuple[Tensor, Tensor]:
    """The values of each column in ascending order [n, B], and the weight of all up to each, float64 [n, B]."""
    values, order = torch.stack(deltas).sort(dim=0, stable=True)
    return values, torch.tensor(weights, dtype=torch.float64)[order].cumsum(0)


def robust_update(
    updates: list[StoredUpdate],
    group_weights: Mapping[str, Mapping[str, float]],
    layout: Layout,
    settings: AggregationConfig,
) -> NDArray[np.float32]:
    """The update [P] by `median` or `trimmed_mean`, group by group: who does not weigh has no voice. Memory does not grow with the centres."""
    rule = (
        weighted_median
        if settings.robust_rule == "median"
        else partial(trimmed_mean, trim_count=settings.num_byzantine)
    )
    return reduce_blockwise(
        updates, group_weights, layout, rule, max(1 << 12, BLOCK_SIZE // (8 * len(updates)))
    )


def quorum_error(group_weights: Mapping[str, Mapping[str, float]], settings: AggregationConfig) -> str:
    """Why `median` or `trimmed_mean` protects some group of weights from nobody, or ""."""
    for group, of in group_weights.items():
        voices = sum(share > 0 for share in of.values())
        if settings.robust_rule in ("median", "trimmed_mean") and 0 < voices < settings.min_contributions:
            return (
                f"{voices} contributions teach '{group}', and aggregation.robust_rule={settings.robust_rule} against {settings.num_byzantine} hostile centres "
                f"needs {settings.min_contributions}; wait for more centres, or start without it or without that task"
            )
    return ""


def squared_distances(updates: list[StoredUpdate], layout: Layout) -> NDArray[np.float64]:
    """Squared distances [n, n] between contributions, over parameters (buffers would drown them)."""
    deltas = [torch.from_numpy(one.load_delta()) for one in updates]
    found = torch.zeros(len(deltas), len(deltas), dtype=torch.float64)
    parts = [e.span for e in layout.floats if e.is_parameter]
    for part in (
        slice(at, min(at + BLOCK_SIZE // 8, p.stop))
        for p in parts
        for at in range(p.start, p.stop, BLOCK_SIZE // 8)
    ):
        x = torch.stack([delta[part] for delta in deltas]).double()
        x -= x.mean(
            0
        )  # of contributions that hardly differ the products would be large and their differences nothing
        products = x @ x.T
        norms = products.diagonal()
        found += norms[:, None] + norms[None] - 2 * products
    return found.clamp_(min=0).numpy()


def select_krum_outliers(updates: list[StoredUpdate], layout: Layout, num_byzantine: int) -> list[str]:
    """The centres that Multi-Krum leaves out, the worst first: those with the largest sum of squared distances to their n - f - 2 nearest."""
    updates = sorted(updates, key=lambda one: one.centre)  # the same choice whatever the order of arrival
    apart = squared_distances(updates, layout)
    np.fill_diagonal(apart, 0)
    score = np.sort(apart, axis=1)[:, 1 : len(updates) - num_byzantine - 1].sum(1)
    return [updates[i].centre for i in np.argsort(-score, kind="stable")[:num_byzantine]]
