"""DICOM series by their headers, before a pixel is decoded: their slices, and which one to read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from client.imaging.readers.dicom_fast_header import FastHeader, parse_header_fast
from client.imaging.readers.dicom_slice_header import (
    UNKNOWN_NUMBER_RANK,
    HeaderValues,
    SliceHeader,
    Vector,
    iter_slice_headers,
    parse_integer,
    rank_view,
    read_header,
)
from client.imaging.readers.image_files import natural_sort_key
from common.utils.errors import ConsiliumError

RADIOGRAPH_MODALITIES = ("CR", "DX", "DR", "RG")
# Cosine between the slices' normal and the body's axis; a gantry tilts by up to 30 degrees (0.87).
MIN_AXIAL_COSINE = 0.8


@dataclass(frozen=True)
class Series:
    """The images of one series.

    `study_uid`, `series_uid` and `patient_id` identify a person: they stay in the hospital's own tables.
    """

    study_uid: str
    series_uid: str
    patient_id: str
    modality: str  # "CT" | "XR"
    series_number: int | None
    headers: tuple[SliceHeader, ...]
    slice_thickness: float  # mm; the distance of slices where it is unknown, infinite where both are
    extent: float  # mm from the first slice to the last
    is_axial: bool

    @property
    def files(self) -> list[Path]:
        """The series' files, each once."""
        return list(dict.fromkeys(header.path for header in self.headers))


class SeriesSearch(NamedTuple):
    """What a folder holds of DICOM."""

    series: list[Series]
    damaged_files: int  # DICOM files whose header cannot be read
    other_kinds: set[str]  # modalities, and kinds of image, that are no scan


class SeriesChoice(NamedTuple):
    """The series to read of a study."""

    series: Series
    notes: list[str]  # which other series there are


@dataclass(frozen=True)
class _ImageFile:
    """The headers in one file of a CT or a radiograph."""

    study_uid: str
    series_uid: str
    patient_id: str
    modality: str
    series_number: int | None
    headers: list[SliceHeader]


class _NotAScan(Exception):
    """Raised for a DICOM file that holds no scan; its argument, if any, names what it holds."""


def is_dicom(path: Path) -> bool:
    """Check whether the file begins as DICOM does, or is called `.dcm` or `.ima`.

    Old exports lack the preamble.
    """
    try:
        with path.open("rb") as file:
            preamble = file.read(132)
    except OSError:
        return False
    return preamble[128:] == b"DICM" or path.suffix.lower() in (".dcm", ".ima")


def find_series(path: Path) -> SeriesSearch:
    """Find all series of CT slices or radiographs in a DICOM file, or in a folder and those below it."""
    files_by_series: dict[tuple[str, str], list[_ImageFile]] = {}
    damaged_files = 0
    other_kinds: set[str] = set()
    for file in _iter_files(path):
        try:
            fast_header = parse_header_fast(file)
        except OSError:
            continue
        if fast_header is None and not is_dicom(file):
            continue
        try:
            image_file = _read_image_file(file, fast_header)
        except _NotAScan as kind:
            other_kinds.update(kind.args)
            continue
        except Exception:  # a damaged header can fail in any way
            damaged_files += 1
            continue
        key = (image_file.study_uid, image_file.series_uid)
        files_by_series.setdefault(key, []).append(image_file)
    series = list(map(_build_series, files_by_series.values()))
    return SeriesSearch(series, damaged_files, other_kinds)


def choose_series(candidates: list[Series]) -> SeriesChoice:
    """Choose the series to read of one study, and note the others by number and thickness.

    CT comes before radiographs and axial before others; then the thinnest one that covers at least half of
    what the longest covers (a bolus-tracking series is thin but covers nothing). Of radiographs, a frontal
    one.

    Raises:
        ConsiliumError: There is no candidate.
    """
    if not candidates:
        raise ConsiliumError("there is no CT series and no radiograph to choose from; check the folder")
    ct_series = [series for series in candidates if series.modality == "CT"]
    if ct_series:
        chosen = _choose_ct_series(ct_series)
    else:
        chosen = min(candidates, key=_radiograph_preference)
    if len(candidates) == 1:
        return SeriesChoice(chosen, [])
    others = sorted(_describe_series(series) for series in candidates if series is not chosen)
    note = (
        f"The study has {len(candidates)} series: {_describe_series(chosen)} was read, "
        f"left out were {', '.join(others)}."
    )
    return SeriesChoice(chosen, [note])


def compute_slice_normal(orientation: Vector | None) -> np.ndarray:
    """Return the slices' unit normal, its largest part pointing to the head, the back or the left."""
    axial_normal = np.array([0.0, 0.0, 1.0])
    if orientation is None:
        return axial_normal
    normal = np.cross(orientation[:3], orientation[3:])
    length = float(np.linalg.norm(normal))
    if length < 1e-6:
        return axial_normal
    normal = normal / length
    largest_part = normal[np.abs(normal).argmax()]
    if largest_part > 0:
        return normal
    return -normal


def _iter_files(path: Path) -> Iterator[Path]:
    """Yield the file, or the files of a folder and those below it in natural order, hidden ones left out."""
    if path.is_file():
        yield path
        return
    for root, folders, names in os.walk(path):
        folders.sort()
        for name in sorted(names, key=natural_sort_key):
            if not name.startswith("."):
                yield Path(root, name)


def _read_image_file(file: Path, fast_header: FastHeader | None) -> _ImageFile:
    """Read a file's headers. Raises _NotAScan, or anything else where the header is damaged."""
    values: HeaderValues
    if fast_header is None:
        values = read_header(file)
        pixel_location = None
    else:
        values, pixel_location = fast_header
    modality = _detect_modality(file, values)
    headers = list(iter_slice_headers(file, values, pixel_location))
    return _ImageFile(
        study_uid=str(values.get("StudyInstanceUID") or ""),
        series_uid=str(values.get("SeriesInstanceUID") or ""),
        patient_id=str(values.get("PatientID") or ""),
        modality=modality,
        series_number=parse_integer(values.get("SeriesNumber")),
        headers=headers,
    )


def _detect_modality(file: Path, values: HeaderValues) -> str:
    """Return "CT" or "XR". Raises _NotAScan for any other file, ValueError for a damaged one."""
    modality = str(values.get("Modality") or "")
    if modality in RADIOGRAPH_MODALITIES:
        return "XR"
    if modality == "CT":
        image_type = [str(part).upper() for part in values.get("ImageType") or []]
        # Localisers show where the scan was taken; colour CT images are dose reports and screenshots.
        if "LOCALIZER" in image_type or int(values.get("SamplesPerPixel") or 1) != 1:
            raise _NotAScan("CT localiser or screenshot")
        return "CT"
    if modality:
        raise _NotAScan(modality)
    is_directory = "DirectoryRecordSequence" in values or file.name.upper() == "DICOMDIR"
    if is_directory or "SeriesInstanceUID" in values:
        raise _NotAScan
    raise ValueError("the header names neither a modality nor a series")


def _build_series(files: list[_ImageFile]) -> Series:
    """Join the files of one series; what they should have in common is the first file's."""
    first = files[0]
    headers = [header for file in files for header in file.headers]
    orientations = [header.orientation for header in headers if header.orientation]
    normal = compute_slice_normal(orientations[0] if orientations else None)
    distances = [float(normal @ header.position) for header in headers if header.position]
    positions = np.unique(np.round(distances, 2))
    return Series(
        study_uid=first.study_uid,
        series_uid=first.series_uid,
        patient_id=first.patient_id,
        modality=first.modality,
        series_number=first.series_number,
        headers=tuple(headers),
        slice_thickness=_measure_thickness(headers, positions),
        extent=float(positions[-1] - positions[0]) if len(positions) else 0.0,
        is_axial=bool(orientations) and bool(abs(normal[2]) >= MIN_AXIAL_COSINE),
    )


def _measure_thickness(headers: Iterable[SliceHeader], positions: np.ndarray) -> float:
    """Return the median thickness in mm, else the median distance of slices, else infinity."""
    thicknesses = [header.slice_thickness for header in headers if header.slice_thickness]
    if thicknesses:
        return float(np.median(thicknesses))
    if len(positions) > 1:
        return float(np.median(np.diff(positions)))
    return float("inf")


def _choose_ct_series(candidates: list[Series]) -> Series:
    """Choose the thinnest of the axial series that are long enough; of all series where none is axial."""
    axial = [series for series in candidates if series.is_axial]
    eligible = axial or candidates
    longest = max(series.extent for series in eligible)
    long_enough = [series for series in eligible if series.extent >= longest / 2]
    return min(long_enough, key=_thinness_preference)


def _thinness_preference(series: Series) -> tuple[Any, ...]:
    """Return a key that is smallest for the thinnest series, then the one of most images, then the first."""
    number = series.series_number
    if number is None:
        number = UNKNOWN_NUMBER_RANK
    return series.slice_thickness, -len(series.headers), number, series.series_uid


def _radiograph_preference(series: Series) -> tuple[Any, ...]:
    """Return a key that is smallest for the series with the most frontal view."""
    return min(map(rank_view, series.headers)), *_thinness_preference(series)


def _describe_series(series: Series) -> str:
    """Return a description such as `number 4 (1.25 mm, 30 images)`, which identifies nobody."""
    number = "without a number" if series.series_number is None else f"number {series.series_number}"
    image_count = f"{len(series.headers)} image"
    if len(series.headers) != 1:
        image_count += "s"
    if np.isfinite(series.slice_thickness):
        return f"{number} ({series.slice_thickness:.3g} mm, {image_count})"
    return f"{number} ({image_count})"
