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

from client.readers.glance import Pixels, glance
from client.readers.pictures import natural
from common.errors import ConsiliumError

RADIOGRAPH = ("CR", "DX", "DR", "RG")
FRONTAL = ("PA", "AP")
AXIAL = 0.8  # cosine between the slices' normal and the body's axis; a gantry tilts by up to 30 degrees (0.87)
_TAGS = [
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
class Head:
    """One slice's (or radiograph's) header: a file, or one frame of a multi-frame file."""

    path: Path
    frame: int
    shape: tuple[int, int]
    position: Vector | None  # mm, of the first pixel
    orientation: Vector | None  # direction of the rows, then of the columns
    spacing: tuple[float, float] | None  # mm (y, x)
    thickness: float | None  # mm
    tilt: float  # degrees
    number: int | None
    slope: float
    intercept: float | None
    padding: int | None
    view: str
    pixels: Pixels | None = None  # where they lie, if that is certain without reading them


@dataclass(frozen=True)
class Series:
    """The images of one series. `study`, `series` and `patient` identify: they stay in the hospital's own tables."""

    study: str
    series: str
    patient: str
    modality: str  # "CT" | "XR"
    number: int | None
    heads: tuple[Head, ...]
    thickness: float  # mm of a slice, or the distance of slices where that is unknown; infinite where both are
    extent: float  # mm from the first slice to the last
    axial: bool

    @property
    def files(self) -> list[Path]:
        """The series' files, each once."""
        return list(dict.fromkeys(head.path for head in self.heads))


def is_dicom(path: Path) -> bool:
    """Whether the file begins as DICOM does, or is called `.dcm`/`.ima` (old exports lack the preamble)."""
    try:
        with path.open("rb") as file:
            return file.read(132)[128:] == b"DICM" or path.suffix.lower() in (".dcm", ".ima")
    except OSError:
        return False


def _files(path: Path) -> Iterator[Path]:
    if path.is_file():
        yield path
        return
    for root, folders, files in os.walk(path):
        folders.sort()
        yield from (Path(root, file) for file in sorted(files, key=natural) if not file.startswith("."))


def _floats(value: Any, length: int) -> Vector | None:
    """`length` finite numbers, or None: scanners leave these tags out, empty or damaged."""
    try:
        numbers = tuple(float(v) for v in value)
    except (TypeError, ValueError):
        return None
    return numbers if len(numbers) == length and all(map(math.isfinite, numbers)) else None


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _group(dataset: Dataset | dict[str, Any], frame: int, sequence: str, tag: str) -> Any:
    """A tag of a multi-frame file: the frame's own, else the shared one, else the file's."""
    if isinstance(dataset, dict):  # of a plain file, which has one frame
        return dataset.get(tag)
    for groups, index in (("PerFrameFunctionalGroupsSequence", frame), ("SharedFunctionalGroupsSequence", 0)):
        items = dataset.get(groups) or []
        inner = items[index].get(sequence) if index < len(items) else None
        if inner and tag in inner[0]:
            return inner[0].get(tag)
    return dataset.get(tag)


def _needed(dataset: Dataset | dict[str, Any], tag: str) -> Any:
    """A tag without which there is no image. Raises KeyError."""
    found = dataset.get(tag)
    if found is None:
        raise KeyError(tag)
    return found


def _heads(path: Path, dataset: Dataset | dict[str, Any], pixels: Pixels | None) -> Iterator[Head]:
    """One head a frame; a plain file is one frame."""
    for frame in range(int(dataset.get("NumberOfFrames") or 1)):
        place = _floats(_group(dataset, frame, "PlanePositionSequence", "ImagePositionPatient"), 3)
        spacing = _floats(_group(dataset, frame, "PixelMeasuresSequence", "PixelSpacing"), 2) or _floats(
            dataset.get("ImagerPixelSpacing"), 2
        )
        number = _number(dataset.get("InstanceNumber"))
        padding = _number(dataset.get("PixelPaddingValue"))
        yield Head(
            path=path,
            frame=frame,
            shape=(int(_needed(dataset, "Rows")), int(_needed(dataset, "Columns"))),
            position=place,
            orientation=_floats(_group(dataset, frame, "PlaneOrientationSequence", "ImageOrientationPatient"), 6),
            spacing=(spacing[0], spacing[1]) if spacing and min(spacing) > 0 else None,
            thickness=_number(_group(dataset, frame, "PixelMeasuresSequence", "SliceThickness")),
            tilt=_number(dataset.get("GantryDetectorTilt")) or 0.0,
            number=None if number is None else int(number) + frame,
            slope=_number(_group(dataset, frame, "PixelValueTransformationSequence", "RescaleSlope")) or 1.0,
            intercept=_number(_group(dataset, frame, "PixelValueTransformationSequence", "RescaleIntercept")),
            padding=None if padding is None else int(padding),
            view=str(dataset.get("ViewPosition") or "").upper(),
            pixels=pixels,
        )


def normal_of(orientation: Vector | None) -> np.ndarray:
    """The slices' unit normal, turned so that its largest part points to the head, the back or the left."""
    if orientation is None:
        return np.array([0.0, 0.0, 1.0])
    normal = np.cross(orientation[:3], orientation[3:])
    length = float(np.linalg.norm(normal))
    if length < 1e-6:
        return np.array([0.0, 0.0, 1.0])
    normal = normal / length
    return normal if normal[np.abs(normal).argmax()] > 0 else -normal


def _series(study: str, series: str, patient: str, modality: str, number: int | None, heads: list[Head]) -> Series:
    normal = normal_of(next((h.orientation for h in heads if h.orientation), None))
    places = np.unique(np.round([float(normal @ h.position) for h in heads if h.position], 2))
    thick = [h.thickness for h in heads if h.thickness]
    gap = float(np.median(np.diff(places))) if len(places) > 1 else np.inf
    axial = any(h.orientation for h in heads) and bool(abs(normal[2]) >= AXIAL)
    extent = float(places[-1] - places[0]) if len(places) else 0.0
    return Series(study, series, patient, modality, number, tuple(heads), float(np.median(thick)) if thick else gap, extent, axial)


def _dataset(file: Path) -> Dataset | dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd but harmless values; what matters is checked by who asked
        return pydicom.dcmread(file, stop_before_pixels=True, specific_tags=[*_TAGS], force=True)


def scan_headers(path: Path) -> tuple[list[Series], int, set[str]]:
    """All series at `path`, how many DICOM files have a damaged header, and the modalities that were passed over."""
    found: dict[tuple[str, str], tuple[str, str, int | None, list[Head]]] = {}
    damaged, other = 0, set[str]()
    for file in _files(path):
        try:
            seen = glance(file)
        except OSError:
            continue
        if seen is None and not is_dicom(file):
            continue
        try:
            dataset, pixels = seen or (_dataset(file), None)
            modality = str(dataset.get("Modality") or "")
            kind = "CT" if modality == "CT" else "XR" if modality in RADIOGRAPH else ""
            if not kind:
                if modality:
                    other.add(modality)
                elif "SeriesInstanceUID" not in dataset and "DirectoryRecordSequence" not in dataset and file.name.upper() != "DICOMDIR":
                    damaged += 1
                continue
            image_type = [str(part).upper() for part in dataset.get("ImageType") or []]
            # Scouts show where the scan was taken; colour CT images are dose reports and screenshots.
            if kind == "CT" and ("LOCALIZER" in image_type or int(dataset.get("SamplesPerPixel") or 1) != 1):
                other.add("CT localiser or screenshot")
                continue
            heads = list(_heads(file, dataset, pixels))
            key = (str(dataset.get("StudyInstanceUID") or ""), str(dataset.get("SeriesInstanceUID") or ""))
            number = _number(dataset.get("SeriesNumber"))
            patient = str(dataset.get("PatientID") or "")
        except Exception:  # the header of a damaged file can fail in any way; it is counted and told of
            damaged += 1
            continue
        found.setdefault(key, (patient, kind, None if number is None else int(number), []))[3].extend(heads)
    return [_series(*key, patient, kind, number, heads) for key, (patient, kind, number, heads) in found.items()], damaged, other


def _named(series: Series) -> str:
    number = "without a number" if series.number is None else f"number {series.number}"
    thick = f"{series.thickness:.3g} mm, " if np.isfinite(series.thickness) else ""
    return f"{number} ({thick}{len(series.heads)} image{'s' * (len(series.heads) != 1)})"


def choose_series(found: list[Series]) -> tuple[Series, list[str]]:
    """The series to read of one study, and a note naming the others by number and thickness.

    CT before radiographs, axial before others, then the thinnest one that covers at least half of what the longest covers (a
    bolus-tracking series is thin but covers nothing); of radiographs a frontal one. Raises ConsiliumError on an empty list.
    """
    if not found:
        raise ConsiliumError("there is no CT series and no radiograph to choose from; check the folder")

    def order(series: Series) -> tuple[Any, ...]:
        return (series.thickness, -len(series.heads), series.number if series.number is not None else 1 << 30, series.series)

    ct = [s for s in found if s.modality == "CT"]
    if ct:
        able = [s for s in ct if s.axial] or ct
        longest = max(s.extent for s in able)
        chosen = min((s for s in able if s.extent >= longest / 2), key=order)
    else:
        chosen = min(found, key=lambda s: (min(view_rank(h) for h in s.heads), *order(s)))
    if len(found) == 1:
        return chosen, []
    others = ", ".join(sorted(_named(s) for s in found if s is not chosen))
    return chosen, [f"The study has {len(found)} series: {_named(chosen)} was read, left out were {others}."]


def view_rank(head: Head) -> int:
    """0 for a frontal radiograph, 1 where the view is unknown, 2 for a lateral one."""
    return 0 if head.view in FRONTAL else 1 if not head.view else 2
