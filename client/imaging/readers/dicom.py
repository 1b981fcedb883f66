"""DICOM series and radiographs as volumes: slices ordered by where they lie, never by what their files are called."""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut

from client.imaging.readers.dicom_fast_header import JPEG_2000_SYNTAXES
from client.imaging.readers.dicom_pixels import read_pixels
from client.imaging.readers.dicom_series import (
    Series,
    SliceHeader,
    choose_series,
    compute_slice_normal,
    find_series,
    rank_view,
)
from client.imaging.readers.image_files import natural_sort_key
from client.imaging.readers.volume import Indices, LazyVolume, Volume, take_middle_rows
from common.utils.errors import ConsiliumError

AIR_HU = -1024
POSITION_TOLERANCE = 0.01  # mm


def _format_count(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


def read_dicom(path: Path, series_uid: str | None = None) -> Volume:
    """The scan in a DICOM file or folder.

    `series` is a SeriesInstanceUID; without it the thinnest axial series of the study is read and the others are noted. Raises
    ConsiliumError where there is no CT and no radiograph, where the folder holds several studies, or where too little can be read.
    """
    chosen, notes = _select_series(path, series_uid)
    volume = read_series(chosen)
    volume.notes[:0] = notes
    return volume


def open_dicom(path: Path, series_uid: str | None = None) -> Volume | LazyVolume:
    """As `read_dicom`, with the slices unread where it is certain from the headers alone that all are whole and where their pixels lie."""
    chosen, notes = _select_series(path, series_uid)
    scan = _open_ct(chosen) or read_series(chosen)
    scan.notes[:0] = notes
    return scan


def _select_series(path: Path, series_uid: str | None) -> tuple[Series, list[str]]:
    """The series to read, and what is to be said of the others and of damaged files."""
    found, damaged, other = find_series(path)
    if not found:
        why = (
            f"only {', '.join(sorted(other))}"
            if other
            else f"{_format_count(damaged, 'damaged file')}"
            if damaged
            else "none at all"
        )
        raise ConsiliumError(
            f"{path} holds no CT series and no radiograph in DICOM ({why}); export the scan again or correct the path"
        )
    said: list[str] = []
    notes = [f"{_format_count(damaged, 'file')} with a damaged DICOM header left out."] if damaged else []
    if series_uid is not None:
        named = [s for s in found if s.series_uid == series_uid]
        if not named:
            raise ConsiliumError(
                f"{path} does not hold the series {series_uid}; correct the `series` column of the cohort's table"
            )
        chosen = named[0]
    else:
        studies = len({s.study_uid for s in found})
        if studies > 1:
            raise ConsiliumError(
                f"{path} holds {studies} studies; give each its own folder, or name the series to read in the cohort's table"
            )
        chosen, said = choose_series(found)
    # Damaged headers count against the series: half a scan is not a scan.
    if damaged > len(chosen.files):
        raise ConsiliumError(
            f"{path}: {damaged} of {damaged + len(chosen.files)} files are damaged; export the scan again"
        )
    return chosen, [*notes, *said]


def read_series(series: Series) -> Volume:
    """The pixels of one series; notes say what is missing or was left out. Raises ConsiliumError when under half can be read."""
    return _read_ct(series) if series.modality == "CT" else _read_radiograph(series)


def _order_by_position(series: Series) -> tuple[list[SliceHeader], NDArray[np.float64], float, list[str]]:
    """Slices of one size and orientation in the order they lie, positions [Z] mm, the distance of slices in mm, notes."""
    notes: list[str] = []
    where = series.files[0].parent

    def likeness(head: SliceHeader) -> tuple[Any, ...]:
        return (head.shape, tuple(round(v, 1) + 0.0 for v in head.orientation or ()))

    likes = list(map(likeness, series.headers))
    (shape, turned), _ = Counter(likes).most_common(1)[0]
    heads = [head for head, like in zip(series.headers, likes, strict=True) if like == (shape, turned)]
    if len(heads) < len(series.headers):
        left = _format_count(len(series.headers) - len(heads), "slice")
        notes.append(
            f"{left} of another size or orientation than the majority ({shape[0]} x {shape[1]}) left out."
        )
    heads.sort(
        key=lambda h: (
            h.instance_number if h.instance_number is not None else 1 << 30,
            natural_sort_key(h.path.name),
            h.frame,
        )
    )

    if all(head.position for head in heads):
        normal = compute_slice_normal(heads[0].orientation)
        if heads[0].orientation is None:
            notes.append("The slices' orientation is missing; they are taken as axial.")
        places = np.array([head.position for head in heads]) @ normal
        unit = POSITION_TOLERANCE
    else:
        missing = sum(head.position is None for head in heads)
        if any(head.instance_number is None for head in heads):
            raise ConsiliumError(
                f"{where}: {_format_count(missing, 'slice')} without a position, and instance numbers are missing too; export the scan again"
            )
        notes.append(
            f"{_format_count(missing, 'slice')} without a position: ordered by instance number, so the direction of the slices is not certain."
        )
        places = np.array([float(head.instance_number or 0) for head in heads])
        unit = 0.5

    order = np.argsort(places, kind="stable")
    first = np.concatenate(
        [[True], np.diff(places[order]) > unit]
    )  # of slices in one place the lowest number is kept
    if not first.all():
        notes.append(f"{_format_count(int((~first).sum()), 'slice')} in the same place as another left out.")
    order = order[first]
    heads, places = [heads[i] for i in order], places[order]

    thickness = (
        series.slice_thickness if np.isfinite(series.slice_thickness) and series.slice_thickness > 0 else 1.0
    )
    gaps = np.diff(places)
    usual = float(np.median(gaps)) if len(gaps) else thickness
    absent = int(np.sum(np.rint(gaps / usual) - 1, where=gaps > 1.5 * usual)) if len(gaps) else 0
    if absent:
        notes.append(
            f"About {_format_count(absent, 'slice')} missing: the largest step between slices is {gaps.max() / usual:.2g} times the usual one."
        )
    if unit != POSITION_TOLERANCE:
        return heads, np.arange(len(heads), dtype=np.float64), thickness, notes
    tilt = _estimate_tilt(heads, normal)
    if abs(tilt) > 0.5:
        notes.append(
            f"The gantry was tilted by {abs(tilt):.1f} degrees; the slices are kept as they were taken."
        )
    return heads, places, usual, notes


def _estimate_tilt(heads: list[SliceHeader], normal: NDArray[np.float64]) -> float:
    """Degrees of gantry tilt: what the scanner says, else the angle between the stack's direction and the slices' normal."""
    if heads[0].gantry_tilt or len(heads) < 2:
        return heads[0].gantry_tilt
    along = np.array(heads[-1].position) - np.array(heads[0].position)
    return float(np.degrees(np.arccos(np.clip(abs(along @ normal) / np.linalg.norm(along), 0, 1))))


def _to_hounsfield(raw: NDArray[Any], head: SliceHeader) -> NDArray[np.int16]:
    """Stored values as HU, nothing below air's -1024; padding outside the field of view becomes air."""
    slope, intercept = head.rescale_slope, head.rescale_intercept or 0.0
    if slope == 1 and intercept == int(intercept) and raw.dtype.kind in "iu" and raw.dtype.itemsize <= 2:
        hu = raw.astype(np.int32)
        hu += np.int32(intercept)
    else:
        hu = np.rint(raw.astype(np.float64) * slope + intercept).clip(-(2**31), 2**31 - 1).astype(np.int32)
    if head.padding_value is not None:
        padding = head.padding_value
        if (
            raw.dtype == np.int16 and padding > 32767
        ):  # written as unsigned by scanners that store signed pixels
            padding -= 65536
        hu[raw == padding] = AIR_HU
    return np.clip(hu, AIR_HU, 32767, out=hu).astype(np.int16)


def _decode_pixels(path: Path) -> NDArray[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.asarray(pydicom.dcmread(path, force=True).pixel_array)


def _read_ct(series: Series) -> Volume:
    heads, places, step, notes = _order_by_position(series)
    H, W = heads[0].shape
    voxels = np.empty((len(heads), H, W), np.int16)
    good = np.zeros(len(heads), bool)
    frames: dict[Path, list[int]] = {}
    for i, head in enumerate(heads):
        frames.setdefault(head.path, []).append(i)
    for path, wanted in frames.items():
        try:
            pixels = _decode_pixels(path)
            for i in wanted:
                raw = pixels if pixels.ndim == 2 else pixels[heads[i].frame]
                voxels[i] = _to_hounsfield(raw, heads[i])
                good[i] = True
        except Exception:  # decoders fail in ways of their own; the slice is counted and told of
            continue
    bad = int((~good).sum())
    if bad * 2 > len(heads):
        raise ConsiliumError(
            f"{heads[0].path.parent}: {bad} of {len(heads)} slices cannot be decoded (damaged, or an unknown compression); export it again"
        )
    if bad:
        notes.append(
            f"{bad} of {_format_count(len(heads), 'slice')} cannot be decoded (damaged) and left out."
        )
        voxels, places = voxels[good], places[good]
    spacing, turned = _resolve_geometry(series, heads, notes)
    return Volume(
        _flip_to_radiological(voxels, turned),
        (step, *spacing),
        places,
        "CT",
        notes,
        _compute_origin(heads[0], turned, spacing),
    )


def _resolve_geometry(
    series: Series, heads: list[SliceHeader], notes: list[str]
) -> tuple[tuple[float, float], tuple[bool, bool]]:
    """mm (y, x) of a pixel and how the slices are turned; adds to the notes what is not known or not usual."""
    if all(head.rescale_intercept is None for head in heads):
        notes.append("No rescale intercept: stored values are taken as Hounsfield units.")
    if heads[0].pixel_spacing is None:
        notes.append("The pixel spacing is missing: 1 mm is assumed.")
    turned = _detect_flips(series, heads[0])
    if any(turned):
        notes.append(
            "The slices were stored turned and were brought to the usual view (front up, patient's right at the left)."
        )
    elif not series.is_axial and heads[0].orientation is not None:
        notes.append("The slices are not axial.")
    return heads[0].pixel_spacing or (1.0, 1.0), turned


def _open_ct(series: Series) -> LazyVolume | None:
    """A CT of which every slice is a file of its own whose pixels can be found; else None."""
    if series.modality != "CT" or any(head.pixel_location is None for head in series.headers):
        return None
    heads, places, step, notes = _order_by_position(series)
    spacing, turned = _resolve_geometry(series, heads, notes)

    def read(z: int) -> NDArray[np.int16]:
        return _flip_to_radiological(_to_hounsfield(read_pixels(heads[z]), heads[z]), turned)

    def small(which: Indices, step: int) -> NDArray[np.int16]:
        return np.stack(
            [
                _flip_to_radiological(_read_reduced(heads[z], step, turned[0]), (False, turned[1]))
                for z in which
            ]
        )

    H, W = heads[0].shape
    return LazyVolume((len(heads), H, W), (step, *spacing), places, True, read, small, notes)


def _read_reduced(head: SliceHeader, reduction: int, upside_down: bool) -> NDArray[np.int16]:
    """One slice reduced by `step`, its rows turned if they are to be; the columns not yet. Of plain pixels only `middle_rows` are read."""
    assert head.pixel_location is not None
    H, W = head.shape
    if reduction > 1 and head.pixel_location.transfer_syntax in JPEG_2000_SYNTAXES:
        small = np.ascontiguousarray(
            _to_hounsfield(read_pixels(head, reduction), head)[: H // reduction, : W // reduction]
        )
        return small[::-1] if upside_down else small
    raw = read_pixels(head)
    raw = raw[::-1] if upside_down else raw
    if reduction == 1:
        return _to_hounsfield(raw, head)
    hu = _to_hounsfield(take_middle_rows(raw, reduction), head)
    return np.asarray(cv2.resize(hu, (W // reduction, H // reduction), interpolation=cv2.INTER_AREA))


def _detect_flips(series: Series, head: SliceHeader) -> tuple[bool, bool]:
    """Whether rows and columns of an axial series run against the radiological view (to the front; to the patient's right)."""
    if not series.is_axial or head.orientation is None or abs(head.orientation[0]) < 0.7:
        return False, False
    return head.orientation[4] <= 0, head.orientation[0] <= 0


def _compute_origin(
    head: SliceHeader, turned: tuple[bool, bool], spacing: tuple[float, float]
) -> tuple[float, float]:
    """mm (x, y) in LPS of the first pixel once the slices are upright; a tilted stack's is its lowest slice's."""
    if head.position is None or head.orientation is None:
        return 0.0, 0.0
    (H, W), row, column = head.shape, np.array(head.orientation[:3]), np.array(head.orientation[3:])
    first = (
        np.array(head.position)
        + turned[0] * (H - 1) * spacing[0] * column
        + turned[1] * (W - 1) * spacing[1] * row
    )
    return float(first[0]), float(first[1])


def _flip_to_radiological(voxels: NDArray[np.int16], flips: tuple[bool, bool]) -> NDArray[np.int16]:
    """Slices [..., H, W] in the radiological view: columns to the patient's left, rows to the back. Prone scans are stored turned."""
    up, across = flips
    return np.ascontiguousarray(voxels[..., :: -1 if up else 1, :: -1 if across else 1])


def _read_radiograph(series: Series) -> Volume:
    """The series' first frontal image, by its own window (or percentiles 1..99), bone bright, uint8 [1, H, W]."""
    heads = sorted(
        series.headers,
        key=lambda h: (
            rank_view(h),
            h.instance_number if h.instance_number is not None else 1 << 30,
            natural_sort_key(h.path.name),
            h.frame,
        ),
    )
    head, notes = heads[0], []
    if len(heads) > 1:
        notes.append(
            f"One of {len(heads)} radiographs in the series was read, a frontal one where the view is known."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dataset = pydicom.dcmread(head.path, force=True)
            pixels = np.asarray(dataset.pixel_array)
            if int(dataset.get("NumberOfFrames") or 1) > 1:
                pixels = pixels[head.frame]
            if pixels.ndim == 3:  # a colour copy of a grey image
                pixels = pixels.mean(axis=-1)
                low, high = 0.0, 255.0
            else:
                grey = apply_modality_lut(pixels, dataset)
                pixels = apply_voi_lut(grey, dataset).astype(np.float32)
                low, high = float(pixels.min()), float(pixels.max())
                # No window, or one that shows nothing: without outliers such as burnt-in markers and the collimator.
                if not ("WindowCenter" in dataset or "VOILUTSequence" in dataset) or high <= low:
                    pixels = grey.astype(np.float32)
                    low, high = (float(v) for v in np.percentile(pixels, (1, 99)))
            shown = ((pixels - low) * (255.0 / max(high - low, 1e-6))).clip(0, 255).astype(np.uint8)
            if dataset.get("PhotometricInterpretation") == "MONOCHROME1":
                shown = 255 - shown
    except Exception as error:  # decoders fail in ways of their own
        raise ConsiliumError(
            f"{head.path} cannot be decoded ({type(error).__name__}); export the radiograph again"
        ) from error
    return Volume(shown[None], (1.0, *(head.pixel_spacing or (1.0, 1.0))), np.zeros(1), "XR", notes)
