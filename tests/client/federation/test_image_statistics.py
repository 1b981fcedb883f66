"""Histograms of images: each scan counts once in each."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from client.data.dataset import ScanDataset
from client.federation.image_statistics import compute_image_statistics, scan_statistics
from client.imaging.slice_store import SliceStore


def test_scan_adds_one_to_each_of_its_histograms(tmp_path: Path) -> None:
    store = SliceStore(tmp_path)
    slices = np.zeros((2, 4, 4), np.uint8)
    slices[1] = 255
    store.put(
        "ab", slices, {"indices": [0, 40], "areas": [0, 25_000], "scan": [41, 64, 64], "modality": "CT"}
    )
    store.put("cd", slices[:1], {"indices": [0], "areas": [0], "scan": [1, 64, 64], "modality": "XR"})
    dataset = ScanDataset([slices, slices[:1]], {}, ["a", "a"], store_keys=["ab", "cd"])
    sums = compute_image_statistics({"train": dataset}, {"a": store}, 1)
    assert sums["a/quality/area"][[0, 12]].tolist() == [0.5, 0.5]  # 0 and 250 cm2, bins of 20 cm2
    assert sums["a/quality/position"][[0, 19]].tolist() == [0.5, 0.5]  # the first and the last slice
    assert sums["a/quality/intensity"][[0, 31]].tolist() == [1.5, 0.5]
    totals = {key: float(histogram.sum()) for key, histogram in sums.items()}
    assert totals == {"a/quality/area": 1, "a/quality/position": 1, "a/quality/intensity": 2}


def test_statistics_of_few_scans_are_left_out(tmp_path: Path) -> None:
    store = SliceStore(tmp_path)
    slices = np.zeros((2, 4, 4), np.uint8)
    store.put("ab", slices, {"indices": [0, 40], "areas": [0, 0], "scan": [41, 64, 64], "modality": "CT"})
    store.put("cd", slices[:1], {"indices": [0], "areas": [0], "scan": [1, 64, 64], "modality": "XR"})
    dataset = ScanDataset([slices, slices[:1]], {}, ["a", "a"], store_keys=["ab", "cd"])
    assert set(compute_image_statistics({"train": dataset}, {"a": store}, 2)) == {"a/quality/intensity"}


def test_scan_of_an_early_store_has_an_intensity_only() -> None:
    assert set(scan_statistics(np.zeros((2, 4, 4), np.uint8), {})) == {"intensity"}
