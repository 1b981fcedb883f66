"""NIfTI volumes, brought to axial slices with z running to the head."""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from client.imaging.readers.volume import Volume, Voxels
from common.utils.errors import ConsiliumError

NIFTI_SUFFIXES = (".nii", ".nii.gz")
AIR_HU = -1024
MAX_HU = 32767
MAX_LOWEST_HU = -200  # a scan in Hounsfield units holds air, far below this


def read_nifti(path: Path) -> Volume:
    """Read one `.nii` or `.nii.gz` file as axial slices.

    Raises:
        ConsiliumError: The file is damaged, or does not hold three dimensions of numbers.
    """
    data, image = read_axial_array(path)
    try:
        voxels, notes = _to_voxels(data)
    except ValueError as error:
        raise ConsiliumError(f"{path} cannot be used: {error}; store the scan in Hounsfield units") from error
    x, y, z = map(_valid_zoom, image.header.get_zooms()[:3])
    Z, H, W = voxels.shape
    lowest_position = float(image.affine[2, 3])
    return Volume(
        voxels=voxels,
        spacing=(z, y, x),
        positions=lowest_position + z * np.arange(Z, dtype=np.float64),
        modality="CT",
        notes=notes,
        origin=_compute_origin(image.affine, H, W),
    )


def read_axial_array(path: Path) -> tuple[NDArray[Any], Any]:
    """Return the values [Z, H, W] of a file as axial slices, and nibabel's image in canonical axes.

    Raises:
        ConsiliumError: The file is damaged or not three-dimensional.
    """
    try:
        image: Any = nibabel.as_closest_canonical(nibabel.load(path))  # type: ignore[no-untyped-call]
        data = np.asanyarray(image.dataobj)
    except (nibabel.filebasedimages.ImageFileError, OSError, EOFError, ValueError, zlib.error) as error:
        raise ConsiliumError(
            f"{path} cannot be read as NIfTI ({type(error).__name__}); copy or export it again"
        ) from error
    while data.ndim > 3 and data.shape[-1] == 1:
        data = data[..., 0]
    if data.ndim != 3 or 0 in data.shape:
        raise ConsiliumError(f"{path} has the shape {data.shape}; a scan has three dimensions")
    # Canonical axes run right, front, head; a slice's columns run left and its rows back.
    return np.ascontiguousarray(data.transpose(2, 1, 0)[:, ::-1, ::-1]), image


def _to_voxels(data: NDArray[Any]) -> tuple[Voxels, list[str]]:
    """Return HU where the values look like HU (air far below zero), else grey values 0..255; and notes."""
    if data.dtype.kind not in "iufb":
        raise ValueError("its values are not numbers on one scale")
    is_float = data.dtype.kind == "f"
    if is_float:
        data = _replace_nan(data)
    low = float(data.min())
    high = float(data.max())
    if low < MAX_LOWEST_HU:
        whole_numbers = np.rint(data) if is_float else data
        return np.clip(whole_numbers, AIR_HU, MAX_HU).astype(np.int16), []
    if low >= 0 and high <= 1 and is_float:
        grey = (data * 255).astype(np.uint8)
        return grey, ["Values run from 0 to 1, not Hounsfield units: taken as grey values."]
    if low >= 0 and high <= 255:
        grey = data.astype(np.uint8)
        return grey, ["Values run from 0 to 255, not Hounsfield units: taken as grey values."]
    note = f"Values run from {low:.0f} to {high:.0f}, not Hounsfield units: scaled to grey values."
    return _scale_to_grey(data), [note]


def _replace_nan(data: NDArray[Any]) -> NDArray[Any]:
    """Return the values with the lowest one in place of NaN."""
    lowest = 0.0
    if np.isfinite(data).any():
        lowest = float(np.nanmin(data))
    return np.asarray(np.nan_to_num(data, nan=lowest))


def _scale_to_grey(data: NDArray[Any]) -> NDArray[np.uint8]:
    """Return grey values with percentiles 0.5 and 99.5, of 32 rows along the first axis, as 0 and 255."""
    sample = data[:: max(1, len(data) // 32)]
    bottom, top = map(float, np.percentile(sample, (0.5, 99.5)))
    scaled = (data.astype(np.float32) - bottom) * (255.0 / max(top - bottom, 1e-6))
    return np.asarray(np.clip(scaled, 0, 255), np.uint8)


def _valid_zoom(zoom: float) -> float:
    """Return mm, 1 where the header's value is unusable."""
    if math.isfinite(zoom) and zoom > 0:
        return float(zoom)
    return 1.0


def _compute_origin(affine: NDArray[np.float64], H: int, W: int) -> tuple[float, float]:
    """Return mm (x, y) in LPS of a slice's first pixel; (0, 0) where the affine is unusable."""
    # Canonical x and y are largest where a slice begins; LPS has both the other way round.
    first_pixel = affine @ np.array([W - 1, H - 1, 0, 1.0])
    if not np.isfinite(first_pixel).all():
        return 0.0, 0.0
    return -float(first_pixel[0]), -float(first_pixel[1])
