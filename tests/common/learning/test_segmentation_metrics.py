"""Masks' sums against scikit-learn and SciPy on the pixels and the binned severities."""

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


def test_overlap_of_three_centres_against_scikit_learn() -> None:
    random = np.random.default_rng(1)
    mask = (random.uniform(size=(9, 2, 8, 8)) < 0.2).astype(np.uint8)
    probability = np.clip(0.5 * mask + random.uniform(0, 0.6, mask.shape), 0, 1)
    mask[0] = mask[1] = 0  # nothing there ...
    probability[0] = 0.1  # ... and nothing found
    mask[2, :, :, :4] = 255  # half of a scan is not known
    mask[3] = 255  # a scan without a mask, whose output may be anything
    probability[3] = np.nan
    sums = np.sum(
        [
            compute_overlap_sums(probability[part], mask[part], 0.4)
            for part in (slice(0, 3), slice(3, 4), slice(4, 9))
        ],
        axis=0,
    )
    np.testing.assert_array_equal(sums, compute_overlap_sums(probability >= 0.4, mask))
    dice, pixels = {}, []
    for i in (0, 1, 2, *range(4, 9)):
        known = mask[i] != 255
        pixels.append((mask[i][known], probability[i][known] >= 0.4))
        dice[i] = reference.f1_score(*pixels[-1], zero_division=1.0)  # Dice is F1 over pixels
    true, called = (np.concatenate(part) for part in zip(*pixels, strict=True))
    got = compute_overlap_metrics(sums)
    assert (got["n"], got["positives"]) == (8, 6)
    assert (dice[0], dice[1]) == (1, 0)
    assert got["dice"] == pytest.approx(np.mean(list(dice.values())))
    assert got["dice_affected"] == pytest.approx(np.mean([v for i, v in dice.items() if i > 1]))
    assert got["dice_pixels"] == pytest.approx(reference.f1_score(true, called))
    assert got["sensitivity"] == pytest.approx(reference.recall_score(true, called))
    assert got["precision"] == pytest.approx(reference.precision_score(true, called))
    assert explain_undefined_overlap(sums) == {}


def test_overlap_that_is_not_defined_says_why() -> None:
    mask = np.zeros((2, 4, 4), np.uint8)
    empty = compute_overlap_sums(np.zeros((2, 4, 4)), mask)
    assert compute_overlap_metrics(empty)["dice"] == 1
    assert explain_undefined_overlap(empty) == dict.fromkeys(
        ("dice_affected", "dice_pixels", "sensitivity", "precision"), "all masks are empty (2 scans)"
    )
    assert set(explain_undefined_overlap(compute_overlap_sums(np.zeros((2, 4, 4)), mask + 255)).values()) == {
        "no labelled scans"
    }
    assert explain_undefined_overlap(compute_overlap_sums(np.zeros((2, 4, 4)), mask + 1)) == {
        "precision": "no pixel was called affected"
    }
    with pytest.raises(ConsiliumError, match="not a number for 1 of 2 scans"):
        compute_overlap_sums(np.where(np.arange(2)[:, None, None] == 1, np.nan, mask), mask)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 100)), min_size=2, max_size=40), st.integers(0, 40))
def test_spearman_of_two_centres_is_scipys_on_the_binned_numbers(
    scans: list[tuple[float, float]], cut: int
) -> None:
    share, known = np.array(scans).T
    first, second = (
        compute_joint_histogram(share[part], known[part], AFFECTED_FRACTION_EDGES, SEVERITY_EDGES)
        for part in (slice(cut), slice(cut, None))
    )
    joint = first + second
    binned = np.digitize(share, AFFECTED_FRACTION_EDGES[1:-1]), np.digitize(known, SEVERITY_EDGES[1:-1])
    if min(len(set(b)) for b in binned) < 2:
        assert compute_spearman(joint) is None
        assert "the same for all" in explain_undefined_spearman(joint)
    else:
        assert compute_spearman(joint) == pytest.approx(stats.spearmanr(*binned).statistic)
        assert explain_undefined_spearman(joint) == ""


def test_severities_of_any_scale_keep_their_order() -> None:
    random = np.random.default_rng(3)
    share = random.beta(1, 8, 300)
    for known in (np.round(4 * share), np.round(18 * share), 100 * share, share):
        joint = compute_joint_histogram(share, known, AFFECTED_FRACTION_EDGES, SEVERITY_EDGES)
        assert compute_spearman(joint) == pytest.approx(stats.spearmanr(share, known).statistic, abs=0.005)
    grades = np.arange(19.0)  # integers are exact
    np.testing.assert_array_equal(
        compute_joint_histogram(grades, grades, SEVERITY_EDGES, SEVERITY_EDGES).max(0).sum(), 19
    )
    some = compute_joint_histogram(
        np.array([0.1, np.nan, 0.3]), np.array([np.nan, 2.0, 150.0]), AFFECTED_FRACTION_EDGES, SEVERITY_EDGES
    )
    assert some.sum() == some[:, -1].sum() == 1
    assert explain_undefined_spearman(some) == "severity is known of 1 scans"
