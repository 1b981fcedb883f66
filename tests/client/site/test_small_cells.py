"""Numbers that too few scans make up are suppressed, and nothing more is lost than necessary."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from client.site.small_cells import (
    merge_small_bins,
    round_cells,
    suppress_small_bins,
    suppress_small_cells,
)
from common.learning.metrics import compute_binary_metrics

HISTOGRAMS = st.lists(st.integers(0, 6), min_size=1, max_size=40).map(lambda counts: np.array(counts, float))


@given(HISTOGRAMS, st.integers(1, 8))
def test_no_filled_bin_is_small_and_no_scan_is_lost(histogram: np.ndarray, min_count: int) -> None:
    merged = merge_small_bins(histogram, min_count)
    assert not ((merged > 0) & (merged < min_count)).any()
    expected_sum = histogram.sum() if histogram.sum() >= min_count else 0
    assert merged.sum() == expected_sum


@given(HISTOGRAMS, st.integers(1, 8))
def test_cells_and_bins_are_multiples_but_for_one_that_holds_the_rest(
    histogram: np.ndarray, min_count: int
) -> None:
    """So the answers about two models differ by whole groups, too."""
    for suppressed in (merge_small_bins(histogram, min_count), round_cells(histogram, min_count)):
        rest = histogram.sum() % min_count if suppressed.any() else 0
        remainders = suppressed % min_count
        assert np.count_nonzero(remainders) <= 1
        assert remainders.sum() == rest
        expected_sum = histogram.sum() if histogram.sum() >= min_count else 0
        assert suppressed.sum() == expected_sum


@given(HISTOGRAMS, st.integers(2, 8))
def test_rounded_cells_are_near_the_true_ones(histogram: np.ndarray, min_count: int) -> None:
    rounded = round_cells(histogram, min_count)
    if rounded.any():
        assert np.abs(rounded - histogram).max() < 2 * min_count


def test_number_of_empty_masks_is_rounded_in_the_sums_of_masks() -> None:
    sums = np.array([20.0, 12.0, 5.0, 6.0, 7.0, 18.0, 9.0])  # 18 of 20 masks are not empty
    suppressed = suppress_small_cells({"a/lesion/overlap": sums}, 5)["a/lesion/overlap"]
    assert suppressed.tolist() == [20, 12, 5, 6, 7, 20, 10]
    assert not suppress_small_cells({"a/lesion/overlap": sums}, 21)["a/lesion/overlap"].any()


def test_scans_of_a_joint_histogram_are_a_multiple() -> None:
    table = np.zeros((4, 4))
    table[[0, 1, 2, 3], [0, 1, 2, 3]] = [3, 4, 2, 4]
    suppressed = suppress_small_cells({"a/lesion/joint": table}, 5)["a/lesion/joint"]
    assert suppressed.sum() == 10
    assert ((suppressed == 0) | (suppressed >= 5)).all()


def test_merged_bins_hardly_change_the_auc() -> None:
    rng = np.random.default_rng(0)
    scores = [rng.normal(mean, 1, 400) for mean in (-0.7, 0.7)]
    histogram = np.stack([np.histogram(values, 256, (-8, 8))[0] for values in scores]).astype(float)
    suppressed = suppress_small_cells({"a/covid/hist": histogram}, 5)["a/covid/hist"]
    auc_before = compute_binary_metrics(histogram)["auc"]
    auc_after = compute_binary_metrics(suppressed)["auc"]
    assert auc_before is not None
    assert auc_after == pytest.approx(auc_before, abs=0.01)


def test_sums_over_few_scans_are_suppressed() -> None:
    sums = {
        "a/finding/confusion": np.array([[9.0, 2.0], [0.0, 4.0]]),
        "a/age/regression": np.arange(9.0),
        "a/age/loss": np.array([7.0, 3.0]),
        "a/covid/loss": np.array([7.0, 30.0]),
    }
    suppressed = suppress_small_cells(sums, 5)
    assert suppressed["a/finding/confusion"].tolist() == [[11, 0], [0, 0]]
    assert not suppressed["a/age/regression"].any()
    assert not suppressed["a/age/loss"].any()
    assert suppressed["a/covid/loss"].tolist() == [7, 30]


def test_sums_of_small_clusters_are_suppressed() -> None:
    clusters = {"n": np.array([9.0, 1.0]), "sum": np.ones((2, 3)), "square": np.array([5.0, 6.0])}
    suppressed = suppress_small_cells(clusters, 5)
    assert suppressed["n"].tolist() == [9, 0]
    assert suppressed["square"].tolist() == [5, 0]
    assert suppressed["sum"].sum(axis=1).tolist() == [3, 0]


def test_class_moments_are_suppressed_together_when_a_class_is_small() -> None:
    moments = {"n": np.array([9.0, 1.0]), "sum": np.ones((2, 3)), "square": np.ones((3, 3))}
    assert not any(values.any() for values in suppress_small_cells(moments, 5).values())
    without_second_class = moments | {"n": np.array([9.0, 0.0])}
    assert suppress_small_cells(without_second_class, 5)["square"].all()


@given(
    arrays(float, st.tuples(st.integers(1, 30), st.just(6)), elements=st.sampled_from([0.0, 0.25, 1.0])),
    st.integers(1, 8),
)
def test_no_bin_of_few_scans_leaves(fractions: np.ndarray, min_count: int) -> None:
    bins = suppress_small_bins(fractions, min_count)
    scans_in_bin = (fractions > 0).sum(0)
    assert ((bins > 0) == ((scans_in_bin >= min_count) & (scans_in_bin > 0))).all()
    if not bins.any():
        return
    # Not the sum of the bins that are left, which would reveal the others.
    assert bins.sum() == pytest.approx(len(fractions) // min_count * min_count)
    is_kept = bins > 0
    expected = fractions.sum(0)[is_kept]
    np.testing.assert_allclose(bins[is_kept] / bins[is_kept].sum(), expected / expected.sum())
