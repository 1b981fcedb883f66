"""k-means from sums over three centres against scikit-learn on all rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import KMeans
from sklearn.metrics import calinski_harabasz_score

from common.utils.errors import ConsiliumError
from server.analysis.kmeans import (
    ClusterMoments,
    FloatArray,
    KMeansOracle,
    calinski_harabasz_index,
    run_lloyd,
    select_clusters,
)


def assign_rows(rows: FloatArray, centroids: FloatArray) -> np.ndarray:
    return np.array([((centroids - row) ** 2).sum(1).argmin() for row in rows], int)


def make_oracle(*centres: FloatArray) -> KMeansOracle:
    """Return what the coordinator learns: the sum of the centres' moments."""

    def oracle(centroids: FloatArray) -> ClusterMoments:
        k = len(centroids)
        moments = ClusterMoments(np.zeros(k), np.zeros(centroids.shape), np.zeros(k))
        for rows in centres:
            clusters = assign_rows(rows, centroids)
            np.add.at(moments.counts, clusters, 1)
            np.add.at(moments.sums, clusters, rows)
            np.add.at(moments.squares, clusters, (rows**2).sum(1))
        return moments

    return oracle


def make_blobs(num_blobs: int, rows: int, width: int, seed: int, distance: float = 12.0) -> FloatArray:
    random = np.random.default_rng(seed)
    middles = distance * np.eye(num_blobs, width)
    return middles[random.integers(0, num_blobs, rows)] + random.normal(size=(rows, width)) + 3


def split_unevenly(rows: FloatArray) -> list[FloatArray]:
    """Return three parts of unequal size and content: the rows are sorted by the first column."""
    rows = rows[rows[:, 0].argsort()]
    return [rows[: len(rows) // 6], rows[len(rows) // 6 : len(rows) // 2], rows[len(rows) // 2 :]]


@pytest.mark.parametrize(("k", "width"), [(2, 1), (5, 3), (8, 40)])
def test_three_centres_find_the_clusters_that_scikit_learn_finds_in_all_rows(k: int, width: int) -> None:
    rows = np.random.default_rng(k).normal(5, 1, (240, width))
    seeds = rows[:: 240 // k][:k]
    reference = KMeans(k, init=seeds, n_init=1, max_iter=300, tol=0, algorithm="lloyd").fit(rows)
    oracle = make_oracle(*split_unevenly(rows))
    clusters = run_lloyd(oracle, seeds, iterations=300, tolerance=0)
    np.testing.assert_allclose(clusters.centroids, reference.cluster_centers_, atol=1e-8)
    assert clusters.inertia.sum() == pytest.approx(reference.inertia_, abs=1e-8)
    np.testing.assert_array_equal(clusters.sizes, np.bincount(reference.labels_, minlength=k))
    stopped = run_lloyd(oracle, seeds, iterations=2, tolerance=0)
    nearest = stopped.centroids[assign_rows(rows, stopped.centroids)]
    assert stopped.inertia.sum() == pytest.approx(((rows - nearest) ** 2).sum())  # of what is returned
    assert stopped.inertia.sum() >= clusters.inertia.sum() - 1e-9


@settings(deadline=None, max_examples=10)
@given(st.permutations(range(3)), st.integers(0, 5))
def test_neither_the_order_of_centres_nor_the_division_of_rows_matters(order: list[int], seed: int) -> None:
    rows = make_blobs(3, 60, 2, seed)
    parts = split_unevenly(rows)
    pooled = run_lloyd(make_oracle(rows), rows[:3], seed=seed)
    divided = run_lloyd(make_oracle(*(parts[i] for i in order)), rows[:3], seed=seed)
    np.testing.assert_allclose(pooled.centroids, divided.centroids, atol=1e-9)
    np.testing.assert_array_equal(pooled.sizes, divided.sizes)


def test_an_empty_cluster_takes_half_of_the_largest() -> None:
    rows = make_blobs(3, 90, 3, 0)
    far = np.full((2, 3), 1e4)
    clusters = run_lloyd(make_oracle(*split_unevenly(rows)), np.vstack([rows[:1], far]), tolerance=0)
    assert (clusters.sizes > 0).all()
    assert clusters.inertia.sum() == pytest.approx(KMeans(3, n_init=5, random_state=0).fit(rows).inertia_)
    # Equal rows cannot be split.
    unsplit = run_lloyd(make_oracle(np.ones((9, 2))), np.array([[1.0, 1.0], [2.0, 2.0]]))
    assert unsplit.sizes.tolist() == [9, 0]


@given(st.integers(2, 6), st.integers(0, 20))
def test_the_index_from_moments_is_that_of_scikit_learn(k: int, seed: int) -> None:
    rows = np.random.default_rng(seed).normal(2, 1, (40, 3))
    centroids = rows[:k]
    expected = calinski_harabasz_score(rows, assign_rows(rows, centroids))
    oracle = make_oracle(*split_unevenly(rows))
    assert calinski_harabasz_index(oracle(centroids)) == pytest.approx(expected)
    with_empty_cluster = np.vstack([centroids, np.full((1, 3), 99.0)])
    assert calinski_harabasz_index(make_oracle(rows)(with_empty_cluster)) == pytest.approx(expected)
    assert calinski_harabasz_index(make_oracle(rows)(rows[:1])) is None
    assert calinski_harabasz_index(make_oracle(rows[:k])(centroids)) is None


@pytest.mark.parametrize(("width", "seed"), [(4, 0), (4, 1), (64, 2), (512, 3)])
def test_four_blobs_are_four_clusters(width: int, seed: int) -> None:
    distance = 12 + width**0.5
    train = make_blobs(4, 240, width, seed, distance)
    val = make_blobs(4, 90, width, seed + 50, distance)
    oracle = make_oracle(*split_unevenly(train))
    val_oracle = make_oracle(*split_unevenly(val))
    clusters = select_clusters(oracle, val_oracle, oracle(np.zeros((1, width))), [16, 2, 4, 8], seed)
    assert clusters.index_by_k.keys() == {2, 4, 8, 16}
    assert len(clusters.centroids) == 4
    centroids = clusters.centroids[np.lexsort(clusters.centroids.T)]
    expected = KMeans(4, n_init=5, random_state=0).fit(train).cluster_centers_
    np.testing.assert_allclose(centroids, expected[np.lexsort(expected.T)], atol=1e-6)
    repeated = select_clusters(oracle, make_oracle(val), oracle(np.ones((1, width))), [2, 4, 8, 16], seed)
    np.testing.assert_array_equal(clusters.centroids, repeated.centroids)


@pytest.mark.parametrize("k", [4, 16])
def test_starts_from_split_means_are_nearly_as_good_as_starts_from_rows(k: int) -> None:
    rows = np.random.default_rng(0).gamma(1, 1, (400, 32)) @ np.random.default_rng(1).normal(size=(32, 32))
    oracle = make_oracle(*split_unevenly(rows))
    clusters = select_clusters(oracle, oracle, oracle(np.zeros((1, 32))), [k], 0)
    assert clusters.inertia.sum() <= 1.02 * KMeans(k, n_init=4, random_state=0).fit(rows).inertia_


def test_too_few_rows_are_refused_in_one_sentence() -> None:
    rows = make_blobs(2, 3, 2, 0)
    no_rows = np.zeros((0, 2))
    oracle = make_oracle(rows)
    with pytest.raises(ConsiliumError, match="3 training scans cannot be divided into 4 clusters"):
        select_clusters(oracle, oracle, oracle(rows[:1]), [8, 4], 0)
    with pytest.raises(ConsiliumError, match="no centre has a scan to cluster"):
        run_lloyd(make_oracle(no_rows), rows[:2])
    many_rows = make_blobs(2, 30, 2, 0)
    oracle = make_oracle(many_rows)
    val_oracle = make_oracle(no_rows)
    with pytest.raises(ConsiliumError, match="too few validation scans"):
        select_clusters(oracle, val_oracle, oracle(many_rows[:1]), [2, 4], 0)
    # A single number needs no choice.
    assert len(select_clusters(oracle, val_oracle, oracle(many_rows[:1]), [2], 0).sizes) == 2
