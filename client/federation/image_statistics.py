"""Describe a centre's images by sums over scans: position of the slices, area of the lungs, intensity.

A scan adds 1 to a histogram, divided among the bins that its slices or pixels fall into.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.data.dataset import ScanDataset
from client.federation.query_context import QueryContext
from client.imaging.slice_store import SliceStore
from client.site.small_cells import suppress_small_bins
from common.protocol.image_statistics import IMAGE_STATISTICS
from common.protocol.messages import Sums
from common.protocol.sum_key import SumKey

Floats = NDArray[np.float64]
STATISTICS_TASK = "quality"  # in the place of a task in the sums' keys
PIXELS_PER_BIN = 8  # grey values that share a bin of the intensity histogram


def sum_image_statistics(context: QueryContext) -> Sums:
    """Sum the histograms of the scans of all splits."""
    return compute_image_statistics(context.datasets, context.slice_stores, context.min_scans)


def compute_image_statistics(
    datasets: Mapping[str, ScanDataset], stores: Mapping[str, SliceStore], min_scans: int
) -> Sums:
    """Return {SumKey: [bins]} over all scans, without statistics of fewer than `min_scans` scans."""
    histograms: defaultdict[SumKey, list[Floats]] = defaultdict(list)
    for dataset in datasets.values():
        for cohort, key, slices in zip(dataset.centres, dataset.store_keys, dataset.slices, strict=True):
            metadata = stores[cohort].read_metadata(key)
            for name, histogram in scan_statistics(slices, metadata).items():
                histograms[SumKey(cohort, STATISTICS_TASK, name)].append(histogram)
    sums: Sums = {}
    for sum_key in sorted(histograms):
        rows = histograms[sum_key]
        if len(rows) >= min_scans:
            sums[str(sum_key)] = suppress_small_bins(np.stack(rows), min_scans)
    return sums


def scan_statistics(slices: NDArray[np.uint8], metadata: Mapping[str, Any]) -> dict[str, Floats]:
    """Return {statistic: [bins] that sum to 1} of slices [S, H, W] and what the slice store noted of them.

    A radiograph has an intensity only. A store of an early version has no lung areas.
    """
    num_bins = len(IMAGE_STATISTICS["intensity"].bin_edges) - 1
    pixels = np.bincount(slices.ravel() // PIXELS_PER_BIN, minlength=num_bins)
    statistics = {"intensity": pixels / pixels.sum()}
    if metadata.get("modality") == "CT":
        last_slice = max(1, metadata["scan"][0] - 1)
        positions = np.array(metadata["indices"]) / last_slice
        statistics["position"] = _normalised_histogram("position", positions)
        if "areas" in metadata:
            square_centimetres = np.array(metadata["areas"]) / 100
            statistics["area"] = _normalised_histogram("area", square_centimetres)
    return statistics


def _normalised_histogram(statistic: str, values: Floats) -> Floats:
    edges = IMAGE_STATISTICS[statistic].bin_edges
    counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
    return np.asarray(counts / len(values))
