"""Suppress numbers that too few patients make up: counts, tables, histograms and sums.

Every function takes the smallest number of scans that may be reported. It is so large that it surely stands
for enough patients (`min_scans_of_patients` in client/federation/released_data.py).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from common.learning.segmentation_metrics import OverlapSums
from common.protocol.messages import Sums
from common.protocol.sum_key import SumKey

Floats = NDArray[np.float64]


def raise_small_counts(counts: Floats, min_count: int) -> Floats:
    """Return counts in which one above 0 and below `min_count` stands as `min_count`."""
    is_small = (counts > 0) & (counts < min_count)
    return np.where(is_small, min_count, counts)


def suppress_small_cells(sums: Sums, min_count: int) -> Sums:
    """Return the sums of a query without what fewer than `min_count` scans make up.

    Cells of a table and bins of a histogram are rounded to multiples of `min_count`, so that the difference
    of two answers about the same scans shows no few of them either; other sums are set to zero.
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
    if statistic == "confusion":
        return np.stack([round_cells(row, min_count) for row in values])
    if statistic == "joint":
        return _merge_whole_groups(values, min_count)
    if statistic == "overlap":
        return _suppress_overlap(values, min_count)
    if statistic in ("regression", "loss"):
        num_scans = values[0] if statistic == "regression" else values[1]
        return values if num_scans >= min_count else np.zeros_like(values)
    return values


def _suppress_overlap(values: Floats, min_count: int) -> Floats:
    """Return the sums of masks (`OverlapSums`) with a rounded number of scans whose mask is not empty."""
    sums = OverlapSums(*map(float, values))
    if sums.scans < min_count:
        return np.zeros_like(values)
    affected, _ = round_cells(np.array([sums.affected_scans, sums.scans - sums.affected_scans]), min_count)
    mean_dice = sums.dice_affected / sums.affected_scans if sums.affected_scans else 0.0
    rounded = sums._replace(affected_scans=float(affected), dice_affected=mean_dice * float(affected))
    return np.array(rounded, np.float64)


def _merge_whole_groups(table: Floats, min_count: int) -> Floats:
    """Return a joint histogram as `merge_small_bins`, less the scans beyond a multiple of `min_count`.

    How many scans have both values is no count of the release book's groups, and must not be exact.
    """
    merged = merge_small_bins(table.ravel(), min_count)
    excess = merged.sum() % min_count
    if excess:
        merged[merged.argmax()] -= excess
    return merged.reshape(table.shape)


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
    """Return a histogram [bins] of groups of `min_count` scans, each in the bin of its median scan.

    Scans are grouped in the order of their bins; those beyond a multiple of `min_count` belong to the last
    group. A histogram of fewer scans in all is emptied.
    """
    merged = np.zeros_like(counts)
    bin_of_scan = np.repeat(np.arange(len(counts)), counts.astype(int))
    num_groups = len(bin_of_scan) // min_count
    for group in range(num_groups):
        end = (group + 1) * min_count
        if group == num_groups - 1:
            end = len(bin_of_scan)
        bins = bin_of_scan[group * min_count : end]
        merged[bins[len(bins) // 2]] += len(bins)
    return merged


def round_cells(counts: Floats, min_count: int) -> Floats:
    """Return cells [n] rounded to multiples of `min_count`, with the same sum.

    Cells are rounded down, and what is missing goes to the cells with the largest remainders (Hamilton's
    method). Scans beyond a multiple of `min_count` are added to the largest cell. Where there are fewer scans
    in all, every cell is emptied.
    """
    total = float(counts.sum())
    num_groups = int(total // min_count)
    if not num_groups:
        return np.zeros_like(counts)
    quotas = counts * (num_groups / total)
    groups = np.floor(quotas + 1e-9)
    num_missing = num_groups - int(groups.sum())
    largest_remainders = np.argsort(groups - quotas, kind="stable")
    groups[largest_remainders[:num_missing]] += 1
    rounded = groups * min_count
    rounded[rounded.argmax()] += total - num_groups * min_count
    return np.asarray(rounded)


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
