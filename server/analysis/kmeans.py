"""Exact k-means over centres that keep their rows.

Lloyd, "Least squares quantization in PCM", IEEE Trans. Inf. Theory 28:129, 1982; used for the soft labels of
Martinez, "Multi-Source Transfer Learning" (2020). Asked with centroids [K, D], a centre assigns each of its
rows x [D] to the nearest and replies with sums over rows, which add up over centres: n [K], sum x [K, D] and
sum |x|^2 [K]. Means and inertia follow from the sums, so that the federation's centroids are those of all
rows in one place. No row is seen: the first centroids are made by splitting the mean of all rows along random
directions, as long as the rows spread.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.utils.errors import ConsiliumError

FloatArray = NDArray[np.float64]
log = logging.getLogger("consilium.server")


class ClusterMoments(NamedTuple):
    """Sums over the rows of each of K clusters, over all centres."""

    counts: FloatArray  # [K] rows
    sums: FloatArray  # [K, D] sum x
    squares: FloatArray  # [K] sum |x|^2


KMeansOracle = Callable[[FloatArray], ClusterMoments]  # of the rows nearest to each of the centroids [K, D]


@dataclass
class Clusters:
    """K clusters of the training rows."""

    centroids: FloatArray  # [K, D]
    inertia: FloatArray  # [K] sum of squared distances of the rows nearest to each centroid
    sizes: FloatArray  # [K] rows
    index_by_k: dict[int, float | None] = field(default_factory=dict)  # the index of every K that was tried


def select_clusters(
    train_oracle: KMeansOracle,
    val_oracle: KMeansOracle,
    total_moments: ClusterMoments,
    ks: Sequence[int],
    seed: int,
    restarts: int = 4,
) -> Clusters:
    """Return the clusters of the training rows, in the number that suits the validation rows best.

    Inertia falls with every further cluster, on held-out rows too, and cannot choose. The criterion is the
    largest Calinski-Harabasz index of the *validation* rows when each is assigned to its nearest training
    centroid; at equal index the fewer clusters. For each K the least inertia of `restarts` runs is taken,
    which start in turn from the mean of all rows and from the best clusters of the K before.

    Args:
        train_oracle: moments of the training rows.
        val_oracle: moments of the validation rows.
        total_moments: the train oracle's reply to a single centroid, wherever that is.
        ks: the numbers of clusters to try.
        seed: of all random draws.
        restarts: how many runs there are for each number.

    Raises:
        ConsiliumError: there are too few rows.
    """
    rng = np.random.default_rng(seed)
    num_rows = float(total_moments.counts.sum())
    possible_ks = sorted({k for k in ks if k < num_rows})
    if not possible_ks:
        raise ConsiliumError(
            f"{num_rows:.0f} training scans cannot be divided into {min(ks)} clusters: "
            "use fewer clusters, or add scans"
        )
    single_cluster = _clusters_from_moments(total_moments.sums / num_rows, total_moments)
    best_by_k: dict[int, Clusters] = {}
    index_by_k: dict[int, float | None] = {}
    previous_best = single_cluster
    for k in possible_ks:
        best = _best_of_restarts(train_oracle, [single_cluster, previous_best], k, rng, restarts)
        best_by_k[k] = best
        index_by_k[k] = calinski_harabasz_index(val_oracle(best.centroids))
        log.info("%d clusters: inertia %.4g, index on validation %s", k, best.inertia.sum(), index_by_k[k])
        previous_best = best
    best = best_by_k[_select_k(index_by_k)]
    return Clusters(best.centroids, best.inertia, best.sizes, index_by_k)


def _best_of_restarts(
    oracle: KMeansOracle, start_clusters: Sequence[Clusters], k: int, rng: np.random.Generator, restarts: int
) -> Clusters:
    """Return the clusters of least inertia over `restarts` runs, which take turns with the start clusters."""
    # All starts are drawn before the runs' seeds: the order of draws is part of a run's reproducibility.
    initial_centroids = []
    for restart in range(restarts):
        initial_centroids.append(grow_clusters(start_clusters[restart % len(start_clusters)], k, rng))
    candidates = []
    for centroids in initial_centroids:
        candidates.append(run_lloyd(oracle, centroids, seed=int(rng.integers(2**32))))
    return min(candidates, key=lambda clusters: float(clusters.inertia.sum()))


def _select_k(index_by_k: dict[int, float | None]) -> int:
    """Return the number of clusters with the largest index; of equal ones the smallest."""
    defined = {k: index for k, index in index_by_k.items() if index is not None}
    if defined:
        return max(defined, key=lambda k: defined[k])
    if len(index_by_k) > 1:
        raise ConsiliumError(
            f"the number of clusters cannot be chosen from {list(index_by_k)}: "
            "there are too few validation scans; set a single number"
        )
    return next(iter(index_by_k))


def run_lloyd(
    oracle: KMeansOracle,
    initial_centroids: FloatArray,
    iterations: int = 25,
    tolerance: float = 1e-4,
    seed: int = 0,
) -> Clusters:
    """Assign rows and average them in turn, until the centroids hardly move; fill empty clusters by splits.

    The oracle is asked once more than there are iterations, so that inertia and sizes belong to the returned
    centroids.

    Args:
        oracle: moments of the rows.
        initial_centroids: [K, D].
        iterations: how many there are at most.
        tolerance: stop when all centroids together move by no more than this fraction of a column's variance
            (squared distance; 0: not at all).
        seed: of the splits.

    Raises:
        ConsiliumError: there are no rows.
    """
    rng = np.random.default_rng(seed)
    centroids = np.array(initial_centroids, np.float64)
    for _ in range(iterations):
        moments = oracle(centroids)
        counts, sums, squares = moments
        if not counts.sum():
            raise ConsiliumError("no centre has a scan to cluster")
        means = np.where(counts[:, None] > 0, sums / np.maximum(counts, 1)[:, None], centroids)
        empty_clusters = np.flatnonzero(counts == 0)
        means = split_clusters(_clusters_from_moments(means, moments), empty_clusters, rng)
        moved = float(((means - centroids) ** 2).sum())
        num_rows = counts.sum()
        variance = (squares.sum() - (sums.sum(0) ** 2).sum() / num_rows) / num_rows / centroids.shape[1]
        centroids = means
        if moved <= tolerance * variance:
            break
    return _clusters_from_moments(centroids, oracle(centroids))


def grow_clusters(clusters: Clusters, k: int, rng: np.random.Generator) -> FloatArray:
    """Return centroids [k, D] for more clusters than there are, by splitting.

    Linde, Buzo and Gray, "An algorithm for vector quantizer design", IEEE Trans. Commun. 28:84, 1980.
    """
    num_clusters = len(clusters.sizes)
    num_new = k - num_clusters
    padded = Clusters(
        np.pad(clusters.centroids, ((0, num_new), (0, 0))),
        np.pad(clusters.inertia, (0, num_new)),
        np.pad(clusters.sizes, (0, num_new)),
    )
    return split_clusters(padded, range(num_clusters, k), rng)


def split_clusters(
    clusters: Clusters, empty_clusters: Sequence[int] | NDArray[np.intp], rng: np.random.Generator
) -> FloatArray:
    """Return centroids [K, D] where each empty cluster has become half of another.

    The other is the one with the largest inertia at that time.     The halves' centroids are one standard
    deviation (over a column) away from the old one, along a random direction. Each half has half of the
    inertia. A cluster of equal rows cannot be split.
    """
    centroids = clusters.centroids.copy()
    inertia = clusters.inertia.copy()
    sizes = clusters.sizes.copy()
    width = centroids.shape[1]
    for empty in empty_clusters:
        largest = int(inertia.argmax())
        if inertia[largest] <= 0:
            break
        direction = rng.standard_normal(width)
        step = direction / np.linalg.norm(direction) * np.sqrt(inertia[largest] / sizes[largest] / width)
        centroids[empty] = centroids[largest] + step
        centroids[largest] = centroids[largest] - step
        inertia[[largest, empty]] = inertia[largest] / 2
        sizes[[largest, empty]] = sizes[largest] / 2
    return centroids


def calinski_harabasz_index(moments: ClusterMoments) -> float | None:
    """Return the variance between clusters over that within them: (between / (K - 1)) / (within / (N - K)).

    Calinski and Harabasz, "A dendrite method for cluster analysis", Commun. Stat. 3:1, 1974, for K non-empty
    clusters of N rows. None for a single cluster, for no more rows than clusters, and where all rows of each
    cluster are equal.
    """
    is_filled = moments.counts > 0
    counts = moments.counts[is_filled]
    sums = moments.sums[is_filled]
    squares = moments.squares[is_filled]
    num_rows = float(counts.sum())
    num_clusters = len(counts)
    within = float(np.maximum(squares - (sums**2).sum(1) / counts, 0).sum())
    is_defined = num_clusters > 1 and num_rows > num_clusters and within > 0
    if not is_defined:
        return None
    distances_to_mean = ((sums / counts[:, None] - sums.sum(0) / max(num_rows, 1)) ** 2).sum(1)
    between = float((counts * distances_to_mean).sum())
    return between / (num_clusters - 1) / (within / (num_rows - num_clusters))


def _clusters_from_moments(centroids: FloatArray, moments: ClusterMoments) -> Clusters:
    counts, sums, squares = moments
    inertia = squares - 2 * (sums * centroids).sum(1) + counts * (centroids**2).sum(1)
    return Clusters(centroids, np.maximum(inertia, 0), counts)  # rounding may leave a little less than 0
