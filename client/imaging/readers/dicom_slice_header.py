"""The header of one slice or radiograph: what the readers need of a DICOM file before a pixel is decoded."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pydicom
from pydicom.dataset import Dataset

from client.imaging.readers.dicom_fast_header import PixelLocation
from client.imaging.readers.image_files import natural_sort_key

FRONTAL_VIEWS = ("PA", "AP")
UNKNOWN_NUMBER_RANK = 1 << 30  # sorts what has no number behind what has one
_HEADER_TAGS = [
    "StudyInstanceUID",
    "SeriesInstanceUID",
    "SeriesNumber",
    "PatientID",
    "Modality",
    "ImageType",
    "InstanceNumber",
    "ViewPosition",
    "Rows",
    "Columns",
    "SamplesPerPixel",
    "NumberOfFrames",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "ImagerPixelSpacing",
    "SliceThickness",
    "GantryDetectorTilt",
    "RescaleSlope",
    "RescaleIntercept",
    "PixelRepresentation",
    "PixelPaddingValue",
    "SharedFunctionalGroupsSequence",
    "PerFrameFunctionalGroupsSequence",
]

Vector = tuple[float, ...]
HeaderValues = Dataset | dict[str, Any]  # pydicom's data set, or the fast parser's values by keyword


@dataclass(frozen=True)
class SliceHeader:
    """The header of one slice or radiograph: a file, or one frame of a multi-frame file."""

    path: Path
    frame: int
    shape: tuple[int, int]
    position: Vector | None  # mm, of the first pixel
    orientation: Vector | None  # direction of the rows, then of the columns
    pixel_spacing: tuple[float, float] | None  # mm (y, x)
    slice_thickness: float | None  # mm
    gantry_tilt: float  # degrees
    instance_number: int | None
    rescale_slope: float
    rescale_intercept: float | None
    padding_value: int | None
    view_position: str
    pixel_location: PixelLocation | None = None  # where the header alone makes it certain


def read_header(file: Path) -> Dataset:
    """Read a file's header with pydicom, the pixels left out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd but harmless values; the callers check those that matter
        return pydicom.dcmread(file, stop_before_pixels=True, specific_tags=[*_HEADER_TAGS], force=True)


def iter_slice_headers(
    path: Path, values: HeaderValues, pixel_location: PixelLocation | None
) -> Iterator[SliceHeader]:
    """Yield one header for each frame; a plain file has one frame.

    Raises:
        KeyError: Rows or columns are missing.
        ValueError: A number that every image has is none.
    """
    instance_number = parse_integer(values.get("InstanceNumber"))
    for frame in range(int(values.get("NumberOfFrames") or 1)):
        position = _get_frame_value(values, frame, "PlanePositionSequence", "ImagePositionPatient")
        orientation = _get_frame_value(values, frame, "PlaneOrientationSequence", "ImageOrientationPatient")
        thickness = _get_frame_value(values, frame, "PixelMeasuresSequence", "SliceThickness")
        slope = _get_frame_value(values, frame, "PixelValueTransformationSequence", "RescaleSlope")
        intercept = _get_frame_value(values, frame, "PixelValueTransformationSequence", "RescaleIntercept")
        yield SliceHeader(
            path=path,
            frame=frame,
            shape=(int(_require_value(values, "Rows")), int(_require_value(values, "Columns"))),
            position=_parse_vector(position, 3),
            orientation=_parse_vector(orientation, 6),
            pixel_spacing=_parse_pixel_spacing(values, frame),
            slice_thickness=_parse_number(thickness),
            gantry_tilt=_parse_number(values.get("GantryDetectorTilt")) or 0.0,
            instance_number=None if instance_number is None else instance_number + frame,
            rescale_slope=_parse_number(slope) or 1.0,
            rescale_intercept=_parse_number(intercept),
            padding_value=parse_integer(values.get("PixelPaddingValue")),
            view_position=str(values.get("ViewPosition") or "").upper(),
            pixel_location=pixel_location,
        )


def parse_integer(value: Any) -> int | None:
    """Return the value as a whole number; None where it is missing or no finite number."""
    number = _parse_number(value)
    if number is None:
        return None
    return int(number)


def rank_view(header: SliceHeader) -> int:
    """Return 0 for a frontal radiograph, 1 where the view is unknown, 2 for any other view."""
    if header.view_position in FRONTAL_VIEWS:
        return 0
    if not header.view_position:
        return 1
    return 2


def acquisition_sort_key(header: SliceHeader) -> tuple[Any, ...]:
    """Return a key that sorts by instance number, then by file name, then by frame."""
    number = header.instance_number
    if number is None:
        number = UNKNOWN_NUMBER_RANK
    return number, natural_sort_key(header.path.name), header.frame


def _parse_number(value: Any) -> float | None:
    """Return a finite number, or None."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    if math.isfinite(number):
        return number
    return None


def _parse_vector(value: Any, length: int) -> Vector | None:
    """Return `length` finite numbers, or None: scanners leave such values out, empty or damaged."""
    try:
        numbers = tuple(map(float, value))
    except (TypeError, ValueError):
        return None
    if len(numbers) == length and all(map(math.isfinite, numbers)):
        return numbers
    return None


def _parse_pixel_spacing(values: HeaderValues, frame: int) -> tuple[float, float] | None:
    """Return mm (y, x): the pixels' spacing, else that at the detector; None where both are unknown."""
    spacing = _parse_vector(_get_frame_value(values, frame, "PixelMeasuresSequence", "PixelSpacing"), 2)
    if spacing is None:
        spacing = _parse_vector(values.get("ImagerPixelSpacing"), 2)
    if spacing is None or min(spacing) <= 0:
        return None
    return spacing[0], spacing[1]


def _get_frame_value(values: HeaderValues, frame: int, sequence: str, keyword: str) -> Any:
    """Return a value of a multi-frame file: the frame's own, else the shared one, else the file's."""
    if isinstance(values, dict):  # of a plain file, which has one frame
        return values.get(keyword)
    groups_of_frames = (
        ("PerFrameFunctionalGroupsSequence", frame),
        ("SharedFunctionalGroupsSequence", 0),
    )
    for groups, index in groups_of_frames:
        items = values.get(groups) or []
        if index >= len(items):
            continue
        macro = items[index].get(sequence)
        if macro and keyword in macro[0]:
            return macro[0].get(keyword)
    return values.get(keyword)


def _require_value(values: HeaderValues, keyword: str) -> Any:
    """Return a value without which there is no image. Raises KeyError."""
    value = values.get(keyword)
    if value is None:
        raise KeyError(keyword)
    return value
