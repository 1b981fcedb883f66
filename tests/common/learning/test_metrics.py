"""Metrics from histograms against scikit-learn on the raw scores."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as reference

from common.learning.metrics import (
    Array,
    bin_edges,
    compute_binary_metrics,
    compute_calibration_curve,
    compute_challenge_score,
    compute_multiclass_metrics,
    compute_regression_metrics,
    compute_regression_sums,
    compute_roc_curve,
    compute_score_histogram,
    explain_undefined_binary,
    explain_undefined_multiclass,
    explain_undefined_regression,
    summarise_centres,
)
from common.utils.errors import ConsiliumError

SCANS = st.lists(st.tuples(st.floats(-12, 12), st.sampled_from([0, 1])), min_size=1, max_size=60)


def drawn(seed: int, n: int = 300, shift: float = 1.0) -> tuple[Array, Array]:
    random = np.random.default_rng(seed)
    truth = random.integers(0, 2, n).astype(float)
    return random.normal(0, 2, n) + shift * (2 * truth - 1), truth


@given(SCANS, st.sampled_from([8, 64, 256]))
def test_auc_is_within_the_pairs_tied_in_a_bin(scans: list[tuple[float, int]], bins: int) -> None:
    scores, truth = np.array(scans).T
    hist = compute_score_histogram(scores, truth, bins)
    auc = compute_binary_metrics(hist)["auc"]
    if truth.min() == truth.max():
        assert auc is None
        return
    tied = (hist[0] * hist[1]).sum() / (hist[0].sum() * hist[1].sum())
    assert auc is not None
    assert abs(auc - reference.roc_auc_score(truth, scores)) <= tied / 2 + 1e-12
    # of binned scores it is exact
    binned = np.digitize(scores, bin_edges(bins)[1:-1])
    assert auc == pytest.approx(reference.roc_auc_score(truth, binned))


@given(SCANS)
def test_the_confusion_at_one_half_is_exact(scans: list[tuple[float, int]]) -> None:
    scores, truth = np.array(scans).T
    called = (scores >= 0).astype(int)
    got = compute_binary_metrics(compute_score_histogram(scores, truth, 8))  # however coarse
    assert got["n"] == len(scans)
    assert got["positives"] == truth.sum()
    assert got["accuracy"] == pytest.approx(reference.accuracy_score(truth, called))
    one_class = truth.min() == truth.max()
    assert (got["balanced_accuracy"] is None) == one_class
    if not one_class:
        assert got["balanced_accuracy"] == pytest.approx(reference.balanced_accuracy_score(truth, called))
        recalls = reference.recall_score(truth, called, labels=[0, 1], average=None)
        assert got["gmean"] == pytest.approx(stats.gmean(recalls))
        assert got["f1"] == pytest.approx(reference.f1_score(truth, called))
        assert got["sensitivity"] == pytest.approx(reference.recall_score(truth, called))
        assert got["specificity"] == pytest.approx(reference.recall_score(truth, called, pos_label=0))
        if called.any():
            assert got["precision"] == pytest.approx(reference.precision_score(truth, called))
        else:
            assert got["precision"] is None


@pytest.mark.parametrize("threshold", [0.1, 0.35, 0.5, 0.9])
def test_other_thresholds_move_to_the_nearest_edge(threshold: float) -> None:
    scores, truth = drawn(3)
    hist = compute_score_histogram(scores, truth, 4096)
    called = scores >= np.log(threshold / (1 - threshold))
    near = (
        np.abs(scores - np.log(threshold / (1 - threshold))) < 16 / 4096
    )  # at most these may be called otherwise
    assert abs(compute_binary_metrics(hist, threshold)["accuracy"] - (called == truth).mean()) <= near.mean()


def test_brier_and_calibration_error_are_close_to_those_of_raw_scores() -> None:
    scores, truth = drawn(5, n=2000)
    probability = 1 / (1 + np.exp(-scores))
    got = compute_binary_metrics(compute_score_histogram(scores, truth))
    assert got["brier"] == pytest.approx(reference.brier_score_loss(truth, probability), abs=2e-3)
    group = np.minimum((probability * 10).astype(int), 9)
    ece = sum(
        (group == g).mean() * abs(probability[group == g].mean() - truth[group == g].mean())
        for g in range(10)
        if (group == g).any()
    )
    assert got["ece"] == pytest.approx(ece, abs=0.01)


def test_calibration_of_a_calibrated_score_lies_on_the_diagonal() -> None:
    random = np.random.default_rng(0)
    probability = random.uniform(size=100_000)
    truth = (random.uniform(size=probability.size) < probability).astype(float)
    predicted, observed, n = compute_calibration_curve(
        compute_score_histogram(np.log(probability / (1 - probability)), truth)
    )
    assert n.sum() == probability.size
    assert len(n) == 10
    np.testing.assert_allclose(predicted, observed, atol=0.02)


def test_missing_labels_change_nothing_and_infinite_scores_are_clipped() -> None:
    scores, truth = np.array([-np.inf, np.inf, 3.0, -9.0]), np.array([0.0, 1.0, np.nan, 0.0])
    hist = compute_score_histogram(scores, truth, 8)
    np.testing.assert_array_equal(hist, [[2, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 1]])
    np.testing.assert_array_equal(compute_score_histogram(scores[:0], truth[:0], 8), np.zeros((2, 8)))


def test_a_score_that_is_not_a_number_is_one_sentence() -> None:
    with pytest.raises(ConsiliumError, match="not a number for 1 of 2 scans"):
        compute_score_histogram(np.array([np.nan, 1.0, np.nan]), np.array([1.0, 0.0, np.nan]), 8)
    with pytest.raises(ConsiliumError, match="7 bins"):
        bin_edges(7)


def test_one_class_has_no_auc_and_says_why() -> None:
    hist = compute_score_histogram(np.array([-2.0, 1.0, -3.0]), np.zeros(3))
    got, why = compute_binary_metrics(hist), explain_undefined_binary(hist)
    assert [
        got[name] for name in ("auc", "f1", "sensitivity", "precision", "balanced_accuracy", "gmean")
    ] == [None] * 6
    assert got["specificity"] == pytest.approx(2 / 3)
    assert why["auc"] == "one class only (no positive scan among 3)"
    assert set(why) == {name for name, value in got.items() if value is None}
    assert (
        explain_undefined_binary(compute_score_histogram(np.array([1.0]), np.ones(1)))["specificity"]
        == "one class only (no negative scan among 1)"
    )
    assert set(explain_undefined_binary(np.zeros((2, 8))).values()) == {"no labelled scans"}
    assert explain_undefined_binary(
        compute_score_histogram(np.array([-1.0, -2.0]), np.array([0.0, 1.0]))
    ) == {"precision": "no scan was called positive"}
    fpr, tpr = compute_roc_curve(hist)
    assert fpr.size == tpr.size == 0


def test_roc_encloses_the_auc() -> None:
    hist = compute_score_histogram(*drawn(1))
    fpr, tpr = compute_roc_curve(hist)
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(tpr, fpr) == pytest.approx(compute_binary_metrics(hist)["auc"])


def test_multiclass_against_scikit_learn() -> None:
    random = np.random.default_rng(2)
    truth, called = random.integers(0, 4, 200), random.integers(0, 5, 200)  # class 4 is only ever predicted
    confusion = reference.confusion_matrix(truth, called, labels=range(5)).astype(float)
    got = compute_multiclass_metrics(confusion)
    assert got["accuracy"] == pytest.approx(reference.accuracy_score(truth, called))
    assert got["balanced_accuracy"] == pytest.approx(
        np.mean(reference.recall_score(truth, called, labels=range(4), average=None))
    )
    assert got["gmean"] == pytest.approx(
        stats.gmean(reference.recall_score(truth, called, labels=range(4), average=None))
    )
    assert got["f1"] == pytest.approx(reference.f1_score(truth, called, labels=range(4), average="macro"))
    assert explain_undefined_multiclass(confusion) == {}


def test_a_centre_with_one_class_of_several_has_accuracy_only() -> None:
    confusion = np.zeros((3, 3))
    confusion[1] = [2, 5, 0]
    assert compute_multiclass_metrics(confusion) == {
        "n": 7.0,
        "accuracy": 5 / 7,
        "balanced_accuracy": None,
        "gmean": None,
        "f1": None,
    }
    assert explain_undefined_multiclass(confusion) == dict.fromkeys(
        ("balanced_accuracy", "gmean", "f1"), "one class only (7 scans)"
    )
    assert set(explain_undefined_multiclass(np.zeros((3, 3))).values()) == {"no labelled scans"}


@given(st.permutations(range(5)))
def test_permuting_centres_changes_nothing(order: list[int]) -> None:
    hists = {
        f"centre{seed}": compute_score_histogram(*drawn(seed, n=21, shift=0.3 * seed)) for seed in range(4)
    }
    hists["centre4"] = compute_score_histogram(np.array([-1.0, 2.0]), np.zeros(2))  # one class
    permuted = {name: hists[name] for name in (f"centre{i}" for i in order)}
    views = [
        summarise_centres(
            {name: compute_binary_metrics(hist) for name, hist in h.items()},
            compute_binary_metrics(np.sum(list(h.values()), axis=0)),
        )
        for h in (hists, permuted)
    ]
    assert views[0] == views[1]
    assert compute_challenge_score(hists.values()) == compute_challenge_score(permuted.values())


def test_summary_leaves_undefined_centres_out() -> None:
    per_centre: dict[str, dict[str, float | None]] = {
        "a": {"n": 9, "auc": 0.9, "ece": 0.1},
        "b": {"n": 5, "auc": None, "ece": 0.3},
        "c": {"n": 7, "auc": 0.6, "ece": 0.2},
    }
    got = summarise_centres(per_centre, {"n": 21, "auc": 0.8, "ece": 0.15})
    assert got["macro"] == {"auc": 0.75, "ece": pytest.approx(0.2)}
    assert got["pooled"] == {"n": 21, "auc": 0.8, "ece": 0.15}
    assert got["worst"] == {"auc": {"value": 0.6, "centre": "c"}, "ece": {"value": 0.3, "centre": "b"}}
    assert got["spread"] == {"auc": pytest.approx(0.3), "ece": pytest.approx(0.2)}
    empty = summarise_centres({"b": {"auc": None}}, {"auc": None})
    assert (empty["macro"]["auc"], empty["worst"]["auc"], empty["spread"]["auc"]) == (
        None,
        {"value": None, "centre": None},
        None,
    )


def test_challenge_score_against_scikit_learn() -> None:
    raw = [drawn(seed, n=80) for seed in range(3)]
    f1s = [
        (reference.f1_score(truth, scores >= 0), reference.f1_score(truth, scores >= 0, pos_label=0))
        for scores, truth in raw
    ]
    hists = [compute_score_histogram(*pair) for pair in raw]
    assert compute_challenge_score(hists) == pytest.approx(np.mean(f1s))
    assert compute_challenge_score(hists, missing_class="zero") == pytest.approx(np.mean(f1s))
    perfect, without_covid = (
        compute_score_histogram(np.array([-1.0, 1.0]), np.array([0.0, 1.0])),
        compute_score_histogram(np.array([-1.0]), np.zeros(1)),
    )
    assert (
        compute_challenge_score([perfect, perfect, perfect, without_covid], missing_class="zero") == 0.875
    )  # the paper's cap
    assert compute_challenge_score([perfect, without_covid], missing_class="skip") == 1.0
    assert compute_challenge_score([np.zeros((2, 8))]) is None


# --- regression, segmentation, rank agreement: sums of three centres against scikit-learn and scipy on all scans


def test_regression_of_three_centres_against_scikit_learn() -> None:
    random = np.random.default_rng(0)
    target = random.integers(0, 4, (90, 6)).astype(float)
    predicted = (target + random.normal(0, 1, target.shape)).astype(np.float32)
    lost = np.vstack([np.full((2, 6), np.nan), target[:1].copy()])
    lost[2, 3] = np.nan  # a row is known whole or not at all
    centres = [(predicted[:40], target[:40]), (predicted[40:], target[40:]), (np.full((3, 6), np.nan), lost)]
    sums = np.sum([compute_regression_sums(*centre) for centre in centres], axis=0)
    got, p, y = compute_regression_metrics(sums), predicted.ravel().astype(float), target.ravel()
    assert got["n"] == 90
    assert got["mae"] == pytest.approx(reference.mean_absolute_error(y, p))
    assert got["rmse"] == pytest.approx(reference.root_mean_squared_error(y, p))
    assert got["r2"] == pytest.approx(reference.r2_score(y, p))
    assert got["pearson"] == pytest.approx(stats.pearsonr(y, p).statistic)
    assert explain_undefined_regression(sums) == {}
    with pytest.raises(ConsiliumError, match="not a number for 1 of 2 scans"):
        compute_regression_sums(np.array([[np.nan], [1.0], [np.nan]]), np.array([1.0, 2.0, np.nan]))


def test_a_regression_without_spread_has_errors_but_no_correlation() -> None:
    constant = compute_regression_sums(np.array([0.1, 0.7, 0.4]), np.full(3, 0.1))
    got = compute_regression_metrics(constant)
    assert got["mae"] == pytest.approx(0.3)
    assert got["r2"] is got["pearson"] is None
    assert set(explain_undefined_regression(constant).values()) == {"the labels are all the same"}
    assert explain_undefined_regression(
        compute_regression_sums(np.full(3, 0.1), np.array([0.1, 0.7, 0.4]))
    ) == {"pearson": "the predictions are all the same"}
    nothing = compute_regression_sums(np.zeros((0, 2)), np.zeros((0, 2)))
    assert compute_regression_metrics(nothing) == {
        "n": 0,
        "mae": None,
        "rmse": None,
        "r2": None,
        "pearson": None,
    }
    assert set(explain_undefined_regression(nothing).values()) == {"no labelled scans"}


def test_the_worst_of_an_error_is_the_largest() -> None:
    got = summarise_centres(
        {"a": {"mae": 2.0, "dice": 0.9}, "b": {"mae": 1.0, "dice": 0.4}}, {"mae": 1.5, "dice": 0.6}
    )
    assert got["worst"] == {"mae": {"value": 2.0, "centre": "a"}, "dice": {"value": 0.4, "centre": "b"}}
