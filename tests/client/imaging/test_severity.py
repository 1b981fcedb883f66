"""Affected shares of the lungs against a loop over voxels."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from client.imaging.severity import compute_affected_fractions, compute_severity

SHAPE = (2, 3, 4)


@given(arrays(bool, SHAPE), arrays(np.uint8, SHAPE, elements=st.integers(0, 2)))
def test_fractions_and_severity_equal_loop_over_voxels(lesion: np.ndarray, lungs: np.ndarray) -> None:
    seen, affected = {1: 0, 2: 0}, {1: 0, 2: 0}
    for voxel in np.ndindex(SHAPE):
        side = int(lungs[voxel])
        if side:
            seen[side] += 1
            affected[side] += bool(lesion[voxel])
    expected = [affected[side] / seen[side] if seen[side] else math.nan for side in (1, 2)]
    assert compute_affected_fractions(lesion, lungs) == pytest.approx(tuple(expected), nan_ok=True)
    seen_fractions = [share for share in expected if not math.isnan(share)]
    assert compute_severity(lesion, lungs) == pytest.approx(
        max(seen_fractions) if seen_fractions else math.nan, nan_ok=True
    )


def test_lesion_outside_lungs_is_not_counted() -> None:
    lungs = np.zeros((1, 2, 4), np.uint8)
    lungs[0, :, 0], lungs[0, :, 3] = 1, 2
    lesion = np.zeros((1, 2, 4), bool)
    lesion[0, :, 1:3] = True
    lesion[0, 0, 3] = True
    assert compute_affected_fractions(lesion, lungs) == (0.0, 0.5)
    assert compute_severity(lesion, lungs) == 0.5
