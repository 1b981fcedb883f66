"""Define the histograms, with equal bins on both sides, by which images are compared between centres."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class ImageStatistic(NamedTuple):
    """A property of a scan's selected slices, and the bins in which it is counted."""

    name: str
    unit: str
    bin_edges: NDArray[np.float64]  # [bins + 1]; values beyond the last edge count in the last bin


IMAGE_STATISTICS = {
    "area": ImageStatistic("lung air area of the kept slices", "cm²", np.arange(0, 501, 20.0)),
    "position": ImageStatistic(
        "place of the kept slices in the scan", "first to last", np.linspace(0, 1, 21)
    ),
    "intensity": ImageStatistic("intensity of the kept slices' pixels", "0 to 255", np.arange(0, 257, 8.0)),
}
