"""A source head that the coordinator fits: a balanced linear discriminant from the centres' class moments.

Where every centre is one source, a centre sees one class and local training of the head drifts. The moments
n, sum f and sum f f' of the features f are an additive query, and the discriminant that they give is that of
the pooled data (Fisher, "The use of multiple measurements in taxonomic problems", Ann. Eugen. 7:179, 1936;
shrinkage after Ledoit and Wolf, "A well-conditioned estimator for large-dimensional covariance matrices", J.
Multivar. Anal. 88:365, 2004, in its simplest form).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from common.protocol.messages import Sums

RIDGE = 1e-6  # added to the covariance's diagonal, so that it can be inverted


def fit_balanced_discriminant(
    moments: Sums, shrinkage: float | None = None
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return weights [K, D] and bias [K] of the linear discriminant with equal priors.

    `z_k = mu_k' C^-1 f - mu_k' C^-1 mu_k / 2`, with C the within-class covariance. A class without scans gets
    the mean of the others and so has no influence.

    Args:
        moments: scans `n` [K], their summed features `sum` [K, D], and the summed outer products `square` [D,
            D].
        shrinkage: how far C is shrunk towards its mean variance, 0 to 1; by default D / (D + n), because few
            scans make an overconfident head.
    """
    counts = moments["n"]
    sums = moments["sum"]
    has_scans = counts > 0
    overall_mean = sums.sum(0) / max(counts.sum(), 1)
    means = np.where(has_scans[:, None], sums / np.maximum(counts, 1)[:, None], overall_mean)
    scatter_of_means = (means * counts[:, None]).T @ means
    covariance = (moments["square"] - scatter_of_means) / max(counts.sum() - has_scans.sum(), 1)
    num_features = len(covariance)
    mean_variance = np.trace(covariance) / num_features
    if shrinkage is None:
        shrinkage = num_features / (num_features + counts.sum())
    diagonal = (shrinkage * mean_variance + RIDGE) * np.eye(num_features)
    shrunk_covariance = (1 - shrinkage) * covariance + diagonal
    weights = np.linalg.solve(shrunk_covariance, means.T).T
    bias = -0.5 * (weights * means).sum(1)
    return weights.astype(np.float32), bias.astype(np.float32)
