"""Exact k-means over centres that keep their rows (Lloyd, "Least squares quantization in PCM", IEEE Trans. Inf. Theory 28:129, 1982), for the
soft labels of Martinez, "Multi-Source Transfer Learning" (2020).

Asked with centroids [K, D], a centre assigns each of its rows x [D] to the nearest and answers with sums over rows that add over centres: n [K],
sum x [K, D] and sum |x|^2 [K]. Means and inertia follow from the sums, so the federation's centroids are those of all rows in one place. No
row is seen: first centroids are made by splitting the mean of all rows along random directions, as long as the rows spread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from common.utils.errors import ConsiliumError

FloatArray = NDArray[np.float64]
ClusterMoments = tuple[
    FloatArray, FloatArray, FloatArray
]  # n [K], sum x [K, D], sum |x|^2 [K] by cluster, over all centres
KMeansOracle = Callable[[FloatArray], ClusterMoments]  # of the rows nearest to each of the centroids [K, D]
log = logging.getLogger("consilium.server")


@dataclass
class Clusters:
    """`centroids` [K, D]; of the training rows nearest to each: `inertia` [K] = sum of squared distances, `sizes` [K] = rows."""

    centroids: FloatArray
    inertia: FloatArray
    sizes: FloatArray
    index_by_k: dict[int, float | None] = field(default_factory=dict)  # by `choose`: the index of each K


def select_clusters(
    train_oracle: KMeansOracle,
    val_oracle: KMeansOracle,
    total_moments: ClusterMoments,
    ks: Sequence[int],
    seed: int,
    restarts: int = 4,
) -> Clusters:
    """The clusters of the training rows, with as many as `ks` allows and fit the validation rows best.

    Inertia falls with every further cluster, on held-out rows too, and cannot choose. The criterion is the largest Calinski-Harabasz index
    of the *validation* rows when each is put to its nearest training centroid; at equal index the fewer clusters. For each k the least
    inertia of `restarts` runs is taken, by turns from the mean of all rows and from the best clusters of the k before. `moments` is what
    ask_train says of a single centroid, wherever it lies. Raises ConsiliumError when there are too few rows.
    """
    rng = np.random.default_rng(seed)
    n = float(total_moments[0].sum())
    possible = sorted({k for k in ks if k < n})
    if not possible:
        raise ConsiliumError(
            f"{n:.0f} training scans cannot be put into {min(ks)} clusters: ask for fewer, or add scans"
        )
    one = best = _clusters_from_moments(total_moments[1] / n, total_moments)
    found: dict[int, Clusters] = {}
    tried: dict[int, float | None] = {}
    for k in possible:
        starts = [
            grow_clusters(start, k, rng)
            for start, _ in zip((one, best) * restarts, range(restarts), strict=False)
        ]
        best = min(
            (run_lloyd(train_oracle, seeds, seed=int(rng.integers(2**32))) for seeds in starts),
            key=lambda c: float(c.inertia.sum()),
        )
        found[k], tried[k] = best, calinski_harabasz_index(*val_oracle(best.centroids))
        log.info("%d clusters: inertia %.4g, index on validation %s", k, best.inertia.sum(), tried[k])
    defined = {k: index for k, index in tried.items() if index is not None}
    if not defined and len(possible) > 1:
        raise ConsiliumError(
            f"the number of clusters cannot be chosen out of {possible}: there are too few validation scans; name one number"
        )
    k = max(defined, key=lambda k: defined[k]) if defined else possible[0]
    return Clusters(found[k].centroids, found[k].inertia, found[k].sizes, tried)


def run_lloyd(
    oracle: KMeansOracle,
    initial_centroids: FloatArray,
    iterations: int = 25,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> Clusters:
    """From centroids `seeds` [K, D]: assign, average, again, until all centroids together move no more than `tolerance` of a column's variance
    (squared distance; 0: not at all), or `iterations` times. An empty cluster takes half of the one with the largest inertia (`split`).

    Asks once more than it iterates, so that inertia and sizes are those of the centroids that it returns. Raises ConsiliumError without rows.
    """
    rng = np.random.default_rng(seed)
    centroids = np.array(initial_centroids, np.float64)
    for _ in range(iterations):
        n, sums, squares = oracle(centroids)
        if not n.sum():
            raise ConsiliumError("there is no scan to cluster at any centre")
        means = np.where(n[:, None] > 0, sums / np.maximum(n, 1)[:, None], centroids)
        of_means = _clusters_from_moments(means, (n, sums, squares))
        means = split_clusters(of_means, np.flatnonzero(n == 0), rng)
        moved = float(((means - centroids) ** 2).sum())
        variance = (squares.sum() - (sums.sum(0) ** 2).sum() / n.sum()) / n.sum() / centroids.shape[1]
        centroids = means
        if moved <= tolerance * variance:
            break
    return _clusters_from_moments(centroids, oracle(centroids))


def grow_clusters(clusters: Clusters, k: int, rng: np.random.Generator) -> FloatArray:
    """[k, D]: centroids for more clusters than there are, by splitting (Linde, Buzo & Gray, IEEE Trans. Commun. 28:84, 1980)."""
    more = k - len(clusters.sizes)
    wider = Clusters(
        np.pad(clusters.centroids, ((0, more), (0, 0))),
        np.pad(clusters.inertia, (0, more)),
        np.pad(clusters.sizes, (0, more)),
    )
    return split_clusters(wider, range(len(clusters.sizes), k), rng)


def split_clusters(
    clusters: Clusters, empty_clusters: Sequence[int] | NDArray[np.intp], rng: np.random.Generator
) -> FloatArray:
    """Centroids [K, D] where each cluster of `into` has become half of the one with the largest inertia at that time.

    The two lie on either side of its centroid along a random direction, by its standard deviation over a column. A half counts with half of
    the inertia. A cluster whose rows are all the same has nothing to share.
    """
    centroids, inertia, sizes = clusters.centroids.copy(), clusters.inertia.copy(), clusters.sizes.copy()
    width = centroids.shape[1]
    for empty in empty_clusters:
        largest = int(inertia.argmax())
        if inertia[largest] <= 0:
            break
        direction = rng.standard_normal(width)
        step = direction / np.linalg.norm(direction) * np.sqrt(inertia[largest] / sizes[largest] / width)
        centroids[empty], centroids[largest] = centroids[largest] + step, centroids[largest] - step
        inertia[[largest, empty]], sizes[[largest, empty]] = inertia[largest] / 2, sizes[largest] / 2
    return centroids


def calinski_harabasz_index(n: FloatArray, sums: FloatArray, squares: FloatArray) -> float | None:
    """(between / (K - 1)) / (within / (N - K)), the sums of squares between and within K non-empty clusters of N rows (Calinski & Harabasz,
    Commun. Stat. 3:1, 1974). None for a single cluster, for no more rows than clusters, and where all rows of each cluster are the same."""
    n, sums, squares = n[n > 0], sums[n > 0], squares[n > 0]
    rows, k = float(n.sum()), len(n)
    within = float(np.maximum(squares - (sums**2).sum(1) / n, 0).sum())
    between = float((n * ((sums / n[:, None] - sums.sum(0) / max(rows, 1)) ** 2).sum(1)).sum())
    return between / (k - 1) / (within / (rows - k)) if k > 1 and rows > k and within > 0 else None


def _clusters_from_moments(centroids: FloatArray, moments: ClusterMoments) -> Clusters:
    n, sums, squares = moments
    inertia = squares - 2 * (sums * centroids).sum(1) + n * (centroids**2).sum(1)
    return Clusters(centroids, np.maximum(inertia, 0), n)  # rounding may leave a little less than 0
