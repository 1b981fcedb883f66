"""The next weights in spite of centres that lie: coordinate-wise median, trimmed mean, Krum; each keeps the centres' weights.

`hostile` (f) of n centres may send anything at all. A plain mean goes wherever one of them wants; these stay among what the honest ones sent:

- `median`, `trimmed` (Yin et al., "Byzantine-robust distributed learning: towards optimal statistical rates", ICML 2018, definitions 1 and 2),
  value by value. `trimmed` takes the f largest and the f smallest away, by number and not by weight, and averages what is left by the centres'
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

from common.schema import Aggregation
from common.weights import Layout
from server.aggregation import BLOCK, Spooled, by_blocks

SAME = 1e-9  # shares of the weight that differ by less are the same: they are sums of rounded numbers


def median(out: Tensor, deltas: list[Tensor], shares: list[float]) -> None:
    """The weighted median of each value [B]: the middle of the lowest and the highest that leave no more than half of the weight on either side."""
    values, below = _sorted(deltas, shares)
    total = sum(shares)
    low = (below >= total * (0.5 - SAME)).to(torch.uint8).argmax(0, keepdim=True)
    high = (below > total * (0.5 + SAME)).to(torch.uint8).argmax(0, keepdim=True)
    torch.lerp(values.gather(0, low)[0], values.gather(0, high)[0], 0.5, out=out)


def trimmed(out: Tensor, deltas: list[Tensor], shares: list[float], cut: int) -> None:
    """The weighted mean of each value [B] without its `cut` largest and `cut` smallest."""
    values, below = _sorted(deltas, shares)
    kept = torch.diff(below, dim=0, prepend=torch.zeros_like(below[:1]))[cut : len(deltas) - cut]
    out.copy_((values[cut : len(deltas) - cut] * kept).sum(0) / kept.sum(0))


def _sorted(deltas: list[Tensor], shares: list[float]) -> tuple[Tensor, Tensor]:
    """The values of each column in ascending order [n, B], and the weight of all up to each, float64 [n, B]."""
    values, order = torch.stack(deltas).sort(dim=0, stable=True)
    return values, torch.tensor(shares, dtype=torch.float64)[order].cumsum(0)


def combined(
    spooled: list[Spooled], weights: Mapping[str, Mapping[str, float]], layout: Layout, settings: Aggregation
) -> NDArray[np.float32]:
    """The update [P] by `median` or `trimmed`, group by group: who does not weigh has no voice. Memory does not grow with the centres."""
    rule = median if settings.robust == "median" else partial(trimmed, cut=settings.hostile)
    return by_blocks(spooled, weights, layout, rule, max(1 << 12, BLOCK // (8 * len(spooled))))


def too_few(weights: Mapping[str, Mapping[str, float]], settings: Aggregation) -> str:
    """Why `median` or `trimmed` protects some group of weights from nobody, or ""."""
    for group, of in weights.items():
        voices = sum(share > 0 for share in of.values())
        if settings.robust in ("median", "trimmed") and 0 < voices < settings.fewest:
            return (
                f"{voices} contributions teach '{group}', and aggregation.robust={settings.robust} against {settings.hostile} hostile centres "
                f"needs {settings.fewest}; wait for more centres, or start without it or without that task"
            )
    return ""


def distances(spooled: list[Spooled], layout: Layout) -> NDArray[np.float64]:
    """Squared distances [n, n] between contributions, over parameters (buffers would drown them)."""
    deltas = [torch.from_numpy(one.delta()) for one in spooled]
    found = torch.zeros(len(deltas), len(deltas), dtype=torch.float64)
    parts = [e.where for e in layout.floats if e.parameter]
    for part in (slice(at, min(at + BLOCK // 8, p.stop)) for p in parts for at in range(p.start, p.stop, BLOCK // 8)):
        x = torch.stack([delta[part] for delta in deltas]).double()
        x -= x.mean(0)  # of contributions that hardly differ the products would be large and their differences nothing
        products = x @ x.T
        norms = products.diagonal()
        found += norms[:, None] + norms[None] - 2 * products
    return found.clamp_(min=0).numpy()


def krum(spooled: list[Spooled], layout: Layout, hostile: int) -> list[str]:
    """The centres that Multi-Krum leaves out, the worst first: those with the largest sum of squared distances to their n - f - 2 nearest."""
    spooled = sorted(spooled, key=lambda one: one.centre)  # the same choice whatever the order of arrival
    apart = distances(spooled, layout)
    np.fill_diagonal(apart, 0)
    score = np.sort(apart, axis=1)[:, 1 : len(spooled) - hostile - 1].sum(1)
    return [spooled[i].centre for i in np.argsort(-score, kind="stable")[:hostile]]
