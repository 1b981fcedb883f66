"""Compute metrics of a binary task from a histogram of its scores.

The histogram is float64 [2, bins]: the number of scans of each true class (row 0 negative, row 1 positive)
with a score in each bin. Bins are uniform in logits over [-8, 8]; scores beyond fall into the outer bins.
Their number is even, so that probability 0.5 is an edge and the metrics at that threshold are exact. The AUC
counts ties half: it differs from the AUC over raw scores by at most half the fraction of (positive, negative)
pairs that share a bin.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.learning.metrics.shared import (
    NO_LABELLED_SCANS,
    Array,
    Metrics,
    check_not_nan,
    compute_f1,
    divide_or_none,
    undefined_names,
)
from common.utils.errors import ConsiliumError

LOGIT_LIMIT = 8.0  # beyond it a probability is within 0.0004 of 0 or 1


class Outcomes(NamedTuple):
    """Numbers of scans by true class and predicted class at a threshold."""

    tp: float
    fp: float
    tn: float
    fn: float

    @property
    def positives(self) -> float:
        """The scans whose true class is positive."""
        return self.fn + self.tp

    @property
    def negatives(self) -> float:
        """The scans whose true class is negative."""
        return self.tn + self.fp


class RocCurve(NamedTuple):
    """Points from (0, 0) to (1, 1); both arrays are empty when there is only one class."""

    false_positive_rate: Array
    true_positive_rate: Array


class CalibrationCurve(NamedTuple):
    """Groups of scans with similar predicted probability, without empty groups."""

    predicted: Array  # mean predicted probability
    observed: Array  # fraction of positives
    scans: Array


def bin_edges(num_bins: int) -> Array:
    """Return the edges of the bins, [num_bins + 1] logits.

    Raises:
        ConsiliumError: The number of bins is odd or less than 2.
    """
    if num_bins < 2 or num_bins % 2:
        raise ConsiliumError(
            f"a score histogram cannot have {num_bins} bins: "
            "use an even number, so that probability 0.5 is an edge"
        )
    return np.linspace(-LOGIT_LIMIT, LOGIT_LIMIT, num_bins + 1)


def compute_score_histogram(logits: NDArray[Any], targets: NDArray[Any], num_bins: int = 256) -> Array:
    """Count scans by true class and score bin, [2, num_bins].

    A score on an edge counts as above it, like `probability >= threshold`.

    Args:
        logits: scores [N].
        targets: true classes [N], 0 or 1; NaN for scans without a label, which are dropped.
        num_bins: an even number.

    Raises:
        ConsiliumError: The score of a labelled scan is NaN.
    """
    inner_edges = bin_edges(num_bins)[1:-1]
    scores = np.asarray(logits, np.float64).ravel()
    truth = np.asarray(targets, np.float64).ravel()
    labelled = ~np.isnan(truth)
    scores = scores[labelled]
    truth = truth[labelled]
    check_not_nan(scores)
    bins = np.searchsorted(inner_edges, scores, side="right")
    negatives = np.bincount(bins[truth == 0], minlength=num_bins)
    positives = np.bincount(bins[truth == 1], minlength=num_bins)
    return np.stack([negatives, positives]).astype(np.float64)


def compute_binary_metrics(hist: Array, threshold: float = 0.5) -> Metrics:
    """Compute all metrics of a binary task from its histogram [2, bins].

    F1, sensitivity and precision are those of the positive class. `ece` is the expected calibration error
    over ten equal groups of probability, `brier` the mean squared error; for both, a score is the middle of
    its bin.

    Args:
        hist: the score histogram.
        threshold: a probability; it is moved to the nearest edge of a bin.
    """
    outcomes = _count_outcomes(hist, threshold)
    positives = outcomes.positives
    negatives = outcomes.negatives
    total = negatives + positives
    sensitivity = divide_or_none(outcomes.tp, positives)
    specificity = divide_or_none(outcomes.tn, negatives)
    balanced_accuracy = None
    gmean = None
    if sensitivity is not None and specificity is not None:
        balanced_accuracy = (sensitivity + specificity) / 2
        gmean = math.sqrt(sensitivity * specificity)
    precision = None
    if negatives and positives:  # with one class it would be 0 or 1 for any model
        precision = divide_or_none(outcomes.tp, outcomes.tp + outcomes.fp)

    calibration = compute_calibration_curve(hist)
    calibration_errors = calibration.scans * np.abs(calibration.predicted - calibration.observed)
    probability = _bin_probabilities(hist)
    squared_errors = hist[0] * probability**2 + hist[1] * (1 - probability) ** 2
    return {
        "n": total,
        "positives": positives,
        "auc": _compute_auc(hist),
        "f1": compute_f1(outcomes.tp, outcomes.fp, outcomes.fn),
        "sensitivity": sensitivity,
        "specificity": specificity,
        "precision": precision,
        "balanced_accuracy": balanced_accuracy,
        "gmean": gmean,
        "accuracy": divide_or_none(outcomes.tp + outcomes.tn, total),
        "ece": divide_or_none(float(calibration_errors.sum()), total),
        "brier": divide_or_none(float(squared_errors.sum()), total),
    }


def explain_undefined_binary(hist: Array, threshold: float = 0.5) -> dict[str, str]:
    """Return {metric: reason} for the metrics of `compute_binary_metrics` that are None."""
    outcomes = _count_outcomes(hist, threshold)
    if outcomes.positives + outcomes.negatives == 0:
        reason = NO_LABELLED_SCANS
    elif outcomes.positives == 0:
        reason = f"one class only (no positive scan among {outcomes.negatives:.0f})"
    elif outcomes.negatives == 0:
        reason = f"one class only (no negative scan among {outcomes.positives:.0f})"
    else:
        reason = "no scan was predicted as positive"
    return dict.fromkeys(undefined_names(compute_binary_metrics(hist, threshold)), reason)


def compute_challenge_score(
    hists: Iterable[Array], threshold: float = 0.5, missing_class: Literal["zero", "skip"] = "skip"
) -> float | None:
    """Return the challenge's score: the mean over sources of (F1 of positives + F1 of negatives) / 2.

    The score of the multi-source challenge (arXiv 2604.03320). Sources without scans are left out; the score
    is None when all are.

    Args:
        hists: one score histogram [2, bins] for each source.
        threshold: a probability.
        missing_class: how a class without scans at a source counts. `zero`: as F1 = 0, the challenge's own
            rule, which caps the score. `skip`: not at all.
    """
    scores = []
    for hist in hists:
        outcomes = _count_outcomes(hist, threshold)
        f1_positives = compute_f1(outcomes.tp, outcomes.fp, outcomes.fn)
        f1_negatives = compute_f1(outcomes.tn, outcomes.fn, outcomes.fp)
        f1_scores = [f1 for f1 in (f1_positives, f1_negatives) if f1 is not None]
        if f1_scores:
            num_classes = len(f1_scores) if missing_class == "skip" else 2
            scores.append(math.fsum(f1_scores) / num_classes)
    return divide_or_none(math.fsum(scores), len(scores))


def compute_roc_curve(hist: Array) -> RocCurve:
    """Return the receiver operating characteristic of a histogram [2, bins]."""
    scans_by_class = hist.sum(1, keepdims=True)
    if not scans_by_class.all():
        return RocCurve(np.zeros(0), np.zeros(0))
    filled_bins = hist[:, hist.sum(0) > 0]  # an empty bin adds no point
    scans_above = np.cumsum(filled_bins[:, ::-1], axis=1)
    rates = np.concatenate([np.zeros((2, 1)), scans_above], axis=1) / scans_by_class
    return RocCurve(rates[0], rates[1])


def compute_calibration_curve(hist: Array, num_groups: int = 10) -> CalibrationCurve:
    """Compare predicted and observed probability in groups of equal width in probability."""
    probability = _bin_probabilities(hist)
    groups = np.minimum((probability * num_groups).astype(int), num_groups - 1)
    scans_by_bin = hist.sum(0)
    scans = np.bincount(groups, scans_by_bin, num_groups).astype(np.float64)
    predicted_sum = np.bincount(groups, scans_by_bin * probability, num_groups)
    positives = np.bincount(groups, hist[1], num_groups)
    filled = scans > 0
    scans = scans[filled]
    return CalibrationCurve(predicted_sum[filled] / scans, positives[filled] / scans, scans)


def _bin_probabilities(hist: Array) -> Array:
    """Return the probability in the middle of each bin, [bins]."""
    edges = bin_edges(hist.shape[1])
    middles = (edges[:-1] + edges[1:]) / 2
    return np.asarray(1 / (1 + np.exp(-middles)))


def _count_outcomes(hist: Array, threshold: float) -> Outcomes:
    """Count the scans below the threshold as predicted negative, the others as predicted positive."""
    num_bins = hist.shape[1]
    logit = math.log(threshold / (1 - threshold))
    nearest_edge = round((logit + LOGIT_LIMIT) / (2 * LOGIT_LIMIT) * num_bins)
    nearest_edge = min(max(nearest_edge, 0), num_bins)
    tn, fn = hist[:, :nearest_edge].sum(1)
    fp, tp = hist[:, nearest_edge:].sum(1)
    return Outcomes(tp=float(tp), fp=float(fp), tn=float(tn), fn=float(fn))


def _compute_auc(hist: Array) -> float | None:
    """Return P(score of a positive > score of a negative), ties counted half (Mann and Whitney)."""
    negatives, positives = hist
    negatives_below = np.cumsum(negatives) - negatives
    ordered_pairs = float((positives * (negatives_below + negatives / 2)).sum())
    return divide_or_none(ordered_pairs, float(negatives.sum() * positives.sum()))
