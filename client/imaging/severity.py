"""How much of each lung is affected (triage, arXiv 2006.01441, section 3.3): severity is the larger of the two shares."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def compute_affected_fractions(lesion: NDArray[np.bool_], lungs: NDArray[np.uint8]) -> tuple[float, float]:
    """(right, left) share of each lung that is lesion, from `lesion` [S, H, W] and `lungs` [S, H, W] with 1 right and 2 left; NaN where a lung
    is not seen. The kept slices stand for the whole scan."""
    right, left = (
        float(lesion[lungs == side].mean()) if (lungs == side).any() else np.nan for side in (1, 2)
    )
    return right, left


def compute_severity(lesion: NDArray[np.bool_], lungs: NDArray[np.uint8]) -> float:
    """The larger share; NaN where neither lung is seen."""
    seen = [share for share in compute_affected_fractions(lesion, lungs) if not np.isnan(share)]
    return max(seen, default=np.nan)
