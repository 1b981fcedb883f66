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


def nearest(rows: FloatArray, centroids: FloatArray) -> np.ndarray:
    return np.array([((centroids - x) ** 2).sum(1).argmin() for x in rows], int)


def asking(*centres: FloatArray) -> KMeansOracle:
    """What the coordinator would be told: each centre's sums, added."""

    def ask(centroids: FloatArray) -> ClusterMoments:
        n, sums, squares = np.zeros(len(centroids)), np.zeros(centroids.shape), np.zeros(len(centroids))
        for rows in centres:
            where = nearest(rows, centroids)
            np.add.at(n, where, 1)
            np.add.at(sums, where, rows)
            np.add.at(squares, where, (rows**2).sum(1))
        return n, sums, squares

    return ask


def blobs(middles: int, rows: int, width: int, seed: int, apart: float = 12.0) -> FloatArray:
    random = np.random.default_rng(seed)
    centre = apart * np.eye(middles, width)
    return centre[random.integers(0, middles, rows)] + random.normal(size=(rows, width)) + 3


def thirds(rows: FloatArray) -> list[FloatArray]:
    """Unequal, and not alike: sorted by the first column."""
    rows = rows[rows[:, 0].argsort()]
    return [rows[: len(rows) // 6], rows[len(rows) // 6 : len(rows) // 2], rows[len(rows) // 2 :]]


@pytest.mark.parametrize(("k", "width"), [(2, 1), (5, 3), (8, 40)])
def test_three_centres_find_what_scikit_learn_finds_in_one(k: int, width: int) -> None:
    rows = np.random.default_rng(k).normal(5, 1, (240, width))
    seeds = rows[:: 240 // k][:k]
    reference = KMeans(k, init=seeds, n_init=1, max_iter=300, tol=0, algorithm="lloyd").fit(rows)
    got = run_lloyd(asking(*thirds(rows)), seeds, iterations=300, tolerance=0)
    np.testing.assert_allclose(got.centroids, reference.cluster_centers_, atol=1e-8)
    assert got.inertia.sum() == pytest.approx(reference.inertia_, abs=1e-8)
    np.testing.assert_array_equal(got.sizes, np.bincount(reference.labels_, minlength=k))
    few = run_lloyd(
        asking(*thirds(rows)), seeds, iterations=2, tolerance=0
    )  # stopped: inertia is still of what is returned
    assert few.inertia.sum() == pytest.approx(
        ((rows - few.centroids[nearest(rows, few.centroids)]) ** 2).sum()
    )
    assert few.inertia.sum() >= got.inertia.sum() - 1e-9


@settings(deadline=None, max_examples=10)
@given(st.permutations(range(3)), st.integers(0, 5))
def test_neither_the_order_of_centres_nor_who_holds_which_row_matters(order: list[int], seed: int) -> None:
    rows = blobs(3, 60, 2, seed)
    parts = thirds(rows)
    one, other = (
        run_lloyd(asking(*some), rows[:3], seed=seed) for some in ((rows,), [parts[i] for i in order])
    )
    np.testing.assert_allclose(one.centroids, other.centroids, atol=1e-9)
    np.testing.assert_array_equal(one.sizes, other.sizes)


def test_an_empty_cluster_takes_half_of_the_largest() -> None:
    rows = blobs(3, 90, 3, 0)
    far = np.full((2, 3), 1e4)
    got = run_lloyd(asking(*thirds(rows)), np.vstack([rows[:1], far]), tolerance=0)
    assert (got.sizes > 0).all()
    assert got.inertia.sum() == pytest.approx(KMeans(3, n_init=5, random_state=0).fit(rows).inertia_)
    same = run_lloyd(asking(np.ones((9, 2))), np.array([[1.0, 1.0], [2.0, 2.0]]))  # nothing to share
    assert same.sizes.tolist() == [9, 0]


@given(st.integers(2, 6), st.integers(0, 20))
def test_the_index_from_sums_is_scikit_learns(k: int, seed: int) -> None:
    rows = np.random.default_rng(seed).normal(2, 1, (40, 3))
    centroids = rows[:k]
    expected = calinski_harabasz_score(rows, nearest(rows, centroids))
    assert calinski_harabasz_index(*asking(*thirds(rows))(centroids)) == pytest.approx(expected)
    beside = np.vstack([centroids, np.full((1, 3), 99.0)])  # a cluster without rows is none
    assert calinski_harabasz_index(*asking(rows)(beside)) == pytest.approx(expected)
    assert calinski_harabasz_index(*asking(rows)(rows[:1])) is None
    assert calinski_harabasz_index(*asking(rows[:k])(centroids)) is None


@pytest.mark.parametrize(("width", "seed"), [(4, 0), (4, 1), (64, 2), (512, 3)])
def test_four_blobs_are_four_clusters(width: int, seed: int) -> None:
    apart = 12 + width**0.5
    train, val = blobs(4, 240, width, seed, apart), blobs(4, 90, width, seed + 50, apart)
    ask = asking(*thirds(train))
    got = select_clusters(ask, asking(*thirds(val)), ask(np.zeros((1, width))), [16, 2, 4, 8], seed)
    assert got.index_by_k.keys() == {2, 4, 8, 16}
    assert len(got.centroids) == 4
    middles = got.centroids[np.lexsort(got.centroids.T)]
    truth = KMeans(4, n_init=5, random_state=0).fit(train).cluster_centers_
    np.testing.assert_allclose(middles, truth[np.lexsort(truth.T)], atol=1e-6)
    again = select_clusters(ask, asking(val), ask(np.ones((1, width))), [2, 4, 8, 16], seed)
    np.testing.assert_array_equal(got.centroids, again.centroids)


@pytest.mark.parametrize("k", [4, 16])
def test_restarts_without_a_row_come_near_to_those_from_rows(k: int) -> None:
    rows = np.random.default_rng(0).gamma(1, 1, (400, 32)) @ np.random.default_rng(1).normal(size=(32, 32))
    ask = asking(*thirds(rows))
    got = select_clusters(ask, ask, ask(np.zeros((1, 32))), [k], 0)
    assert got.inertia.sum() <= 1.02 * KMeans(k, n_init=4, random_state=0).fit(rows).inertia_


def test_too_few_rows_are_one_sentence() -> None:
    rows, none = blobs(2, 3, 2, 0), np.zeros((0, 2))
    ask = asking(rows)
    with pytest.raises(ConsiliumError, match="3 training scans cannot be put into 4 clusters"):
        select_clusters(ask, ask, ask(rows[:1]), [8, 4], 0)
    with pytest.raises(ConsiliumError, match="no scan to cluster"):
        run_lloyd(asking(none), rows[:2])
    many = blobs(2, 30, 2, 0)
    ask = asking(many)
    with pytest.raises(ConsiliumError, match="too few validation scans"):
        select_clusters(ask, asking(none), ask(many[:1]), [2, 4], 0)
    assert (
        len(select_clusters(ask, asking(none), ask(many[:1]), [2], 0).sizes) == 2
    )  # there is nothing to choose
