"""What DICOM headers say, before a pixel is decoded: which files form a series, how its slices lie, which series to read."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset

from client.imaging.readers.dicom_fast_header import PixelLocation, parse_header_fast
from client.imaging.readers.image_files import natural_sort_key
from common.utils.errors import ConsiliumError

RADIOGRAPH_MODALITIES = ("CR", "DX", "DR", "RG")
FRONTAL_VIEWS = ("PA", "AP")
MIN_AXIAL_COSINE = (
    0.8  # cosine between the slices' normal and the body's axis; a gantry tilts by up to 30 degrees (0.87)
)
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


@dataclass(frozen=True)
class SliceHeader:
    """One slice's (or radiograph's) header: a file, or one frame of a multi-frame file."""

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
    pixel_location: PixelLocation | None = None  # where they lie, if that is certain without reading them


@dataclass(frozen=True)
class Series:
    """The images of one series. `study`, `series` and `patient` identify: they stay in the hospital's own tables."""

    study_uid: str
    series_uid: str
    patient_id: str
    modality: str  # "CT" | "XR"
    series_number: int | None
    headers: tuple[SliceHeader, ...]
    slice_thickness: (
        float  # mm of a slice, or the distance of slices where that is unknown; infinite where both are
    )
    extent: float  # mm from the first slice to the last
    is_axial: bool

    @property
    def files(self) -> list[Path]:
        """The series' files, each once."""
        return list(dict.fromkeys(head.path for head in self.headers))


def is_dicom(path: Path) -> bool:
    """Whether the file begins as DICOM does, or is called `.dcm`/`.ima` (old exports lack the preamble)."""
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM" or path.suffix.lower() in (".dcm", ".ima")
    except OSError:
        return False


def _iter_files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    for root, folders, files in os.walk(path):
        folders.sort()
        yield from (
            Path(root, file) for file in sorted(files, key=natural_sort_key) if not file.startswith(".")
        )


def _parse_floats(value: Any, length: int) -> Vector | None:
    """`length` finite numbers, or None: scanners leave these tags out, empty or damaged."""
    try:
        numbers = tuple(float(v) for v in value)
    except (TypeError, ValueError):
        return None
    return numbers if len(numbers) == length and all(map(math.isfinite, numbers)) else None


def _parse_number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _get_frame_value(dataset: Dataset | dict[str, Any], frame: int, sequence: str, tag: str) -> Any:
    """A tag of a multi-frame file: the frame's own, else the shared one, else the file's."""
    if isinstance(dataset, dict):  # of a plain file, which has one frame
        return dataset.get(tag)
    for groups, index in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        items = dataset.get(groups) or []
        inner = items[index].get(sequence) if index < len(items) else None
        if inner and tag in inner[0]:
            return inner[0].get(tag)
    return dataset.get(tag)


def _require_tag(dataset: Dataset | dict[str, Any], tag: str) -> Any:
    """A tag without which there is no image. Raises KeyError."""
    found = dataset.get(tag)
    if found is None:
        raise KeyError(tag)
    return found


def _iter_slice_headers(
    path: Path, dataset: Dataset | dict[str, Any], pixels: PixelLocation | None
) -> Iterator[SliceHeader]:
    """One head a frame; a plain file is one frame."""
    for frame in range(int(dataset.get("NumberOfFrames") or 1)):
        place = _parse_floats(
            _get_frame_value(dataset, frame, "PlanePositionSequence", "ImagePositionPatient"), 3
        )
        spacing = _parse_floats(
            _get_frame_value(dataset, frame, "PixelMeasuresSequence", "PixelSpacing"), 2
        ) or _parse_floats(dataset.get("ImagerPixelSpacing"), 2)
        number = _parse_number(dataset.get("InstanceNumber"))
        padding = _parse_number(dataset.get("PixelPaddingValue"))
        yield SliceHeader(
            path=path,
            frame=frame,
            shape=(int(_require_tag(dataset, "Rows")), int(_require_tag(dataset, "Columns"))),
            position=place,
            orientation=_parse_floats(
                _get_frame_value(dataset, frame, "PlaneOrientationSequence", "ImageOrientationPatient"), 6
            ),
            pixel_spacing=(spacing[0], spacing[1]) if spacing and min(spacing) > 0 else None,
            slice_thickness=_parse_number(
                _get_frame_value(dataset, frame, "PixelMeasuresSequence", "SliceThickness")
            ),
            gantry_tilt=_parse_number(dataset.get("GantryDetectorTilt")) or 0.0,
            instance_number=None if number is None else int(number) + frame,
            rescale_slope=_parse_number(
                _get_frame_value(dataset, frame, "PixelValueTransformationSequence", "RescaleSlope")
            )
            or 1.0,
            rescale_intercept=_parse_number(
                _get_frame_value(dataset, frame, "PixelValueTransformationSequence", "RescaleIntercept")
            ),
            padding_value=None if padding is None else int(padding),
            view_position=str(dataset.get("ViewPosition") or "").upper(),
            pixel_location=pixels,
        )


def compute_slice_normal(orientation: Vector | None) -> np.ndarray:
    """The slices' unit normal, turned so that its largest part points to the head, the back or the left."""
    if orientation is None:
        return np.array([0.0, 0.0, 1.0])
    normal = np.cross(orientation[:3], orientation[3:])
    length = float(np.linalg.norm(normal))
    if length < 1e-6:
        return np.array([0.0, 0.0, 1.0])
    normal = normal / length
    return normal if normal[np.abs(normal).argmax()] > 0 else -normal


def _build_series(
    study: str, series: str, patient: str, modality: str, number: int | None, heads: list[SliceHeader]
) -> Series:
    normal = compute_slice_normal(next((h.orientation for h in heads if h.orientation), None))
    places = np.unique(np.round([float(normal @ h.position) for h in heads if h.position], 2))
    thick = [h.slice_thickness for h in heads if h.slice_thickness]
    gap = float(np.median(np.diff(places))) if len(places) > 1 else np.inf
    axial = any(h.orientation for h in heads) and bool(abs(normal[2]) >= MIN_AXIAL_COSINE)
    extent = float(places[-1] - places[0]) if len(places) else 0.0
    return Series(
        study,
        series,
        patient,
        modality,
        number,
        tuple(heads),
        float(np.median(thick)) if thick else gap,
        extent,
        axial,
    )


def _read_header(file: Path) -> Dataset | dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd but harmless values; what matters is checked by who asked
        return pydicom.dcmread(file, stop_before_pixels=True, specific_tags=[*_HEADER_TAGS], force=True)


def find_series(path: Path) -> tuple[list[Series], int, set[str]]:
    """All series at `path`, how many DICOM files have a damaged header, and the modalities that were passed over."""
    found: dict[tuple[str, str], tuple[str, str, int | None, list[SliceHeader]]] = {}
    damaged, other = 0, set[str]()
    for file in _iter_files(path):
        try:
            seen = parse_header_fast(file)
        except OSError:
            continue
        if seen is None and not is_dicom(file):
            continue
        try:
            dataset, pixels = seen or (_read_header(file), None)
            modality = str(dataset.get("Modality") or "")
            kind = "CT" if modality == "CT" else "XR" if modality in RADIOGRAPH_MODALITIES else ""
            if not kind:
                if modality:
                    other.add(modality)
                elif (
                    "SeriesInstanceUID" not in dataset
                    and "DirectoryRecordSequence" not in dataset
                    and file.name.upper() != "DICOMDIR"
                ):
                    damaged += 1
                continue
            image_type = [str(part).upper() for part in dataset.get("ImageType") or []]
            # Scouts show where the scan was taken; colour CT images are dose reports and screenshots.
            if kind == "CT" and ("LOCALIZER" in image_type or int(dataset.get("SamplesPerPixel") or 1) != 1):
                other.add("CT localiser or screenshot")
                continue
            heads = list(_iter_slice_headers(file, dataset, pixels))
            key = (str(dataset.get("StudyInstanceUID") or ""), str(dataset.get("SeriesInstanceUID") or ""))
            number = _parse_number(dataset.get("SeriesNumber"))
            patient = str(dataset.get("PatientID") or "")
        except Exception:  # the header of a damaged file can fail in any way; it is counted and told of
            damaged += 1
            continue
        found.setdefault(key, (patient, kind, None if number is None else int(number), []))[3].extend(heads)
    return (
        [
            _build_series(*key, patient, kind, number, heads)
            for key, (patient, kind, number, heads) in found.items()
        ],
        damaged,
        other,
    )


def _describe_series(series: Series) -> str:
    number = "without a number" if series.series_number is None else f"number {series.series_number}"
    thick = f"{series.slice_thickness:.3g} mm, " if np.isfinite(series.slice_thickness) else ""
    return f"{number} ({thick}{len(series.headers)} image{'s' * (len(series.headers) != 1)})"


def choose_series(candidates: list[Series]) -> tuple[Series, list[str]]:
    """The series to read of one study, and a note naming the others by number and thickness.

    CT before radiographs, axial before others, then the thinnest one that covers at least half of what the longest covers (a
    bolus-tracking series is thin but covers nothing); of radiographs a frontal one. Raises ConsiliumError on an empty list.
    """
    if not candidates:
        raise ConsiliumError("there is no CT series and no radiograph to choose from; check the folder")

    def order(series: Series) -> tuple[Any, ...]:
        return (
            series.slice_thickness,
            -len(series.headers),
            series.series_number if series.series_number is not None else 1 << 30,
            series.series_uid,
        )

    ct = [s for s in candidates if s.modality == "CT"]
    if ct:
        able = [s for s in ct if s.is_axial] or ct
        longest = max(s.extent for s in able)
        chosen = min((s for s in able if s.extent >= longest / 2), key=order)
    else:
        chosen = min(candidates, key=lambda s: (min(rank_view(h) for h in s.headers), *order(s)))
    if len(candidates) == 1:
        return chosen, []
    others = ", ".join(sorted(_describe_series(s) for s in candidates if s is not chosen))
    return chosen, [
        f"The study has {len(candidates)} series: {_describe_series(chosen)} was read, left out were {others}."
    ]


def rank_view(head: SliceHeader) -> int:
    """0 for a frontal radiograph, 1 where the view is unknown, 2 for a lateral one."""
    return 0 if head.view_position in FRONTAL_VIEWS else 1 if not head.view_position else 2
