"""What the centre's data look like, as sums over scans: where slices were kept, how much lung they show, how bright they are.

A scan adds 1 to a histogram, divided among the bins that its slices or pixels fall into.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.data.dataset import ScanDataset
from client.imaging.slice_store import SliceStore
from common.protocol.image_statistics import IMAGE_STATISTICS
from common.protocol.messages import Sums

Floats = NDArray[np.float64]


def compute_image_statistics(
    datasets: Mapping[str, ScanDataset], stores: Mapping[str, SliceStore], min_cell_count: int
) -> Sums:
    """`cohort/quality/measure` -> [bins] over the scans of all splits; a measure that too few scans have is left out."""
    shares: dict[str, list[Floats]] = {}
    for scans in datasets.values():
        for cohort, key, slices in zip(scans.centres, scans.store_keys, scans.slices, strict=True):
            for measure, share in scan_statistics(slices, stores[cohort].read_metadata(key)).items():
                shares.setdefault(f"{cohort}/quality/{measure}", []).append(share)
    return {
        key: suppress_small_bins(np.stack(rows), min_cell_count)
        for key, rows in sorted(shares.items())
        if len(rows) >= min_cell_count
    }


def scan_statistics(slices: NDArray[np.uint8], metadata: Mapping[str, Any]) -> dict[str, Floats]:
    """{measure: [bins], sum 1} of slices [S, H, W] and what the store noted beside them; a radiograph has neither areas nor places."""
    pixels = np.bincount(slices.ravel() >> 3, minlength=len(IMAGE_STATISTICS["intensity"].bin_edges) - 1)
    found = {"intensity": pixels / pixels.sum()}
    if metadata.get("modality") == "CT":
        found["position"] = _normalised_histogram(
            "position", np.array(metadata["indices"]) / max(1, metadata["scan"][0] - 1)
        )
        if "areas" in metadata:  # an earlier version did not note them
            found["area"] = _normalised_histogram("area", np.array(metadata["areas"]) / 100)
    return found


def _normalised_histogram(measure: str, values: Floats) -> Floats:
    edges = IMAGE_STATISTICS[measure].bin_edges
    return np.asarray(np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] / len(values))


def suppress_small_bins(rows: Floats, min_count: int) -> Floats:
    """The sum [bins] of scans' shares [N, bins] without bins that fewer than `least` scans fall into. What is left is scaled to a multiple of
    `least`: neither the bins left out nor the number of scans can be told from it."""
    bins = np.where((rows > 0).sum(0) >= min_count, rows.sum(0), 0.0)
    return bins * (len(rows) // min_count * min_count / bins.sum()) if bins.any() else bins
