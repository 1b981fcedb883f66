"""Binary and multiclass metrics against scikit-learn on raw scores, and the summary over centres."""

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
    compute_roc_curve,
    compute_score_histogram,
    explain_undefined_binary,
    explain_undefined_multiclass,
    summarise_centres,
)
from common.utils.errors import ConsiliumError

SCANS = st.lists(st.tuples(st.floats(-12, 12), st.sampled_from([0, 1])), min_size=1, max_size=60)


def draw_scores(seed: int, num_scans: int = 300, shift: float = 1.0) -> tuple[Array, Array]:
    """Return scores and true classes; `shift` separates the classes."""
    random = np.random.default_rng(seed)
    truth = random.integers(0, 2, num_scans).astype(float)
    return random.normal(0, 2, num_scans) + shift * (2 * truth - 1), truth


@given(SCANS, st.sampled_from([8, 64, 256]))
def test_auc_error_is_at_most_half_the_pairs_that_share_a_bin(
    scans: list[tuple[float, int]], num_bins: int
) -> None:
    scores, truth = np.array(scans).T
    hist = compute_score_histogram(scores, truth, num_bins)
    auc = compute_binary_metrics(hist)["auc"]
    if truth.min() == truth.max():
        assert auc is None
        return
    fraction_tied = (hist[0] * hist[1]).sum() / (hist[0].sum() * hist[1].sum())
    assert auc is not None
    assert abs(auc - reference.roc_auc_score(truth, scores)) <= fraction_tied / 2 + 1e-12
    binned_scores = np.digitize(scores, bin_edges(num_bins)[1:-1])
    assert auc == pytest.approx(reference.roc_auc_score(truth, binned_scores))


@given(SCANS)
def test_metrics_at_probability_one_half_are_exact(scans: list[tuple[float, int]]) -> None:
    scores, truth = np.array(scans).T
    predicted = (scores >= 0).astype(int)
    metrics = compute_binary_metrics(compute_score_histogram(scores, truth, 8))  # few bins suffice
    assert metrics["n"] == len(scans)
    assert metrics["positives"] == truth.sum()
    assert metrics["accuracy"] == pytest.approx(reference.accuracy_score(truth, predicted))
    one_class = truth.min() == truth.max()
    assert (metrics["balanced_accuracy"] is None) == one_class
    if one_class:
        return
    balanced_accuracy = reference.balanced_accuracy_score(truth, predicted)
    assert metrics["balanced_accuracy"] == pytest.approx(balanced_accuracy)
    recalls = reference.recall_score(truth, predicted, labels=[0, 1], average=None)
    assert metrics["gmean"] == pytest.approx(stats.gmean(recalls))
    assert metrics["f1"] == pytest.approx(reference.f1_score(truth, predicted))
    assert metrics["sensitivity"] == pytest.approx(recalls[1])
    assert metrics["specificity"] == pytest.approx(recalls[0])
    if predicted.any():
        assert metrics["precision"] == pytest.approx(reference.precision_score(truth, predicted))
    else:
        assert metrics["precision"] is None


@pytest.mark.parametrize("threshold", [0.1, 0.35, 0.5, 0.9])
def test_threshold_moves_to_the_nearest_edge(threshold: float) -> None:
    scores, truth = draw_scores(3)
    logit = np.log(threshold / (1 - threshold))
    hist = compute_score_histogram(scores, truth, 4096)
    accuracy = compute_binary_metrics(hist, threshold)["accuracy"]
    assert accuracy is not None
    exact_accuracy = ((scores >= logit) == truth).mean()
    within_a_bin = np.abs(scores - logit) < 16 / 4096  # only these can be predicted differently
    assert abs(accuracy - exact_accuracy) <= within_a_bin.mean()


def test_brier_and_calibration_error_are_close_to_those_of_raw_scores() -> None:
    scores, truth = draw_scores(5, num_scans=2000)
    probability = 1 / (1 + np.exp(-scores))
    metrics = compute_binary_metrics(compute_score_histogram(scores, truth))
    assert metrics["brier"] == pytest.approx(reference.brier_score_loss(truth, probability), abs=2e-3)
    groups = np.minimum((probability * 10).astype(int), 9)
    ece = 0.0
    for group in np.unique(groups):
        members = groups == group
        ece += members.mean() * abs(probability[members].mean() - truth[members].mean())
    assert metrics["ece"] == pytest.approx(ece, abs=0.01)


def test_calibration_curve_of_a_calibrated_score_is_the_diagonal() -> None:
    random = np.random.default_rng(0)
    probability = random.uniform(size=100_000)
    truth = (random.uniform(size=probability.size) < probability).astype(float)
    logits = np.log(probability / (1 - probability))
    curve = compute_calibration_curve(compute_score_histogram(logits, truth))
    assert curve.scans.sum() == probability.size
    assert len(curve.scans) == 10
    np.testing.assert_allclose(curve.predicted, curve.observed, atol=0.02)


def test_unlabelled_scans_are_dropped_and_infinite_scores_count_in_the_outer_bins() -> None:
    scores = np.array([-np.inf, np.inf, 3.0, -9.0])
    truth = np.array([0.0, 1.0, np.nan, 0.0])
    hist = compute_score_histogram(scores, truth, 8)
    np.testing.assert_array_equal(hist, [[2, 0, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0, 0, 1]])
    np.testing.assert_array_equal(compute_score_histogram(scores[:0], truth[:0], 8), np.zeros((2, 8)))


def test_nan_score_of_a_labelled_scan_is_an_error() -> None:
    with pytest.raises(ConsiliumError, match="not a number for 1 of 2 scans"):
        compute_score_histogram(np.array([np.nan, 1.0, np.nan]), np.array([1.0, 0.0, np.nan]), 8)


def test_odd_number_of_bins_is_an_error() -> None:
    with pytest.raises(ConsiliumError, match="7 bins"):
        bin_edges(7)


def test_metrics_of_one_class_are_undefined_with_a_reason() -> None:
    hist = compute_score_histogram(np.array([-2.0, 1.0, -3.0]), np.zeros(3))
    metrics = compute_binary_metrics(hist)
    reasons = explain_undefined_binary(hist)
    for name in ("auc", "f1", "sensitivity", "precision", "balanced_accuracy", "gmean"):
        assert metrics[name] is None
    assert metrics["specificity"] == pytest.approx(2 / 3)
    assert reasons["auc"] == "one class only (no positive scan among 3)"
    assert set(reasons) == {name for name, value in metrics.items() if value is None}
    curve = compute_roc_curve(hist)
    assert curve.false_positive_rate.size == curve.true_positive_rate.size == 0


def test_reasons_of_undefined_binary_metrics() -> None:
    only_positive = compute_score_histogram(np.array([1.0]), np.ones(1))
    reasons = explain_undefined_binary(only_positive)
    assert reasons["specificity"] == "one class only (no negative scan among 1)"
    assert set(explain_undefined_binary(np.zeros((2, 8))).values()) == {"no labelled scans"}
    none_predicted = compute_score_histogram(np.array([-1.0, -2.0]), np.array([0.0, 1.0]))
    assert explain_undefined_binary(none_predicted) == {"precision": "no scan was predicted as positive"}


def test_auc_is_the_area_under_the_roc_curve() -> None:
    hist = compute_score_histogram(*draw_scores(1))
    fpr, tpr = compute_roc_curve(hist)
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    assert np.trapezoid(tpr, fpr) == pytest.approx(compute_binary_metrics(hist)["auc"])


def test_multiclass_metrics_equal_scikit_learn() -> None:
    random = np.random.default_rng(2)
    truth = random.integers(0, 4, 200)
    predicted = random.integers(0, 5, 200)  # class 4 has no scans
    confusion = reference.confusion_matrix(truth, predicted, labels=range(5)).astype(float)
    metrics = compute_multiclass_metrics(confusion)
    recalls = reference.recall_score(truth, predicted, labels=range(4), average=None)
    f1 = reference.f1_score(truth, predicted, labels=range(4), average="macro")
    assert metrics["accuracy"] == pytest.approx(reference.accuracy_score(truth, predicted))
    assert metrics["balanced_accuracy"] == pytest.approx(np.mean(recalls))
    assert metrics["gmean"] == pytest.approx(stats.gmean(recalls))
    assert metrics["f1"] == pytest.approx(f1)
    assert explain_undefined_multiclass(confusion) == {}


def test_multiclass_metrics_of_one_class_are_undefined_except_accuracy() -> None:
    confusion = np.zeros((3, 3))
    confusion[1] = [2, 5, 0]
    undefined = ("balanced_accuracy", "gmean", "f1")
    expected = {"n": 7.0, "accuracy": 5 / 7, **dict.fromkeys(undefined)}
    assert compute_multiclass_metrics(confusion) == expected
    assert explain_undefined_multiclass(confusion) == dict.fromkeys(undefined, "one class only (7 scans)")
    assert set(explain_undefined_multiclass(np.zeros((3, 3))).values()) == {"no labelled scans"}


@given(st.permutations(range(5)))
def test_order_of_centres_does_not_change_the_summary(order: list[int]) -> None:
    hists = [compute_score_histogram(*draw_scores(seed, num_scans=21, shift=0.3 * seed)) for seed in range(4)]
    hists.append(compute_score_histogram(np.array([-1.0, 2.0]), np.zeros(2)))  # one class
    pooled = compute_binary_metrics(np.sum(hists, axis=0))
    metrics = {f"centre{i}": compute_binary_metrics(hist) for i, hist in enumerate(hists)}
    permuted_metrics = {f"centre{i}": metrics[f"centre{i}"] for i in order}
    permuted_pooled = compute_binary_metrics(np.sum([hists[i] for i in order], axis=0))
    assert summarise_centres(metrics, pooled) == summarise_centres(permuted_metrics, permuted_pooled)
    assert compute_challenge_score(hists) == compute_challenge_score([hists[i] for i in order])


def test_summary_leaves_out_centres_without_the_metric() -> None:
    per_centre: dict[str, dict[str, float | None]] = {
        "a": {"n": 9, "auc": 0.9, "ece": 0.1},
        "b": {"n": 5, "auc": None, "ece": 0.3},
        "c": {"n": 7, "auc": 0.6, "ece": 0.2},
    }
    summary = summarise_centres(per_centre, {"n": 21, "auc": 0.8, "ece": 0.15})
    assert summary["macro"] == {"auc": 0.75, "ece": pytest.approx(0.2)}
    assert summary["pooled"] == {"n": 21, "auc": 0.8, "ece": 0.15}
    assert summary["worst"] == {
        "auc": {"value": 0.6, "centre": "c"},
        "ece": {"value": 0.3, "centre": "b"},
    }
    assert summary["spread"] == {"auc": pytest.approx(0.3), "ece": pytest.approx(0.2)}


def test_summary_of_a_metric_that_no_centre_has_is_none() -> None:
    summary = summarise_centres({"b": {"auc": None}}, {"auc": None})
    assert summary["macro"]["auc"] is None
    assert summary["worst"]["auc"] == {"value": None, "centre": None}
    assert summary["spread"]["auc"] is None


def test_worst_value_of_an_error_is_the_largest() -> None:
    per_centre = {"a": {"mae": 2.0, "dice": 0.9}, "b": {"mae": 1.0, "dice": 0.4}}
    summary = summarise_centres(per_centre, {"mae": 1.5, "dice": 0.6})
    assert summary["worst"] == {
        "mae": {"value": 2.0, "centre": "a"},
        "dice": {"value": 0.4, "centre": "b"},
    }


def test_challenge_score_equals_scikit_learn() -> None:
    f1_scores = []
    hists = []
    for seed in range(3):
        scores, truth = draw_scores(seed, num_scans=80)
        hists.append(compute_score_histogram(scores, truth))
        f1_scores.append(reference.f1_score(truth, scores >= 0))
        f1_scores.append(reference.f1_score(truth, scores >= 0, pos_label=0))
    assert compute_challenge_score(hists) == pytest.approx(np.mean(f1_scores))
    assert compute_challenge_score(hists, missing_class="zero") == pytest.approx(np.mean(f1_scores))


def test_challenge_score_of_a_source_without_a_class() -> None:
    perfect = compute_score_histogram(np.array([-1.0, 1.0]), np.array([0.0, 1.0]))
    without_covid = compute_score_histogram(np.array([-1.0]), np.zeros(1))
    four_sources = [perfect, perfect, perfect, without_covid]
    assert compute_challenge_score(four_sources, missing_class="zero") == 0.875  # the paper's upper bound
    assert compute_challenge_score([perfect, without_covid], missing_class="skip") == 1.0
    assert compute_challenge_score([np.zeros((2, 8))]) is None
