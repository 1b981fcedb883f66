"""What data quality is counted by, on both sides of the wall: the bins of each measure of a scan's kept slices."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class ImageStatistic(NamedTuple):
    """A measure's bins: `edges` [bins + 1]; what lies beyond the last counts as the last bin's."""

    name: str
    unit: str
    bin_edges: NDArray[np.float64]


IMAGE_STATISTICS = {
    "area": ImageStatistic("lung air area of the kept slices", "cm²", np.arange(0, 501, 20.0)),
    "position": ImageStatistic(
        "place of the kept slices in the scan", "first to last", np.linspace(0, 1, 21)
    ),
    "intensity": ImageStatistic("intensity of the kept slices' pixels", "0 to 255", np.arange(0, 257, 8.0)),
}
