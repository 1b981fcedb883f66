"""A scan, whatever it was stored as: in memory, or read slice by slice as its slices are wanted."""

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
    """One scan's voxels with what is known of their geometry.

    Axial slices in the radiological view where the format says how they lie: columns run to the patient's left, rows to the back,
    slices to the head. `notes` are sentences for a person; they hold no identifier.
    """

    voxels: Voxels  # [Z, H, W]: int16 HU, or uint8 for pictures and radiographs
    spacing: tuple[float, float, float]  # mm (z, y, x); 1.0 where unknown
    positions: NDArray[np.float64]  # [Z] mm along the slices' normal, ascending; the index where unknown
    modality: str  # "CT" | "XR" (radiograph: Z = 1)
    notes: list[str] = field(default_factory=list)
    origin: tuple[float, float] = (
        0.0,
        0.0,
    )  # mm (x, y) to the patient's left and back (LPS), of the first pixel's middle; 0 where unknown

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
        """One slice [H, W]."""
        return np.asarray(self.voxels[z])

    def iter_slices(self) -> Iterator[NDArray[Any]]:
        """All slices [H, W], one after another."""
        return iter(self.voxels)

    def read_reduced(self, indices: Indices, reduction: int) -> Voxels:
        """Slices [n, H // step, W // step], one pixel for `step` x `step`."""
        return np.stack([reduce_slice(self.voxels[z], reduction) for z in indices])


@dataclass
class LazyVolume:
    """A CT of which only the headers were read; all is as for a Volume, but its slices.

    `read` and `small` raise what their decoder raises where a slice cannot be decoded; reading the scan as a Volume leaves such slices out.
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
        """All slices [H, W], one after another: one is in memory at a time."""
        return map(self.read_slice, range(self.shape[0]))


def reduce_slice(image: NDArray[Any], reduction: int) -> NDArray[Any]:
    """`image` [H, W] at [H // step, W // step]: the mean of each block of a picture; of HU the mean of `middle_rows`."""
    h, w = image.shape[0] // reduction, image.shape[1] // reduction
    rows = (
        image[: h * reduction, : w * reduction]
        if image.dtype == np.uint8
        else take_middle_rows(image, reduction)
    )
    return np.asarray(cv2.resize(rows, (w, h), interpolation=cv2.INTER_AREA)) if reduction > 1 else image


def take_middle_rows(image: NDArray[Any], reduction: int) -> NDArray[Any]:
    """Of each `step` rows of `image` [H, W] the middle one [H // step, W // step * step]: an eighth of the work, and enough to see lungs."""
    H, W = image.shape
    return image[: H // reduction * reduction, : W // reduction * reduction][reduction // 2 :: reduction]
