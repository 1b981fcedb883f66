"""Compute metrics of masks, and of severities read from masks, from sums that are additive over centres.

For a segmentation a centre sends seven sums (`OverlapSums`). For the rank agreement of predicted and known
severity it sends their joint histogram, float64 [P, T], in bins that are the same at every centre.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.learning.metrics.shared import (
    NO_LABELLED_SCANS,
    Array,
    Metrics,
    check_not_nan,
    compute_f1,
    divide_or_none,
    flatten_rows,
    undefined_names,
)

UNKNOWN_PIXEL = 255  # in a mask; such pixels count nowhere

# Bins of a predicted fraction in [0, 1], narrow near 0 where most scans are.
AFFECTED_FRACTION_EDGES = np.linspace(0, 1, 65) ** 2
# Bins of a known severity on any scale: log(1 + 10 v) in equal steps up to v = 100. They keep the integers 0
# to 18 apart (grades of 0 to 4, the Brixia score), resolve percentages to a twentieth of their value, and
# leave 44 bins for a fraction in [0, 1].
SEVERITY_EDGES = np.expm1(np.linspace(0, np.log1p(1000), 129)) / 10


class OverlapSums(NamedTuple):
    """Sums over the scans that have a mask, in the order of the array [7]."""

    scans: float
    dice: float
    tp: float  # pixels
    fp: float  # pixels
    fn: float  # pixels
    affected_scans: float  # scans whose mask is not empty
    dice_affected: float  # sum of the Dice of those scans


def compute_overlap_sums(predicted: NDArray[Any], mask: NDArray[np.uint8], threshold: float = 0.5) -> Array:
    """Compute the sums [7], in the order of `OverlapSums`, of predictions and masks [N, ...].

    Dice = 2 tp / (2 tp + fp + fn), and 1 where the mask is empty and nothing is predicted.

    Args:
        predicted: bool, or probabilities.
        mask: 0, 1, or 255 for an unknown pixel. A scan with unknown pixels only has no mask.
        threshold: the probability from which a pixel is predicted as affected.

    Raises:
        ConsiliumError: The prediction for a scan with a mask is NaN.
    """
    has_label = flatten_rows(mask != UNKNOWN_PIXEL)
    has_mask = has_label.any(1)
    has_label = has_label[has_mask]
    true = flatten_rows(mask == 1)[has_mask]
    called = flatten_rows(np.asarray(predicted))[has_mask]
    if called.dtype != bool:
        check_not_nan(called)
        called = called >= threshold

    tp = _count_pixels(called & true & has_label)
    fp = _count_pixels(called & ~true & has_label)
    fn = _count_pixels(~called & true & has_label)
    size = 2 * tp + fp + fn
    dice = np.where(size > 0, 2 * tp / np.maximum(size, 1), 1.0)
    affected = tp + fn > 0
    sums = OverlapSums(
        scans=len(dice),
        dice=dice.sum(),
        tp=tp.sum(),
        fp=fp.sum(),
        fn=fn.sum(),
        affected_scans=affected.sum(),
        dice_affected=dice[affected].sum(),
    )
    return np.array(sums, np.float64)


def _count_pixels(pixels: NDArray[np.bool_]) -> Array:
    """Return the number of True pixels in each row."""
    return np.asarray(pixels.sum(1, dtype=np.float64))


def compute_overlap_metrics(sums: Array) -> Metrics:
    """Compute metrics from overlap sums [7].

    `n` and `positives` (mask not empty) count scans. `dice` is the mean over scans with a mask,
    `dice_affected` the mean over those whose mask is not empty. The other metrics are of all pixels together.
    """
    totals = OverlapSums(*map(float, sums))
    precision = None
    if totals.affected_scans:  # with empty masks only, it would be 0 for any model
        precision = divide_or_none(totals.tp, totals.tp + totals.fp)
    return {
        "n": totals.scans,
        "positives": totals.affected_scans,
        "dice": divide_or_none(totals.dice, totals.scans),
        "dice_affected": divide_or_none(totals.dice_affected, totals.affected_scans),
        "dice_pixels": compute_f1(totals.tp, totals.fp, totals.fn),
        "sensitivity": divide_or_none(totals.tp, totals.tp + totals.fn),
        "precision": precision,
    }


def explain_undefined_overlap(sums: Array) -> dict[str, str]:
    """Return {metric: reason} for the metrics of `compute_overlap_metrics` that are None."""
    totals = OverlapSums(*map(float, sums))
    if not totals.scans:
        reason = NO_LABELLED_SCANS
    elif not totals.affected_scans:
        reason = f"all masks are empty ({totals.scans:.0f} scans)"
    else:
        reason = "no pixel was predicted as affected"
    return dict.fromkeys(undefined_names(compute_overlap_metrics(sums)), reason)


# --- severity ---------------------------------------------------------------------------------------------


def compute_joint_histogram(a: NDArray[Any], b: NDArray[Any], edges_a: Array, edges_b: Array) -> Array:
    """Count scans by (bin of `a`, bin of `b`), [P, T], from two values per scan, [N] each.

    Values beyond the edges [P + 1] and [T + 1] fall into the outer bins; a scan with a NaN is dropped.
    """
    a = np.asarray(a, np.float64).ravel()
    b = np.asarray(b, np.float64).ravel()
    has_both = ~(np.isnan(a) | np.isnan(b))
    bins_a = np.searchsorted(edges_a[1:-1], a[has_both], side="right")
    bins_b = np.searchsorted(edges_b[1:-1], b[has_both], side="right")
    joint = np.zeros((len(edges_a) - 1, len(edges_b) - 1))
    np.add.at(joint, (bins_a, bins_b), 1)
    return joint


def compute_spearman(joint: Array) -> float | None:
    """Return Spearman's rho of the binned values: the correlation of their mid-ranks.

    It is None when one of the two has the same value for all scans.
    """
    counts_a = joint.sum(1)
    counts_b = joint.sum(0)
    ranks_a = _centre_ranks(counts_a)
    ranks_b = _centre_ranks(counts_b)
    norm = math.sqrt(float(counts_a @ ranks_a**2) * float(counts_b @ ranks_b**2))
    return float(ranks_a @ joint @ ranks_b) / norm if norm > 0 else None


def _centre_ranks(counts: Array) -> Array:
    """Return each bin's mid-rank minus the mean rank, which is (n + 1) / 2 with ties and without."""
    return np.asarray(np.cumsum(counts) - (counts + counts.sum()) / 2)


def explain_undefined_spearman(joint: Array) -> str:
    """Return why `compute_spearman` is None, or "" when it is not."""
    if compute_spearman(joint) is not None:
        return ""
    scans = joint.sum()
    if scans > 1:
        return f"the known or the predicted severity is the same for all {scans:.0f} scans"
    return f"severity is known for {scans:.0f} scans"
