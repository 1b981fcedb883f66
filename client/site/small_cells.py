"""Suppress numbers that too few scans make up: counts, tables, histograms and sums.

Every function takes the smallest number of scans that may be reported.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from common.protocol.messages import Sums
from common.protocol.sum_key import SumKey

Floats = NDArray[np.float64]


def raise_small_counts(counts: Floats, min_count: int) -> Floats:
    """Return counts in which one above 0 and below `min_count` stands as `min_count`."""
    is_small = (counts > 0) & (counts < min_count)
    return np.where(is_small, min_count, counts)


def suppress_small_cells(sums: Sums, min_count: int) -> Sums:
    """Return the sums of a query without what fewer than `min_count` scans make up.

    Cells of a table are emptied, bins of a histogram joined with their neighbours, other sums set to zero.
    """
    if "n" in sums:
        return _suppress_small_groups(sums, min_count)
    return {
        key: _suppress_statistic(SumKey.parse(key).statistic, sum_, min_count) for key, sum_ in sums.items()
    }


def _suppress_statistic(statistic: str, values: Floats, min_count: int) -> Floats:
    """Return one of the sums that a model's scores consist of (common/learning/metrics/), suppressed."""
    if statistic == "hist":
        return np.stack([merge_small_bins(row, min_count) for row in values])
    if statistic in ("confusion", "joint"):
        return np.where(values < min_count, 0.0, values)
    if statistic in ("regression", "overlap"):
        num_scans = values[0]
    elif statistic == "loss":
        num_scans = values[1]
    else:
        return values
    return values if num_scans >= min_count else np.zeros_like(values)


def _suppress_small_groups(sums: Sums, min_count: int) -> Sums:
    """Return the sums over classes or clusters without those of small ones.

    `n` [K] counts the scans of each group; the other sums have a row for each, but for a matrix `square` [D,
    D] over all classes, which cannot be divided: where a class is small, nothing is reported.
    """
    counts = sums["n"]
    is_small = counts < min_count
    has_joint_matrix = "square" in sums and sums["square"].ndim == 2
    if has_joint_matrix and (counts > 0)[is_small].any():
        return {key: np.zeros_like(values) for key, values in sums.items()}
    suppressed: Sums = {}
    for key, values in sums.items():
        suppressed[key] = values
        if len(values) == len(is_small):
            suppressed[key] = np.where(is_small.reshape(-1, *[1] * (values.ndim - 1)), 0.0, values)
    return suppressed


def merge_small_bins(counts: Floats, min_count: int) -> Floats:
    """Return a histogram [bins] in which every filled bin holds at least `min_count` scans.

    Neighbouring bins are merged into the bin of their median scan. A histogram of fewer scans in all is
    emptied.
    """
    merged = np.zeros_like(counts)
    remaining = counts.sum()
    if remaining < min_count:
        return merged
    first_bin = 0
    group_size = 0.0
    for bin_index, count in enumerate(counts):
        group_size += count
        remaining -= count
        rest_is_reportable = remaining >= min_count or not remaining
        if group_size < min_count or not rest_is_reportable:
            continue
        bins = np.arange(first_bin, bin_index + 1)
        bin_of_scan = np.repeat(bins, counts[bins].astype(int))
        merged[bin_of_scan[len(bin_of_scan) // 2]] += group_size
        first_bin = bin_index + 1
        group_size = 0.0
    return merged


def suppress_small_bins(fractions: Floats, min_count: int) -> Floats:
    """Return the sum [bins] of scans' histograms [N, bins] without bins of fewer than `min_count` scans.

    What remains is scaled to a multiple of `min_count`, so that neither the bins left out nor the number of
    scans can be inferred from it.
    """
    scans_in_bin = (fractions > 0).sum(0)
    bins = np.where(scans_in_bin >= min_count, fractions.sum(0), 0.0)
    if not bins.any():
        return bins
    rounded_scans = len(fractions) // min_count * min_count
    return np.asarray(bins * (rounded_scans / bins.sum()))
