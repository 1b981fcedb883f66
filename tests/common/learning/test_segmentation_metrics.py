"""Segmentation metrics against scikit-learn on the pixels and SciPy on the binned severities."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as reference

from common.learning.segmentation_metrics import (
    AFFECTED_FRACTION_EDGES,
    SEVERITY_EDGES,
    compute_joint_histogram,
    compute_overlap_metrics,
    compute_overlap_sums,
    compute_spearman,
    explain_undefined_overlap,
    explain_undefined_spearman,
)
from common.utils.errors import ConsiliumError


def make_probabilities_and_masks() -> tuple[np.ndarray, np.ndarray]:
    """Return nine scans: 0 and 1 with empty masks, 2 with half of its pixels unknown, 3 without a mask."""
    random = np.random.default_rng(1)
    masks = (random.uniform(size=(9, 2, 8, 8)) < 0.2).astype(np.uint8)
    probabilities = np.clip(0.5 * masks + random.uniform(0, 0.6, masks.shape), 0, 1)
    masks[:2] = 0
    probabilities[0] = 0.1  # nothing is predicted
    masks[2, :, :, :4] = 255
    masks[3] = 255
    probabilities[3] = np.nan  # must not matter
    return probabilities, masks


def test_overlap_of_three_centres_equals_scikit_learn() -> None:
    probabilities, masks = make_probabilities_and_masks()
    centres = (slice(0, 3), slice(3, 4), slice(4, 9))
    sums_by_centre = [compute_overlap_sums(probabilities[part], masks[part], 0.4) for part in centres]
    sums = np.sum(sums_by_centre, axis=0)
    np.testing.assert_array_equal(sums, compute_overlap_sums(probabilities >= 0.4, masks))

    dice_by_scan = {}
    true_pixels = []
    predicted_pixels = []
    for scan in (0, 1, 2, *range(4, 9)):
        known = masks[scan] != 255
        true_pixels.append(masks[scan][known])
        predicted_pixels.append(probabilities[scan][known] >= 0.4)
        # Dice is F1 over pixels.
        dice_by_scan[scan] = reference.f1_score(true_pixels[-1], predicted_pixels[-1], zero_division=1.0)
    true = np.concatenate(true_pixels)
    predicted = np.concatenate(predicted_pixels)
    metrics = compute_overlap_metrics(sums)
    assert (metrics["n"], metrics["positives"]) == (8, 6)
    assert (dice_by_scan[0], dice_by_scan[1]) == (1, 0)
    assert metrics["dice"] == pytest.approx(np.mean(list(dice_by_scan.values())))
    dice_of_affected = [dice for scan, dice in dice_by_scan.items() if scan > 1]
    assert metrics["dice_affected"] == pytest.approx(np.mean(dice_of_affected))
    assert metrics["dice_pixels"] == pytest.approx(reference.f1_score(true, predicted))
    assert metrics["sensitivity"] == pytest.approx(reference.recall_score(true, predicted))
    assert metrics["precision"] == pytest.approx(reference.precision_score(true, predicted))
    assert explain_undefined_overlap(sums) == {}


def test_undefined_overlap_metrics_have_a_reason() -> None:
    nothing_predicted = np.zeros((2, 4, 4))
    empty_masks = np.zeros((2, 4, 4), np.uint8)
    sums = compute_overlap_sums(nothing_predicted, empty_masks)
    assert compute_overlap_metrics(sums)["dice"] == 1
    assert explain_undefined_overlap(sums) == dict.fromkeys(
        ("dice_affected", "dice_pixels", "sensitivity", "precision"), "all masks are empty (2 scans)"
    )
    without_masks = compute_overlap_sums(nothing_predicted, empty_masks + 255)
    assert set(explain_undefined_overlap(without_masks).values()) == {"no labelled scans"}
    full_masks = compute_overlap_sums(nothing_predicted, empty_masks + 1)
    assert explain_undefined_overlap(full_masks) == {"precision": "no pixel was predicted as affected"}


def test_nan_prediction_for_a_scan_with_a_mask_is_an_error() -> None:
    masks = np.zeros((2, 4, 4), np.uint8)
    predicted = np.zeros((2, 4, 4))
    predicted[1] = np.nan
    with pytest.raises(ConsiliumError, match="not a number for 1 of 2 scans"):
        compute_overlap_sums(predicted, masks)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 100)), min_size=2, max_size=40), st.integers(0, 40))
def test_spearman_of_two_centres_equals_scipy_on_the_binned_values(
    scans: list[tuple[float, float]], num_scans_of_first: int
) -> None:
    fractions, severities = np.array(scans).T
    joint = np.zeros((len(AFFECTED_FRACTION_EDGES) - 1, len(SEVERITY_EDGES) - 1))
    for part in (slice(num_scans_of_first), slice(num_scans_of_first, None)):
        joint += compute_joint_histogram(
            fractions[part], severities[part], AFFECTED_FRACTION_EDGES, SEVERITY_EDGES
        )
    binned_fractions = np.digitize(fractions, AFFECTED_FRACTION_EDGES[1:-1])
    binned_severities = np.digitize(severities, SEVERITY_EDGES[1:-1])
    if min(len(set(binned_fractions)), len(set(binned_severities))) < 2:
        assert compute_spearman(joint) is None
        assert "the same for all" in explain_undefined_spearman(joint)
    else:
        expected = stats.spearmanr(binned_fractions, binned_severities).statistic
        assert compute_spearman(joint) == pytest.approx(expected)
        assert explain_undefined_spearman(joint) == ""


def test_binning_keeps_the_order_of_severities_on_any_scale() -> None:
    fractions = np.random.default_rng(3).beta(1, 8, 300)
    for severities in (np.round(4 * fractions), np.round(18 * fractions), 100 * fractions, fractions):
        joint = compute_joint_histogram(fractions, severities, AFFECTED_FRACTION_EDGES, SEVERITY_EDGES)
        expected = stats.spearmanr(fractions, severities).statistic
        assert compute_spearman(joint) == pytest.approx(expected, abs=0.005)


def test_integer_grades_have_bins_of_their_own() -> None:
    grades = np.arange(19.0)
    joint = compute_joint_histogram(grades, grades, SEVERITY_EDGES, SEVERITY_EDGES)
    np.testing.assert_array_equal(joint.max(0).sum(), 19)


def test_scans_with_an_unknown_severity_are_dropped_and_large_ones_counted_in_the_last_bin() -> None:
    fractions = np.array([0.1, np.nan, 0.3])
    severities = np.array([np.nan, 2.0, 150.0])
    joint = compute_joint_histogram(fractions, severities, AFFECTED_FRACTION_EDGES, SEVERITY_EDGES)
    assert joint.sum() == joint[:, -1].sum() == 1
    assert explain_undefined_spearman(joint) == "severity is known for 1 scans"
