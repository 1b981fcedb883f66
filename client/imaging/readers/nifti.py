"""NIfTI volumes, brought to axial slices with z running to the head."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from client.imaging.readers.volume import Volume
from common.utils.errors import ConsiliumError

NIFTI_SUFFIXES = (".nii", ".nii.gz")
AIR_HU = -1024


def _to_voxels(data: NDArray[Any]) -> tuple[NDArray[np.int16] | NDArray[np.uint8], list[str]]:
    """HU where the values look like HU (air far below zero), else grey values 0..255."""
    if data.dtype.kind not in "iufb":
        raise ValueError("its values are not numbers on one scale")
    if data.dtype.kind == "f":
        data = np.nan_to_num(data, nan=float(np.nanmin(data)) if np.isfinite(data).any() else 0.0)
    low, high = float(data.min()), float(data.max())
    if low < -200:
        hu: NDArray[np.int16] = np.clip(
            np.rint(data) if data.dtype.kind == "f" else data, AIR_HU, 32767
        ).astype(np.int16)
        return hu, []
    if low >= 0 and high <= 1 and data.dtype.kind == "f":
        return (data * 255).astype(np.uint8), [
            "Values run from 0 to 1, not Hounsfield units: taken as grey values."
        ]
    if low >= 0 and high <= 255:
        return data.astype(np.uint8), [
            "Values run from 0 to 255, not Hounsfield units: taken as grey values."
        ]
    bottom, top = (float(v) for v in np.percentile(data[:: max(1, len(data) // 32)], (0.5, 99.5)))
    grey = np.clip((data.astype(np.float32) - bottom) * (255.0 / max(top - bottom, 1e-6)), 0, 255).astype(
        np.uint8
    )
    said = f"Values run from {low:.0f} to {high:.0f}, not Hounsfield units: scaled to grey values."
    return grey, [said]


def read_axial_array(path: Path) -> tuple[NDArray[Any], Any]:
    """The values [Z, H, W] of one file as axial slices, and nibabel's image in canonical axes. Raises ConsiliumError as `read_nifti` does."""
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


def read_nifti(path: Path) -> Volume:
    """One `.nii` or `.nii.gz` file as axial slices. Raises ConsiliumError when it is damaged or not three-dimensional."""
    data, image = read_axial_array(path)
    try:
        voxels, notes = _to_voxels(data)
    except ValueError as error:
        raise ConsiliumError(f"{path} cannot be used: {error}; store the scan in Hounsfield units") from error
    x, y, z = (float(v) if np.isfinite(v) and v > 0 else 1.0 for v in image.header.get_zooms()[:3])
    H, W = voxels.shape[1:]
    # Canonical x is largest, and y too, where a slice begins; LPS has both the other way round.
    first = image.affine @ np.array([W - 1, H - 1, 0, 1.0])
    origin = (-float(first[0]), -float(first[1])) if np.isfinite(first).all() else (0.0, 0.0)
    bottom = float(image.affine[2, 3])
    return Volume(
        voxels, (z, y, x), bottom + z * np.arange(len(voxels), dtype=np.float64), "CT", notes, origin
    )
