"""Masks measured from sums (as in common/learning/metrics.py): how well they fit, and how the severity read from them agrees with the known one.

For a segmentation a centre sends the seven sums of `overlap_sums`, and for the rank agreement of two severities their *joint* histogram,
float64 [P, T], in bins that are the same everywhere.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.learning.metrics import (
    NO_LABELLED_SCANS,
    Array,
    Metrics,
    check_not_nan,
    compute_f1,
    divide_or_none,
    flatten_rows,
)

# Bins of a predicted share in [0, 1], narrow where most scans are: near 0.
AFFECTED_FRACTION_EDGES = np.linspace(0, 1, 65) ** 2
# Bins of a severity known on whatever scale the hospital has: log(1 + 10 v) in equal steps up to v = 100. Keeps the integers 0 to 18 apart
# (grades of 0 to 4, Brixia's score), tells per cents to a twentieth of their value, and leaves a share in [0, 1] 44 bins.
SEVERITY_EDGES = np.expm1(np.linspace(0, np.log1p(1000), 129)) / 10


def compute_overlap_sums(predicted: NDArray[Any], mask: NDArray[np.uint8], threshold: float = 0.5) -> Array:
    """[7]: scans with a mask, sum of their Dice, pixels true positive, false positive, false negative, scans whose mask is not empty, sum of
    their Dice.

    `predicted` [N, ...]: bool, or a probability that is called from `cut` on. `mask` [N, ...]: 0, 1, or 255 for a pixel of which nothing is
    known, which counts nowhere; a scan of only such has no mask. Dice = 2 tp / (2 tp + fp + fn), 1 where nothing was there and nothing found.
    Raises ConsiliumError where a scan with a mask has a prediction that is not a number.
    """
    known = flatten_rows(mask != 255)
    kept = known.any(1)
    known, true, called = (
        known[kept],
        flatten_rows(mask == 1)[kept],
        flatten_rows(np.asarray(predicted))[kept],
    )
    if called.dtype != bool:
        check_not_nan(called)
        called = called >= threshold
    tp, fp, fn = (
        (a & b & known).sum(1, dtype=np.float64)
        for a, b in ((called, true), (called, ~true), (~called, true))
    )
    size = 2 * tp + fp + fn
    dice = np.where(size > 0, 2 * tp / np.maximum(size, 1), 1.0)
    affected = tp + fn > 0
    return np.array(
        [len(dice), dice.sum(), tp.sum(), fp.sum(), fn.sum(), affected.sum(), dice[affected].sum()],
        np.float64,
    )


def compute_overlap_metrics(sums: Array) -> Metrics:
    """`dice`: mean over scans with a mask; `dice_affected`: over those whose mask is not empty; the others of all their pixels together.

    `n` and `positives` (mask not empty) are scans.
    """
    n, dice, tp, fp, fn, affected, dice_affected = map(float, sums)
    return {
        "n": n,
        "positives": affected,
        "dice": divide_or_none(dice, n),
        "dice_affected": divide_or_none(dice_affected, affected),
        "dice_pixels": compute_f1(tp, fp, fn),
        "sensitivity": divide_or_none(tp, tp + fn),
        "precision": divide_or_none(tp, tp + fp)
        if affected
        else None,  # else it would be 0 whatever the model
    }


def explain_undefined_overlap(sums: Array) -> dict[str, str]:
    """Why a metric of `overlap_metrics` is None: {metric: reason}."""
    n, affected = float(sums[0]), float(sums[5])
    why = (
        NO_LABELLED_SCANS
        if not n
        else f"all masks are empty ({n:.0f} scans)"
        if not affected
        else "no pixel was called affected"
    )
    return {name: why for name, value in compute_overlap_metrics(sums).items() if value is None}


# --- severity -------------------------------------------------------------------------------------------------------------------------


def compute_joint_histogram(a: NDArray[Any], b: NDArray[Any], edges_a: Array, edges_b: Array) -> Array:
    """Counts of scans by (bin of `a`, bin of `b`), [P, T], from two numbers each [N] and their bins' edges [P + 1], [T + 1].

    What lies beyond the edges falls into the outer bins; a scan with a NaN in either is dropped.
    """
    a, b = np.asarray(a, np.float64).ravel(), np.asarray(b, np.float64).ravel()
    known = ~(np.isnan(a) | np.isnan(b))
    joint = np.zeros((len(edges_a) - 1, len(edges_b) - 1))
    np.add.at(
        joint,
        tuple(np.searchsorted(e[1:-1], x[known], side="right") for e, x in ((edges_a, a), (edges_b, b))),
        1,
    )
    return joint


def compute_spearman(joint: Array) -> float | None:
    """Spearman's rho of the binned numbers: the correlation of their mid-ranks. None unless each takes two different values."""
    counts_a, counts_b = joint.sum(1), joint.sum(0)
    n = counts_a.sum()
    # The mean rank is (n + 1) / 2 with ties and without; measured from there, a bin's ranks are the scans below less those above.
    ranks_a, ranks_b = (np.cumsum(c) - (c + n) / 2 for c in (counts_a, counts_b))
    whole = math.sqrt(float(counts_a @ ranks_a**2) * float(counts_b @ ranks_b**2))
    return float(ranks_a @ joint @ ranks_b) / whole if whole > 0 else None


def explain_undefined_spearman(joint: Array) -> str:
    """Why `spearman` is None; empty where it is not."""
    if compute_spearman(joint) is not None:
        return ""
    n = joint.sum()
    return (
        f"the known or the predicted severity is the same for all {n:.0f} scans"
        if n > 1
        else f"severity is known of {n:.0f} scans"
    )
