"""Severity of a lung disease: the larger affected share of the two lungs (arXiv 2006.01441, section 3.3)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

RIGHT_LUNG = 1
LEFT_LUNG = 2


def compute_affected_fractions(lesion: NDArray[np.bool_], lungs: NDArray[np.uint8]) -> tuple[float, float]:
    """Return the (right, left) share of each lung that is lesion, NaN where a lung is not seen.

    `lesion` [S, H, W] and `lungs` [S, H, W] (1 right, 2 left) are those of the kept slices, which stand for
    the whole scan.
    """
    return _compute_share(lesion, lungs == RIGHT_LUNG), _compute_share(lesion, lungs == LEFT_LUNG)


def compute_severity(lesion: NDArray[np.bool_], lungs: NDArray[np.uint8]) -> float:
    """Return the larger share, NaN where neither lung is seen."""
    fractions = compute_affected_fractions(lesion, lungs)
    return float(np.fmax(*fractions))


def _compute_share(lesion: NDArray[np.bool_], lung: NDArray[np.bool_]) -> float:
    if not lung.any():
        return np.nan
    return float(lesion[lung].mean())
