"""Performance from sums: everything the coordinator knows about how well a model does is additive over centres.

For a binary task a centre sends a *histogram*, float64 [2, bins]: how many scans of each true class (row 0 negative, row 1 positive) got a
score in each bin. For a multiclass task it sends the *confusion*, float64 [K, K], rows true, columns predicted. Both are counts, so the
pooled one is the plain sum, and no scan's own score leaves its hospital. Bins are uniform in logit space over [-8, 8] (scores beyond fall
into the outer bins); their number is even, so that probability 0.5 is an edge and the metrics at that threshold are exact. The AUC counts
ties half: it differs from the one over raw scores by at most half the share of (positive, negative) pairs that share a bin.

For a regression it sends the nine sums of `regression_sums`, for a segmentation the seven of `overlap_sums`, and for the rank agreement of
two numbers their *joint* histogram, float64 [P, T], in bins that are the same everywhere.

A metric that is not defined is None, never 0 and never 0.5, and `reasons` says why.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from common.errors import ConsiliumError

Array = NDArray[np.float64]
Metrics = dict[str, float | None]

LIMIT = 8.0  # logits; beyond it a probability is within 0.0004 of 0 or 1
COUNTS = ("n", "positives")  # of a metrics dict: sizes, not performance; a mean or a worst of them says nothing
LOWER_IS_BETTER = ("ece", "brier", "mae", "rmse", "loss")
LEADING = ("auc", "balanced_accuracy", "accuracy", "dice", "r2", "mae", "loss")  # the first that a task has speaks for it
UNLABELLED = "no labelled scans"

# Bins of a predicted share in [0, 1], narrow where most scans are: near 0.
SHARE_EDGES = np.linspace(0, 1, 65) ** 2
# Bins of a severity known on whatever scale the hospital has: log(1 + 10 v) in equal steps up to v = 100. Keeps the integers 0 to 18 apart
# (grades of 0 to 4, Brixia's score), tells per cents to a twentieth of their value, and leaves a share in [0, 1] 44 bins.
SEVERITY_EDGES = np.expm1(np.linspace(0, np.log1p(1000), 129)) / 10


def edges(bins: int) -> Array:
    """The bins' edges, [bins + 1] logits. Raises ConsiliumError for an odd number of bins."""
    if bins < 2 or bins % 2:
        raise ConsiliumError(f"a score histogram cannot have {bins} bins: take an even number, so that probability 0.5 is an edge")
    return np.linspace(-LIMIT, LIMIT, bins + 1)


def histogram(logits: NDArray[Any], targets: NDArray[Any], bins: int = 256) -> Array:
    """Counts of scans by (true class, score bin), [2, bins].

    `logits` [N]; `targets` [N] in {0, 1}, or NaN where a scan has no label for the task: such scans are dropped. A score on an edge
    counts as above it, like `probability >= threshold`. Raises ConsiliumError where a labelled scan's score is NaN.
    """
    inner = edges(bins)[1:-1]
    scores, truth = np.asarray(logits, np.float64).ravel(), np.asarray(targets, np.float64).ravel()
    labelled = ~np.isnan(truth)
    scores, truth = scores[labelled], truth[labelled]
    _refuse_nan(scores)
    where = np.searchsorted(inner, scores, side="right")
    return np.stack([np.bincount(where[truth == label], minlength=bins) for label in (0, 1)]).astype(np.float64)


def binary_metrics(hist: Array, threshold: float = 0.5) -> Metrics:
    """All metrics of a binary task from its histogram [2, bins]; `threshold` is a probability, moved to the nearest bin edge.

    `n` and `positives` are scans; `ece` is the expected calibration error over 10 equal groups of probability, `brier` the mean squared
    error; both take a bin's middle for its scans' score. F1, sensitivity and precision are those of the positive class.
    """
    (tn, fn), (fp, tp) = _outcomes(hist, threshold)
    negatives, positives = tn + fp, fn + tp
    sensitivity, specificity = _ratio(tp, positives), _ratio(tn, negatives)
    predicted, observed, n = calibration(hist)
    probability = _probability(hist)
    return {
        "n": negatives + positives,
        "positives": positives,
        "auc": _auc(hist),
        "f1": _f1(tp, fp, fn),
        "sensitivity": sensitivity,
        "specificity": specificity,
        "precision": _ratio(tp, tp + fp) if negatives and positives else None,  # with one class it would be 0 or 1 whatever the model
        "balanced_accuracy": None if sensitivity is None or specificity is None else (sensitivity + specificity) / 2,
        "gmean": None if sensitivity is None or specificity is None else math.sqrt(sensitivity * specificity),
        "accuracy": _ratio(tp + tn, negatives + positives),
        "ece": _ratio(float((n * np.abs(predicted - observed)).sum()), negatives + positives),
        "brier": _ratio(float((hist[0] * probability**2 + hist[1] * (1 - probability) ** 2).sum()), negatives + positives),
    }


def reasons(hist: Array, threshold: float = 0.5) -> dict[str, str]:
    """Why a metric of `binary_metrics` is None: {metric: reason}; empty where all are defined."""
    (tn, fn), (fp, tp) = _outcomes(hist, threshold)
    if tn + fn + fp + tp == 0:
        why = UNLABELLED
    elif fn + tp == 0:
        why = f"one class only (no positive scan among {tn + fp:.0f})"
    elif tn + fp == 0:
        why = f"one class only (no negative scan among {fn + tp:.0f})"
    else:
        why = ""
    undefined = [name for name, value in binary_metrics(hist, threshold).items() if value is None]
    return {name: why or "no scan was called positive" for name in undefined}


def multiclass_metrics(confusion: Array) -> Metrics:
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
        "accuracy": _ratio(float(right.sum()), float(true.sum())),
        "balanced_accuracy": float(recalls.mean()) if several else None,
        "gmean": float(recalls.prod() ** (1 / len(recalls))) if several else None,
        "f1": float((2 * right[present] / (true + predicted)[present]).mean()) if several else None,
    }


def multiclass_reasons(confusion: Array) -> dict[str, str]:
    """Why a metric of `multiclass_metrics` is None: {metric: reason}."""
    n = confusion.sum()
    why = f"one class only ({n:.0f} scans)" if n else UNLABELLED
    return {name: why for name, value in multiclass_metrics(confusion).items() if value is None}


# --- regression -----------------------------------------------------------------------------------------------------------------------


def regression_sums(predicted: NDArray[Any], target: NDArray[Any]) -> Array:
    """[9]: scans, values, sum |e|, sum e^2, sum y, sum y^2, sum p, sum p^2, sum p y over the values of `predicted` p and `target` y [N, R].

    e = p - y. A row with a NaN among its targets is dropped. Raises ConsiliumError where a labelled scan's prediction is not a number.
    """
    p, y = _rows(np.asarray(predicted, np.float64)), _rows(np.asarray(target, np.float64))
    labelled = ~np.isnan(y).any(1)
    p, y = p[labelled], y[labelled]
    _refuse_nan(p)
    e = p - y
    return np.array([len(y), y.size, *(v.sum() for v in (np.abs(e), e**2, y, y**2, p, p**2, p * y))], np.float64)


def regression_metrics(sums: Array) -> Metrics:
    """Of all columns together: `mae` and `rmse` in the labels' unit, `r2` = 1 - sum e^2 / sum (y - mean y)^2, `pearson`'s correlation."""
    scans, n, absolute, squared, y, yy, p, pp, py = map(float, sums)
    spread_y, spread_p = _spread(n, y, yy), _spread(n, p, pp)
    return {
        "n": scans,
        "mae": _ratio(absolute, n),
        "rmse": math.sqrt(squared / n) if n else None,
        "r2": 1 - squared / spread_y if spread_y else None,
        "pearson": (py - p * y / n) / math.sqrt(spread_y * spread_p) if spread_y and spread_p else None,
    }


def regression_reasons(sums: Array) -> dict[str, str]:
    """Why a metric of `regression_metrics` is None: {metric: reason}."""
    _, n, _, _, y, yy, *_ = map(float, sums)
    why = UNLABELLED if not n else "the labels are all the same" if not _spread(n, y, yy) else "the predictions are all the same"
    return {name: why for name, value in regression_metrics(sums).items() if value is None}


def _spread(n: float, total: float, squares: float) -> float:
    """sum (x - mean x)^2; exactly 0 where only rounding is left of it."""
    spread = squares - total**2 / n if n else 0.0
    return spread if spread > 1e-12 * squares else 0.0


# --- segmentation ---------------------------------------------------------------------------------------------------------------------


def overlap_sums(predicted: NDArray[Any], mask: NDArray[np.uint8], cut: float = 0.5) -> Array:
    """[7]: scans with a mask, sum of their Dice, pixels true positive, false positive, false negative, scans whose mask is not empty, sum of
    their Dice.

    `predicted` [N, ...]: bool, or a probability that is called from `cut` on. `mask` [N, ...]: 0, 1, or 255 for a pixel of which nothing is
    known, which counts nowhere; a scan of only such has no mask. Dice = 2 tp / (2 tp + fp + fn), 1 where nothing was there and nothing found.
    Raises ConsiliumError where a scan with a mask has a prediction that is not a number.
    """
    known = _rows(mask != 255)
    kept = known.any(1)
    known, true, called = known[kept], _rows(mask == 1)[kept], _rows(np.asarray(predicted))[kept]
    if called.dtype != bool:
        _refuse_nan(called)
        called = called >= cut
    tp, fp, fn = ((a & b & known).sum(1, dtype=np.float64) for a, b in ((called, true), (called, ~true), (~called, true)))
    size = 2 * tp + fp + fn
    dice = np.where(size > 0, 2 * tp / np.maximum(size, 1), 1.0)
    affected = tp + fn > 0
    return np.array([len(dice), dice.sum(), tp.sum(), fp.sum(), fn.sum(), affected.sum(), dice[affected].sum()], np.float64)


def overlap_metrics(sums: Array) -> Metrics:
    """`dice`: mean over scans with a mask; `dice_affected`: over those whose mask is not empty; the others of all their pixels together.

    `n` and `positives` (mask not empty) are scans.
    """
    n, dice, tp, fp, fn, affected, dice_affected = map(float, sums)
    return {
        "n": n,
        "positives": affected,
        "dice": _ratio(dice, n),
        "dice_affected": _ratio(dice_affected, affected),
        "dice_pixels": _f1(tp, fp, fn),
        "sensitivity": _ratio(tp, tp + fn),
        "precision": _ratio(tp, tp + fp) if affected else None,  # else it would be 0 whatever the model
    }


def overlap_reasons(sums: Array) -> dict[str, str]:
    """Why a metric of `overlap_metrics` is None: {metric: reason}."""
    n, affected = float(sums[0]), float(sums[5])
    why = UNLABELLED if not n else f"all masks are empty ({n:.0f} scans)" if not affected else "no pixel was called affected"
    return {name: why for name, value in overlap_metrics(sums).items() if value is None}


# --- rank agreement -------------------------------------------------------------------------------------------------------------------


def joint_histogram(a: NDArray[Any], b: NDArray[Any], edges_a: Array, edges_b: Array) -> Array:
    """Counts of scans by (bin of `a`, bin of `b`), [P, T], from two numbers each [N] and their bins' edges [P + 1], [T + 1].

    What lies beyond the edges falls into the outer bins; a scan with a NaN in either is dropped.
    """
    a, b = np.asarray(a, np.float64).ravel(), np.asarray(b, np.float64).ravel()
    known = ~(np.isnan(a) | np.isnan(b))
    joint = np.zeros((len(edges_a) - 1, len(edges_b) - 1))
    np.add.at(joint, tuple(np.searchsorted(e[1:-1], x[known], side="right") for e, x in ((edges_a, a), (edges_b, b))), 1)
    return joint


def spearman(joint: Array) -> float | None:
    """Spearman's rho of the binned numbers: the correlation of their mid-ranks. None unless each takes two different values."""
    counts_a, counts_b = joint.sum(1), joint.sum(0)
    n = counts_a.sum()
    # The mean rank is (n + 1) / 2 with ties and without; measured from there, a bin's ranks are the scans below less those above.
    ranks_a, ranks_b = (np.cumsum(c) - (c + n) / 2 for c in (counts_a, counts_b))
    whole = math.sqrt(float(counts_a @ ranks_a**2) * float(counts_b @ ranks_b**2))
    return float(ranks_a @ joint @ ranks_b) / whole if whole > 0 else None


def spearman_reason(joint: Array) -> str:
    """Why `spearman` is None; empty where it is not."""
    if spearman(joint) is not None:
        return ""
    n = joint.sum()
    return f"the known or the predicted severity is the same for all {n:.0f} scans" if n > 1 else f"severity is known of {n:.0f} scans"


# --- tasks without labels -------------------------------------------------------------------------------------------------------------


def loss_metrics(sums: Array) -> Metrics:
    """Of a task whose loss is all that is measured: {n, loss} from [2] = (summed loss, scans)."""
    summed, n = map(float, sums)
    return {"n": n, "loss": _ratio(summed, n)}


def loss_reasons(sums: Array) -> dict[str, str]:
    """Why the loss is None: {"loss": reason}, or empty."""
    return {} if sums[1] else {"loss": "no scans"}


# --- over centres ---------------------------------------------------------------------------------------------------------------------


def summary(per_centre: Mapping[str, Mapping[str, float | None]], pooled: Mapping[str, float | None]) -> dict[str, dict[str, Any]]:
    """Centres' metrics in four views, each by metric name; centres where a metric is undefined do not count for it.

    `macro`: mean over centres; `pooled`: metrics of the summed sums, as given; `worst`: {"value", "centre"}, the largest where lower is
    better (LOWER_IS_BETTER), else the smallest; `spread`: largest less smallest. None where no centre has the metric.
    """
    views: dict[str, dict[str, Any]] = {"macro": {}, "pooled": dict(pooled), "worst": {}, "spread": {}}
    for name in (name for name in pooled if name not in COUNTS):
        known = sorted((value, centre) for centre, values in per_centre.items() if (value := values.get(name)) is not None)
        # fsum is exact: the same mean in whatever order the centres replied
        views["macro"][name] = math.fsum(value for value, _ in known) / len(known) if known else None
        value, centre = (max(known, key=lambda pair: pair[0]) if name in LOWER_IS_BETTER else known[0]) if known else (None, None)
        views["worst"][name] = {"value": value, "centre": centre}
        views["spread"][name] = known[-1][0] - known[0][0] if known else None
    return views


def leading(chosen: str, known: Collection[str]) -> str:
    """The metric that speaks for a task with the metrics `known`: the one that a run was judged by, or else the first of LEADING."""
    return chosen if chosen in known else next((name for name in LEADING if name in known), chosen)


def challenge_score(hists: Iterable[Array], threshold: float = 0.5, absent: Literal["zero", "skip"] = "skip") -> float | None:
    """Mean over sources of (F1 of positives + F1 of negatives) / 2: the multi-source challenge's score (arXiv 2604.03320).

    `hists`: one histogram [2, bins] a source. A class that a source does not have counts as F1 = 0 (`zero`, the challenge's own rule,
    which caps the score) or is left out of that source's mean (`skip`). A source without scans is left out; None when all are.
    """
    scores = []
    for hist in hists:
        (tn, fn), (fp, tp) = _outcomes(hist, threshold)
        f1 = [value for value in (_f1(tp, fp, fn), _f1(tn, fn, fp)) if value is not None]
        if f1:
            scores.append(math.fsum(f1) / (len(f1) if absent == "skip" else 2))
    return math.fsum(scores) / len(scores) if scores else None


def roc(hist: Array) -> tuple[Array, Array]:
    """The curve's (false positive rate, true positive rate), from (0, 0) to (1, 1); both empty with one class only."""
    negatives, positives = hist.sum(1)
    if negatives == 0 or positives == 0:
        return np.zeros(0), np.zeros(0)
    filled = hist[:, hist.sum(0) > 0]  # an empty bin adds no point
    fpr, tpr = np.concatenate([np.zeros((2, 1)), np.cumsum(filled[:, ::-1], axis=1)], axis=1) / hist.sum(1, keepdims=True)
    return fpr, tpr


def calibration(hist: Array, groups: int = 10) -> tuple[Array, Array, Array]:
    """(mean predicted probability, observed share of positives, scans) of each non-empty group of equal width in probability."""
    probability = _probability(hist)
    group = np.minimum((probability * groups).astype(int), groups - 1)
    n = np.bincount(group, hist.sum(0), groups).astype(np.float64)
    predicted, positives = np.bincount(group, hist.sum(0) * probability, groups), np.bincount(group, hist[1], groups)
    kept = n > 0
    return predicted[kept] / n[kept], positives[kept] / n[kept], n[kept]


def _probability(hist: Array) -> Array:
    """Of each bin's middle, [bins]."""
    sides = edges(hist.shape[1])
    return np.asarray(1 / (1 + np.exp(-(sides[:-1] + sides[1:]) / 2)))


def _outcomes(hist: Array, threshold: float) -> tuple[tuple[float, float], tuple[float, float]]:
    """Scans as ((true negatives, false negatives), (false positives, true positives)): below the threshold, then at or above it."""
    bins = hist.shape[1]
    cut = round((math.log(threshold / (1 - threshold)) + LIMIT) / (2 * LIMIT) * bins)
    cut = min(max(cut, 0), bins)
    below, above = hist[:, :cut].sum(1), hist[:, cut:].sum(1)
    return (float(below[0]), float(below[1])), (float(above[0]), float(above[1]))


def _auc(hist: Array) -> float | None:
    """P(score of a positive > score of a negative), ties half (Mann-Whitney)."""
    negatives, positives = hist
    below = np.cumsum(negatives) - negatives
    return _ratio(float((positives * (below + negatives / 2)).sum()), float(negatives.sum() * positives.sum()))


def _f1(tp: float, fp: float, fn: float) -> float | None:
    """Undefined where the class has no scans, even though false alarms alone would make it 0: nothing was there to be found."""
    return 2 * tp / (2 * tp + fp + fn) if tp + fn > 0 else None


def _rows(values: NDArray[Any]) -> NDArray[Any]:
    """[N, ...] or [N] as [N, values]."""
    return values.reshape(len(values), math.prod(values.shape[1:]))


def _refuse_nan(predicted: NDArray[Any]) -> None:
    """`predicted` [N, ...]. Raises ConsiliumError."""
    if lost := int(np.isnan(_rows(predicted)).any(1).sum()):
        raise ConsiliumError(
            f"the model's output is not a number for {lost} of {len(predicted)} scans: training diverged, lower the learning rate"
        )


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole > 0 else None
