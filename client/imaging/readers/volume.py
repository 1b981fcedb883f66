"""A scan, whatever it was stored as: in memory, or opened to be read slice by slice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

Voxels = NDArray[np.int16] | NDArray[np.uint8]
Indices = NDArray[np.int64]


@dataclass
class Volume:
    """One scan's voxels with their geometry, as far as it is known.

    Slices are axial, in the radiological view, where the format says how they lie: columns run to the
    patient's left, rows to the back, slices to the head. `notes` are sentences for a person; they hold no
    identifier.
    """

    voxels: Voxels  # [Z, H, W]: int16 HU, or uint8 for pictures and radiographs
    spacing: tuple[float, float, float]  # mm (z, y, x); 1.0 where unknown
    positions: NDArray[np.float64]  # [Z] mm along the slices' normal, ascending; the index where unknown
    modality: str  # "CT" | "XR" (radiograph: Z = 1)
    notes: list[str] = field(default_factory=list)
    # mm (x, y) to the patient's left and back (LPS), of the first pixel's middle; 0 where unknown
    origin: tuple[float, float] = (0.0, 0.0)

    @property
    def is_hounsfield(self) -> bool:
        """Whether the voxels are Hounsfield units (else grey values 0..255)."""
        return self.voxels.dtype == np.int16

    @property
    def shape(self) -> tuple[int, int, int]:
        """Z, H, W."""
        Z, H, W = self.voxels.shape
        return Z, H, W

    def read_slice(self, z: int) -> NDArray[Any]:
        """Return one slice [H, W]."""
        return np.asarray(self.voxels[z])

    def iter_slices(self) -> Iterator[NDArray[Any]]:
        """Return an iterator over all slices [H, W]."""
        return iter(self.voxels)

    def read_reduced(self, indices: Indices, reduction: int) -> Voxels:
        """Return slices [n, H // reduction, W // reduction]."""
        return np.stack([reduce_slice(self.voxels[z], reduction) for z in indices])


@dataclass
class LazyVolume:
    """A CT of which only the headers were read; it serves its slices as a Volume does.

    `read_slice` and `read_reduced` raise what their decoder raises where a slice cannot be decoded;
    `read_scan` leaves such slices out.
    """

    shape: tuple[int, int, int]  # Z, H, W
    spacing: tuple[float, float, float]
    positions: NDArray[np.float64]
    is_hounsfield: bool
    read_slice: Callable[[int], NDArray[Any]]
    read_reduced: Callable[[Indices, int], Voxels]
    notes: list[str] = field(default_factory=list)
    modality: str = "CT"

    def iter_slices(self) -> Iterator[NDArray[Any]]:
        """Return an iterator over all slices [H, W], one of which is in memory at a time."""
        return map(self.read_slice, range(self.shape[0]))


def reduce_slice(image: NDArray[Any], reduction: int) -> NDArray[Any]:
    """Return `image` [H, W] at [H // reduction, W // reduction].

    A pixel is the mean of its block in a picture, and of the block's middle row in HU (see
    `take_middle_rows`).
    """
    if reduction == 1:
        return image
    height = image.shape[0] // reduction
    width = image.shape[1] // reduction
    if image.dtype == np.uint8:
        source = image[: height * reduction, : width * reduction]
    else:
        source = take_middle_rows(image, reduction)
    return np.asarray(cv2.resize(source, (width, height), interpolation=cv2.INTER_AREA))


def take_middle_rows(image: NDArray[Any], reduction: int) -> NDArray[Any]:
    """Return the middle one of each `reduction` rows of `image` [H, W].

    Averaging only these takes an eighth of the work at a reduction of 8, and is enough to see lungs.
    """
    H, W = image.shape
    height = H // reduction * reduction
    width = W // reduction * reduction
    return image[:height, :width][reduction // 2 :: reduction]
