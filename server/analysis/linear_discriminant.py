"""A source head that the server fits: a balanced linear discriminant from the centres' class moments (`head: moments`).

Where every centre is one source, a centre sees one class and local training of the head drifts; the moments n, sum f, sum f f' are an additive
query, and the discriminant that they give is the pooled data's own (Fisher 1936; shrinkage after Ledoit and Wolf 2004 in its simplest form).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from common.protocol.messages import Sums


def fit_balanced_discriminant(
    moments: Sums, shrinkage: float | None = None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weights [K, D] and bias [K] of the discriminant with equal priors, from `n` [K], `sum` [K, D], `square` [D, D].

    `z_k = mu_k' C^-1 f - mu_k' C^-1 mu_k / 2` with C the within-class covariance, shrunk towards its mean variance by `shrinkage`, by default
    D / (D + n): few scans make an overconfident head. A class without scans gets the mean of the others and so no say.
    """
    n, total, square = moments["n"], moments["sum"], moments["square"]
    means = np.where(n[:, None] > 0, total / np.maximum(n, 1)[:, None], total.sum(0) / max(n.sum(), 1))
    within = (square - (means * n[:, None]).T @ means) / max(n.sum() - (n > 0).sum(), 1)
    d = len(within)
    scale = np.trace(within) / d
    share = d / (d + n.sum()) if shrinkage is None else shrinkage
    within = (1 - share) * within + (share * scale + 1e-6) * np.eye(d)
    weight = np.linalg.solve(within, means.T).T
    return weight.astype(np.float32), (-0.5 * (weight * means).sum(1)).astype(np.float32)
