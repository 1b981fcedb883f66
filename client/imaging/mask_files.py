"""Predicted masks as NIfTI files that lie over their scans."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import nibabel
import numpy as np
from numpy.typing import NDArray

from client.imaging.lung_segmentation import Box
from client.imaging.readers.volume import Volume
from client.imaging.slice_pipeline import letterbox_box
from common.utils.errors import ConsiliumError

EVENNESS_TOLERANCE = 0.1  # of the mean step: slices whose steps differ by no more lie evenly
EDGE_TOLERANCE = 1e-3  # of a step: so far beyond the outermost maps a slice still has their values


@dataclass(frozen=True)
class _Grid:
    """Where a scan's slices lie, and the even grid on which a mask is written."""

    slice_positions: NDArray[np.float64]  # [Z] mm
    grid_positions: NDArray[np.float64]  # [G] mm; the slices' own where these are even
    step: float  # mm


def write_nifti_mask(
    out_path: Path,
    probability: NDArray[np.floating],
    indices: NDArray[np.integer] | list[int],
    box: Box,
    volume: Volume,
    threshold: float,
) -> None:
    """Write the kept slices' maps [S, size, size] as a NIfTI mask of the whole scan, 1 from `threshold` on.

    Each map is resized back into the crop's box; between two kept slices it is interpolated linearly by their
    positions (mm), and beyond the outermost ones the mask is 0. Slices that lie unevenly (one is missing) are
    written on an even grid. A tilted gantry's shear is not written.

    Raises:
        ConsiliumError: The file cannot be written.
    """
    y0, y1, x0, x1 = box
    grid = _make_even_grid(volume)
    maps = _resize_to_box(probability, box)
    # A slice that was repeated counts once.
    map_slices, map_indices = np.unique(np.asarray(indices), return_index=True)
    map_positions = grid.slice_positions[map_slices]
    _, H, W = volume.shape
    mask = np.zeros((len(grid.grid_positions), H, W), np.uint8)
    tolerance = EDGE_TOLERANCE * grid.step
    for z, position in enumerate(grid.grid_positions):
        if not map_positions[0] - tolerance <= position <= map_positions[-1] + tolerance:
            continue
        above = min(int(np.searchsorted(map_positions, position)), len(map_positions) - 1)
        below = max(above - 1, 0)
        share = 1.0
        if above != below:
            distance = map_positions[above] - map_positions[below]
            share = float(np.clip((position - map_positions[below]) / distance, 0, 1))
        interpolated = (1 - share) * maps[map_indices[below]] + share * maps[map_indices[above]]
        mask[z, y0:y1, x0:x1] = interpolated >= threshold
    _save_nifti(out_path, mask, volume, grid)


def _resize_to_box(probability: NDArray[np.floating], box: Box) -> list[NDArray[np.float32]]:
    """Return maps [S, size, size], without the letterbox's padding, at the size of the crop's box."""
    y0, y1, x0, x1 = box
    top, bottom, left, right = letterbox_box(y1 - y0, x1 - x0, probability.shape[-1])
    maps = []
    for slice_map in probability:
        unpadded = np.asarray(slice_map[top:bottom, left:right], np.float32)
        resized = cv2.resize(unpadded, (x1 - x0, y1 - y0), interpolation=cv2.INTER_LINEAR)
        maps.append(np.asarray(resized, np.float32))
    return maps


def _make_even_grid(volume: Volume) -> _Grid:
    """Return the slices' positions, and an even grid over them."""
    positions = volume.positions.astype(np.float64)
    Z = len(positions)
    if Z == 1:
        return _Grid(positions, positions, volume.spacing[0])
    if np.array_equal(positions, np.arange(Z)):  # positions unknown: slices are numbered only
        positions = positions * volume.spacing[0]
    steps = np.diff(positions)
    if np.ptp(steps) <= EVENNESS_TOLERANCE * steps.mean():
        return _Grid(positions, positions, float(steps.mean()))
    step = float(np.median(steps))
    grid_steps = np.arange(round((positions[-1] - positions[0]) / step) + 1)
    return _Grid(positions, positions[0] + step * grid_steps, step)


def _save_nifti(out_path: Path, mask: NDArray[np.uint8], volume: Volume, grid: _Grid) -> None:
    """Save a mask [Z, H, W] with the scan's geometry. Raises ConsiliumError where that fails."""
    x, y = volume.origin
    _, row_spacing, column_spacing = volume.spacing
    # Columns run left and rows back, where NIfTI's axes run right and front.
    affine = np.array(
        [
            [-column_spacing, 0, 0, -x],
            [0, -row_spacing, 0, -y],
            [0, 0, grid.step, grid.grid_positions[0]],
            [0, 0, 0, 1],
        ]
    )
    image: Any = nibabel.Nifti1Image(mask.transpose(2, 1, 0), affine)  # type: ignore[no-untyped-call]
    image.header.set_xyzt_units("mm")
    try:
        Path(out_path).parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(image, out_path)
    except OSError as error:
        raise ConsiliumError(
            f"the mask cannot be written to {out_path} ({error.strerror}); choose another folder"
        ) from error
