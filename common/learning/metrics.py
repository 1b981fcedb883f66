"""Performance from sums: everything the coordinator knows about how well a model does is additive over centres.

For a binary task a centre sends a *histogram*, float64 [2, bins]: how many scans of each true class (row 0 negative, row 1 positive) got a
score in each bin. For a multiclass task it sends the *confusion*, float64 [K, K], rows true, columns predicted. Both are counts, so the
pooled one is the plain sum, and no scan's own score leaves its hospital. Bins are uniform in logit space over [-8, 8] (scores beyond fall
into the outer bins); their number is even, so that probability 0.5 is an edge and the metrics at that threshold are exact. The AUC counts
ties half: it differs from the one over raw scores by at most half the share of (positive, negative) pairs that share a bin.

For a regression it sends the nine sums of `regression_sums`, for a segmentation what common/learning/segmentation_metrics.py measures masks by.

A metric that is not defined is None, never 0 and never 0.5, and `..._reasons` say why.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from common.utils.errors import ConsiliumError

Array = NDArray[np.float64]
Metrics = dict[str, float | None]

LOGIT_LIMIT = 8.0  # logits; beyond it a probability is within 0.0004 of 0 or 1
COUNT_METRICS = (
    "n",
    "positives",
)  # of a metrics dict: sizes, not performance; a mean or a worst of them says nothing
LOWER_IS_BETTER = ("ece", "brier", "mae", "rmse", "loss")
PRIMARY_METRICS = (
    "auc",
    "balanced_accuracy",
    "accuracy",
    "dice",
    "r2",
    "mae",
    "loss",
)  # the first that a task has speaks for it
NO_LABELLED_SCANS = "no labelled scans"


def bin_edges(num_bins: int) -> Array:
    """The bins' edges, [bins + 1] logits. Raises ConsiliumError for an odd number of bins."""
    if num_bins < 2 or num_bins % 2:
        raise ConsiliumError(
            f"a score histogram cannot have {num_bins} bins: take an even number, so that probability 0.5 is an edge"
        )
    return np.linspace(-LOGIT_LIMIT, LOGIT_LIMIT, num_bins + 1)


def compute_score_histogram(logits: NDArray[Any], targets: NDArray[Any], num_bins: int = 256) -> Array:
    """Counts of scans by (true class, score bin), [2, bins].

    `logits` [N]; `targets` [N] in {0, 1}, or NaN where a scan has no label for the task: such scans are dropped. A score on an edge
    counts as above it, like `probability >= threshold`. Raises ConsiliumError where a labelled scan's score is NaN.
    """
    inner = bin_edges(num_bins)[1:-1]
    scores, truth = np.asarray(logits, np.float64).ravel(), np.asarray(targets, np.float64).ravel()
    labelled = ~np.isnan(truth)
    scores, truth = scores[labelled], truth[labelled]
    check_not_nan(scores)
    where = np.searchsorted(inner, scores, side="right")
    return np.stack([np.bincount(where[truth == label], minlength=num_bins) for label in (0, 1)]).astype(
        np.float64
    )


def compute_binary_metrics(hist: Array, threshold: float = 0.5) -> Metrics:
    """All metrics of a binary task from its histogram [2, bins]; `threshold` is a probability, moved to the nearest bin edge.

    `n` and `positives` are scans; `ece` is the expected calibration error over 10 equal groups of probability, `brier` the mean squared
    error; both take a bin's middle for its scans' score. F1, sensitivity and precision are those of the positive class.
    """
    (tn, fn), (fp, tp) = _count_outcomes(hist, threshold)
    negatives, positives = tn + fp, fn + tp
    sensitivity, specificity = divide_or_none(tp, positives), divide_or_none(tn, negatives)
    predicted, observed, n = compute_calibration_curve(hist)
    probability = _bin_probabilities(hist)
    return {
        "n": negatives + positives,
        "positives": positives,
        "auc": _compute_auc(hist),
        "f1": compute_f1(tp, fp, fn),
        "sensitivity": sensitivity,
        "specificity": specificity,
        "precision": divide_or_none(tp, tp + fp)
        if negatives and positives
        else None,  # with one class it would be 0 or 1 whatever the model
        "balanced_accuracy": None
        if sensitivity is None or specificity is None
        else (sensitivity + specificity) / 2,
        "gmean": None if sensitivity is None or specificity is None else math.sqrt(sensitivity * specificity),
        "accuracy": divide_or_none(tp + tn, negatives + positives),
        "ece": divide_or_none(float((n * np.abs(predicted - observed)).sum()), negatives + positives),
        "brier": divide_or_none(
            float((hist[0] * probability**2 + hist[1] * (1 - probability) ** 2).sum()), negatives + positives
        ),
    }


def explain_undefined_binary(hist: Array, threshold: float = 0.5) -> dict[str, str]:
    """Why a metric of `binary_metrics` is None: {metric: reason}; empty where all are defined."""
    (tn, fn), (fp, tp) = _count_outcomes(hist, threshold)
    if tn + fn + fp + tp == 0:
        why = NO_LABELLED_SCANS
    elif fn + tp == 0:
        why = f"one class only (no positive scan among {tn + fp:.0f})"
    elif tn + fp == 0:
        why = f"one class only (no negative scan among {fn + tp:.0f})"
    else:
        why = ""
    undefined = [name for name, value in compute_binary_metrics(hist, threshold).items() if value is None]
    return {name: why or "no scan was called positive" for name in undefined}


def compute_multiclass_metrics(confusion: Array) -> Metrics:
    """Accuracy, balanced accuracy (mean recall), G-mean (geometric mean of the recalls) and F1 (mean over classes) from a confusion [K, K];
    classes without scans are left out.

    With one class only the latter three would be accuracy by another name: they are None.
    """
    true, predicted, right = confusion.sum(1), confusion.sum(0), confusion.diagonal()
    present = true > 0
    recalls = right[present] / true[present]
    several = len(recalls) > 1
    return {
        "n": float(true.sum()),
        "accuracy": divide_or_none(float(right.sum()), float(true.sum())),
        "balanced_accuracy": float(recalls.mean()) if several else None,
        "gmean": float(recalls.prod() ** (1 / len(recalls))) if several else None,
        "f1": float((2 * right[present] / (true + predicted)[present]).mean()) if several else None,
    }


def explain_undefined_multiclass(confusion: Array) -> dict[str, str]:
    """Why a metric of `multiclass_metrics` is None: {metric: reason}."""
    n = confusion.sum()
    why = f"one class only ({n:.0f} scans)" if n else NO_LABELLED_SCANS
    return {name: why for name, value in compute_multiclass_metrics(confusion).items() if value is None}


# --- regression -----------------------------------------------------------------------------------------------------------------------


def compute_regression_sums(predicted: NDArray[Any], target: NDArray[Any]) -> Array:
    """[9]: scans, values, sum |e|, sum e^2, sum y, sum y^2, sum p, sum p^2, sum p y over the values of `predicted` p and `target` y [N, R].

    e = p - y. A row with a NaN among its targets is dropped. Raises ConsiliumError where a labelled scan's prediction is not a number.
    """
    p, y = flatten_rows(np.asarray(predicted, np.float64)), flatten_rows(np.asarray(target, np.float64))
    labelled = ~np.isnan(y).any(1)
    p, y = p[labelled], y[labelled]
    check_not_nan(p)
    e = p - y
    return np.array(
        [len(y), y.size, *(v.sum() for v in (np.abs(e), e**2, y, y**2, p, p**2, p * y))], np.float64
    )


def compute_regression_metrics(sums: Array) -> Metrics:
    """Of all columns together: `mae` and `rmse` in the labels' unit, `r2` = 1 - sum e^2 / sum (y - mean y)^2, `pearson`'s correlation."""
    scans, n, absolute, squared, y, yy, p, pp, py = map(float, sums)
    spread_y, spread_p = _sum_squared_deviations(n, y, yy), _sum_squared_deviations(n, p, pp)
    return {
        "n": scans,
        "mae": divide_or_none(absolute, n),
        "rmse": math.sqrt(squared / n) if n else None,
        "r2": 1 - squared / spread_y if spread_y else None,
        "pearson": (py - p * y / n) / math.sqrt(spread_y * spread_p) if spread_y and spread_p else None,
    }


def explain_undefined_regression(sums: Array) -> dict[str, str]:
    """Why a metric of `regression_metrics` is None: {metric: reason}."""
    _, n, _, _, y, yy, *_ = map(float, sums)
    why = (
        NO_LABELLED_SCANS
        if not n
        else "the labels are all the same"
        if not _sum_squared_deviations(n, y, yy)
        else "the predictions are all the same"
    )
    return {name: why for name, value in compute_regression_metrics(sums).items() if value is None}


def _sum_squared_deviations(n: float, total: float, squares: float) -> float:
    """sum (x - mean x)^2; exactly 0 where only rounding is left of it."""
    spread = squares - total**2 / n if n else 0.0
    return spread if spread > 1e-12 * squares else 0.0


# --- tasks without labels -------------------------------------------------------------------------------------------------------------


def compute_loss_metrics(sums: Array) -> Metrics:
    """Of a task whose loss is all that is measured: {n, loss} from [2] = (summed loss, scans)."""
    summed, n = map(float, sums)
    return {"n": n, "loss": divide_or_none(summed, n)}


def explain_undefined_loss(sums: Array) -> dict[str, str]:
    """Why the loss is None: {"loss": reason}, or empty."""
    return {} if sums[1] else {"loss": "no scans"}


# --- over centres ---------------------------------------------------------------------------------------------------------------------


def summarise_centres(
    per_centre: Mapping[str, Mapping[str, float | None]], pooled: Mapping[str, float | None]
) -> dict[str, dict[str, Any]]:
    """Centres' metrics in four views, each by metric name; centres where a metric is undefined do not count for it.

    `macro`: mean over centres; `pooled`: metrics of the summed sums, as given; `worst`: {"value", "centre"}, the largest where lower is
    better (LOWER_IS_BETTER), else the smallest; `spread`: largest less smallest. None where no centre has the metric.
    """
    views: dict[str, dict[str, Any]] = {"macro": {}, "pooled": dict(pooled), "worst": {}, "spread": {}}
    for name in (name for name in pooled if name not in COUNT_METRICS):
        known = sorted(
            (value, centre)
            for centre, values in per_centre.items()
            if (value := values.get(name)) is not None
        )
        # fsum is exact: the same mean in whatever order the centres replied
        views["macro"][name] = math.fsum(value for value, _ in known) / len(known) if known else None
        value, centre = (
            (max(known, key=lambda pair: pair[0]) if name in LOWER_IS_BETTER else known[0])
            if known
            else (None, None)
        )
        views["worst"][name] = {"value": value, "centre": centre}
        views["spread"][name] = known[-1][0] - known[0][0] if known else None
    return views


def primary_metric(preferred: str, available: Collection[str]) -> str:
    """The metric that speaks for a task with the metrics `known`: the one that a run was judged by, or else the first of LEADING."""
    return (
        preferred
        if preferred in available
        else next((name for name in PRIMARY_METRICS if name in available), preferred)
    )


def compute_challenge_score(
    hists: Iterable[Array], threshold: float = 0.5, missing_class: Literal["zero", "skip"] = "skip"
) -> float | None:
    """Mean over sources of (F1 of positives + F1 of negatives) / 2: the multi-source challenge's score (arXiv 2604.03320).

    `hists`: one histogram [2, bins] a source. A class that a source does not have counts as F1 = 0 (`zero`, the challenge's own rule,
    which caps the score) or is left out of that source's mean (`skip`). A source without scans is left out; None when all are.
    """
    scores = []
    for hist in hists:
        (tn, fn), (fp, tp) = _count_outcomes(hist, threshold)
        known = [value for value in (compute_f1(tp, fp, fn), compute_f1(tn, fn, fp)) if value is not None]
        if known:
            scores.append(math.fsum(known) / (len(known) if missing_class == "skip" else 2))
    return math.fsum(scores) / len(scores) if scores else None


def compute_roc_curve(hist: Array) -> tuple[Array, Array]:
    """The curve's (false positive rate, true positive rate), from (0, 0) to (1, 1); both empty with one class only."""
    negatives, positives = hist.sum(1)
    if negatives == 0 or positives == 0:
        return np.zeros(0), np.zeros(0)
    filled = hist[:, hist.sum(0) > 0]  # an empty bin adds no point
    fpr, tpr = np.concatenate([np.zeros((2, 1)), np.cumsum(filled[:, ::-1], axis=1)], axis=1) / hist.sum(
        1, keepdims=True
    )
    return fpr, tpr


def compute_calibration_curve(hist: Array, num_bins: int = 10) -> tuple[Array, Array, Array]:
    """(mean predicted probability, observed share of positives, scans) of each non-empty group of equal width in probability."""
    probability = _bin_probabilities(hist)
    group = np.minimum((probability * num_bins).astype(int), num_bins - 1)
    n = np.bincount(group, hist.sum(0), num_bins).astype(np.float64)
    predicted, positives = (
        np.bincount(group, hist.sum(0) * probability, num_bins),
        np.bincount(group, hist[1], num_bins),
    )
    kept = n > 0
    return predicted[kept] / n[kept], positives[kept] / n[kept], n[kept]


def _bin_probabilities(hist: Array) -> Array:
    """Of each bin's middle, [bins]."""
    sides = bin_edges(hist.shape[1])
    return np.asarray(1 / (1 + np.exp(-(sides[:-1] + sides[1:]) / 2)))


def _count_outcomes(hist: Array, threshold: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """Scans as ((true negatives, false negatives), (false positives, true positives)): below the threshold, then at or above it."""
    bins = hist.shape[1]
    cut = round((math.log(threshold / (1 - threshold)) + LOGIT_LIMIT) / (2 * LOGIT_LIMIT) * bins)
    cut = min(max(cut, 0), bins)
    below, above = hist[:, :cut].sum(1), hist[:, cut:].sum(1)
    return (float(below[0]), float(below[1])), (float(above[0]), float(above[1]))


def _compute_auc(hist: Array) -> float | None:
    """P(score of a positive > score of a negative), ties half (Mann-Whitney)."""
    negatives, positives = hist
    below = np.cumsum(negatives) - negatives
    return divide_or_none(
        float((positives * (below + negatives / 2)).sum()), float(negatives.sum() * positives.sum())
    )


def compute_f1(tp: float, fp: float, fn: float) -> float | None:
    """Undefined where the class has no scans, even though false alarms alone would make it 0: nothing was there to be found."""
    return 2 * tp / (2 * tp + fp + fn) if tp + fn > 0 else None


def flatten_rows(values: NDArray[Any]) -> NDArray[Any]:
    """[N, ...] or [N] as [N, values]."""
    return values.reshape(len(values), math.prod(values.shape[1:]))


def check_not_nan(predicted: NDArray[Any]) -> None:
    """`predicted` [N, ...]. Raises ConsiliumError."""
    if lost := int(np.isnan(flatten_rows(predicted)).any(1).sum()):
        scans = f"{lost} of {len(predicted)} scans"
        raise ConsiliumError(
            f"the model's output is not a number for {scans}: training diverged, lower the learning rate"
        )


def divide_or_none(numerator: float, denominator: float) -> float | None:
    """None where there is nothing to take a part of."""
    return numerator / denominator if denominator > 0 else None
