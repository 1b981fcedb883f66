"""A scan in memory, whatever it was stored as."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass
class Volume:
    """One scan's voxels with what is known of their geometry.

    Axial slices in the radiological view where the format says how they lie: columns run to the patient's left, rows to the back,
    slices to the head. `notes` are sentences for a person; they hold no identifier.
    """

    voxels: NDArray[np.int16] | NDArray[np.uint8]  # [Z, H, W]: int16 HU, or uint8 for pictures and radiographs
    spacing: tuple[float, float, float]  # mm (z, y, x); 1.0 where unknown
    positions: NDArray[np.float64]  # [Z] mm along the slices' normal, ascending; the index where unknown
    modality: str  # "CT" | "XR" (radiograph: Z = 1)
    notes: list[str] = field(default_factory=list)
    origin: tuple[float, float] = (0.0, 0.0)  # mm (x, y) to the patient's left and back (LPS), of the first pixel's middle; 0 where unknown

    @property
    def is_hounsfield(self) -> bool:
        """Whether the voxels are Hounsfield units (else grey values 0..255)."""
        return self.voxels.dtype == np.int16
