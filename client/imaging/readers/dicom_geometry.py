"""The geometry of a CT series: the order of its slices, their distances, and the radiological view.

Slices are ordered by position, never by the names of their files.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.imaging.readers.dicom_series import Series, compute_slice_normal
from client.imaging.readers.dicom_slice_header import SliceHeader, acquisition_sort_key
from common.utils.errors import ConsiliumError

POSITION_TOLERANCE = 0.01  # mm: slices that are closer lie in the same place
INSTANCE_NUMBER_TOLERANCE = 0.5
MISSING_SLICE_GAP = 1.5  # a step of so many times the usual one means that slices are missing
MIN_NOTED_TILT = 0.5  # degrees

Floats = NDArray[np.float64]


@dataclass
class SliceStack:
    """The slices of a series in the order in which they lie, one in each place."""

    headers: list[SliceHeader]
    positions: Floats  # [Z] mm along the slices' normal, ascending; 0, 1, 2... where they are unknown
    spacing: float  # mm between slices
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Flips:
    """The axes of an axial series that run against the radiological view."""

    rows: bool = False  # they run to the front
    columns: bool = False  # they run to the patient's right


def format_count(count: int, noun: str) -> str:
    """Return the count with its noun in the singular or the plural."""
    if count == 1:
        return f"{count} {noun}"
    return f"{count} {noun}s"


def order_slices(series: Series) -> SliceStack:
    """Order the series' slices by position; by instance number where a position is missing.

    Slices of another size or orientation than the majority, and all but the first in one place, are left out.

    Raises:
        ConsiliumError: Positions are missing, and instance numbers too.
    """
    notes: list[str] = []
    headers = _keep_majority(series.headers, notes)
    headers.sort(key=acquisition_sort_key)
    has_positions = all(header.position for header in headers)
    if has_positions:
        normal = compute_slice_normal(headers[0].orientation)
        if headers[0].orientation is None:
            notes.append("The slices' orientation is missing; they are taken as axial.")
        positions = np.array([header.position for header in headers]) @ normal
        tolerance = POSITION_TOLERANCE
    else:
        positions = _number_slices(headers, notes)
        tolerance = INSTANCE_NUMBER_TOLERANCE
    order = _find_distinct_places(positions, tolerance, notes)
    headers = [headers[index] for index in order]
    positions = positions[order]

    thickness = series.slice_thickness
    if not np.isfinite(thickness) or thickness <= 0:
        thickness = 1.0
    steps = np.diff(positions)
    usual_step = float(np.median(steps)) if len(steps) else thickness
    _note_missing_slices(steps, usual_step, notes)
    if not has_positions:
        return SliceStack(headers, np.arange(len(headers), dtype=np.float64), thickness, notes)
    tilt = _estimate_tilt(headers, normal)
    if abs(tilt) > MIN_NOTED_TILT:
        notes.append(
            f"The gantry was tilted by {abs(tilt):.1f} degrees; the slices are kept as they were taken."
        )
    return SliceStack(headers, positions, usual_step, notes)


def get_pixel_spacing(header: SliceHeader) -> tuple[float, float]:
    """Return mm (y, x) of a pixel, 1 where it is unknown."""
    return header.pixel_spacing or (1.0, 1.0)


def detect_flips(series: Series, header: SliceHeader) -> Flips:
    """Return which axes of an axial series run against the radiological view; none of any other."""
    orientation = header.orientation
    if not series.is_axial or orientation is None or abs(orientation[0]) < 0.7:
        return Flips()
    return Flips(rows=orientation[4] <= 0, columns=orientation[0] <= 0)


def flip_to_radiological(voxels: NDArray[np.int16], flips: Flips) -> NDArray[np.int16]:
    """Return slices [..., H, W] with columns to the patient's left and rows to the back."""
    if flips.rows:
        voxels = voxels[..., ::-1, :]
    if flips.columns:
        voxels = voxels[..., ::-1]
    return np.ascontiguousarray(voxels)


def compute_origin(header: SliceHeader, flips: Flips) -> tuple[float, float]:
    """Return mm (x, y) in LPS of the first pixel in the radiological view; (0, 0) where it is unknown.

    Of a tilted stack it is the lowest slice's.
    """
    if header.position is None or header.orientation is None:
        return 0.0, 0.0
    H, W = header.shape
    row_spacing, column_spacing = get_pixel_spacing(header)
    along_rows = np.array(header.orientation[:3])
    along_columns = np.array(header.orientation[3:])
    # A flip makes the last row or column the first one.
    first_pixel = (
        np.array(header.position)
        + flips.rows * (H - 1) * row_spacing * along_columns
        + flips.columns * (W - 1) * column_spacing * along_rows
    )
    return float(first_pixel[0]), float(first_pixel[1])


def _keep_majority(headers: tuple[SliceHeader, ...], notes: list[str]) -> list[SliceHeader]:
    """Return the slices of the most frequent size and orientation; note how many others there are."""

    def appearance(header: SliceHeader) -> tuple[Any, ...]:
        # Adding 0.0 makes -0.0 the same as 0.0.
        orientation = tuple(round(part, 1) + 0.0 for part in header.orientation or ())
        return header.shape, orientation

    usual_appearance, _ = Counter(map(appearance, headers)).most_common(1)[0]
    majority = [header for header in headers if appearance(header) == usual_appearance]
    if len(majority) < len(headers):
        H, W = majority[0].shape
        others = format_count(len(headers) - len(majority), "slice")
        notes.append(f"{others} of another size or orientation than the majority ({H} x {W}) left out.")
    return majority


def _number_slices(headers: list[SliceHeader], notes: list[str]) -> Floats:
    """Return instance numbers in place of positions, and note it. Raises ConsiliumError if one is missing."""
    missing = sum(header.position is None for header in headers)
    without_position = f"{format_count(missing, 'slice')} without a position"
    if any(header.instance_number is None for header in headers):
        raise ConsiliumError(
            f"{headers[0].path.parent}: {without_position}, and instance numbers are missing too; "
            "export the scan again"
        )
    notes.append(
        f"{without_position}: ordered by instance number, so the direction of the slices is not certain."
    )
    return np.array([float(header.instance_number or 0) for header in headers])


def _find_distinct_places(positions: Floats, tolerance: float, notes: list[str]) -> NDArray[np.intp]:
    """Return the indices that sort the positions, one for each place; note how many others there are."""
    order = np.argsort(positions, kind="stable")
    is_first = np.concatenate([[True], np.diff(positions[order]) > tolerance])
    if not is_first.all():
        duplicates = format_count(int((~is_first).sum()), "slice")
        notes.append(f"{duplicates} in the same place as another left out.")
    return np.asarray(order[is_first], np.intp)


def _note_missing_slices(steps: Floats, usual_step: float, notes: list[str]) -> None:
    """Note how many slices are missing where steps are much larger than the usual one."""
    if not len(steps):
        return
    missing = int(np.sum(np.rint(steps / usual_step) - 1, where=steps > MISSING_SLICE_GAP * usual_step))
    if missing:
        notes.append(
            f"About {format_count(missing, 'slice')} missing: "
            f"the largest step between slices is {steps.max() / usual_step:.2g} times the usual one."
        )


def _estimate_tilt(headers: list[SliceHeader], normal: Floats) -> float:
    """Return degrees of gantry tilt: the scanner's value, else the angle of the stack to the normal."""
    if headers[0].gantry_tilt or len(headers) < 2:
        return headers[0].gantry_tilt
    stack_direction = np.array(headers[-1].position) - np.array(headers[0].position)
    cosine = abs(stack_direction @ normal) / np.linalg.norm(stack_direction)
    return float(np.degrees(np.arccos(np.clip(cosine, 0, 1))))
