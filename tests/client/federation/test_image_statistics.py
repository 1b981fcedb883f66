"""Histograms of what scans look like: right, and telling nothing of few."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from client.data.dataset import ScanDataset
from client.federation.image_statistics import compute_image_statistics, scan_statistics, suppress_small_bins
from client.imaging.slice_store import SliceStore


def test_a_scan_adds_one_to_each_of_its_histograms(tmp_path: Path) -> None:
    store = SliceStore(tmp_path)
    slices = np.zeros((2, 4, 4), np.uint8)
    slices[1] = 255
    store.put(
        "ab", slices, {"indices": [0, 40], "areas": [0, 25_000], "scan": [41, 64, 64], "modality": "CT"}
    )
    store.put("cd", slices[:1], {"indices": [0], "areas": [0], "scan": [1, 64, 64], "modality": "XR"})
    scans = ScanDataset([slices, slices[:1]], {}, ["a", "a"], store_keys=["ab", "cd"])
    found = compute_image_statistics({"train": scans}, {"a": store}, 1)
    assert found["a/quality/area"][[0, 12]].tolist() == [0.5, 0.5]  # 0 and 250 cm2 of 20 each
    assert found["a/quality/position"][[0, 19]].tolist() == [0.5, 0.5]  # the first and the last
    assert found["a/quality/intensity"][[0, 31]].tolist() == [1.5, 0.5]
    assert {key: float(of.sum()) for key, of in found.items()} == {
        "a/quality/area": 1,
        "a/quality/position": 1,
        "a/quality/intensity": 2,
    }
    assert set(compute_image_statistics({"train": scans}, {"a": store}, 2)) == {"a/quality/intensity"}
    assert set(scan_statistics(slices, {})) == {"intensity"}  # of an older store


@given(
    arrays(float, st.tuples(st.integers(1, 30), st.just(6)), elements=st.sampled_from([0.0, 0.25, 1.0])),
    st.integers(1, 8),
)
def test_no_bin_of_few_scans_leaves(rows: np.ndarray, least: int) -> None:
    found = suppress_small_bins(rows, least)
    touched = (rows > 0).sum(0)
    assert ((found > 0) == ((touched >= least) & (touched > 0))).all()
    if found.any():
        assert found.sum() == pytest.approx(
            len(rows) // least * least
        )  # not the sum of what was left in: that would tell what was not
        kept = found > 0
        np.testing.assert_allclose(
            found[kept] / found[kept].sum(), rows.sum(0)[kept] / rows.sum(0)[kept].sum()
        )
