"""CT series as volumes in Hounsfield units: read at once, or opened to be read slice by slice."""

from __future__ import annotations

import warnings
from collections import defaultdict
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pydicom
from numpy.typing import NDArray

from client.imaging.readers.dicom_fast_header import JPEG_2000_SYNTAXES
from client.imaging.readers.dicom_geometry import (
    Flips,
    compute_origin,
    detect_flips,
    flip_to_radiological,
    format_count,
    get_pixel_spacing,
    order_slices,
)
from client.imaging.readers.dicom_pixels import read_pixels
from client.imaging.readers.dicom_series import Series
from client.imaging.readers.dicom_slice_header import SliceHeader
from client.imaging.readers.volume import Indices, LazyVolume, Volume, take_middle_rows
from common.utils.errors import ConsiliumError

AIR_HU = -1024
MAX_HU = 32767


def read_ct(series: Series) -> Volume:
    """Read the pixels of a CT series; notes say what is missing or was left out.

    Raises:
        ConsiliumError: Fewer than half of the slices can be decoded, or their order is unknown.
    """
    stack = order_slices(series)
    voxels, is_decoded = _decode_slices(stack.headers)
    slice_count = len(stack.headers)
    failures = int((~is_decoded).sum())
    if failures * 2 > slice_count:
        raise ConsiliumError(
            f"{stack.headers[0].path.parent}: {failures} of {slice_count} slices cannot be decoded "
            "(damaged, or an unknown compression); export it again"
        )
    positions = stack.positions
    if failures:
        stack.notes.append(
            f"{failures} of {format_count(slice_count, 'slice')} cannot be decoded (damaged) and left out."
        )
        voxels = voxels[is_decoded]
        positions = positions[is_decoded]
    first = stack.headers[0]
    flips = detect_flips(series, first)
    _note_geometry(series, stack.headers, flips, stack.notes)
    return Volume(
        voxels=flip_to_radiological(voxels, flips),
        spacing=(stack.spacing, *get_pixel_spacing(first)),
        positions=positions,
        modality="CT",
        notes=stack.notes,
        origin=compute_origin(first, flips),
    )


def open_ct(series: Series) -> LazyVolume | None:
    """Open a CT whose slices are files with located pixels; return None for any other series."""
    if series.modality != "CT" or any(header.pixel_location is None for header in series.headers):
        return None
    stack = order_slices(series)
    headers = stack.headers
    flips = detect_flips(series, headers[0])
    _note_geometry(series, headers, flips, stack.notes)

    def read_slice(z: int) -> NDArray[np.int16]:
        header = headers[z]
        return flip_to_radiological(_to_hounsfield(read_pixels(header), header), flips)

    def read_reduced(indices: Indices, reduction: int) -> NDArray[np.int16]:
        return np.stack([_read_reduced_slice(headers[z], reduction, flips) for z in indices])

    H, W = headers[0].shape
    return LazyVolume(
        shape=(len(headers), H, W),
        spacing=(stack.spacing, *get_pixel_spacing(headers[0])),
        positions=stack.positions,
        is_hounsfield=True,
        read_slice=read_slice,
        read_reduced=read_reduced,
        notes=stack.notes,
    )


def _decode_slices(headers: list[SliceHeader]) -> tuple[NDArray[np.int16], NDArray[np.bool_]]:
    """Return the slices [Z, H, W] in HU, and for each [Z] whether it could be decoded."""
    H, W = headers[0].shape
    voxels = np.empty((len(headers), H, W), np.int16)
    is_decoded = np.zeros(len(headers), bool)
    slices_by_file: dict[Path, list[int]] = defaultdict(list)
    for z, header in enumerate(headers):
        slices_by_file[header.path].append(z)
    for path, slice_indices in slices_by_file.items():
        try:
            pixels = _decode_pixels(path)
            for z in slice_indices:
                frame = pixels if pixels.ndim == 2 else pixels[headers[z].frame]
                voxels[z] = _to_hounsfield(frame, headers[z])
                is_decoded[z] = True
        except Exception:  # decoders fail in ways of their own; the caller counts the slices that are left
            continue
    return voxels, is_decoded


def _decode_pixels(path: Path) -> NDArray[Any]:
    """Return the stored values of a file, [H, W] or [frames, H, W], decoded by pydicom."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return np.asarray(pydicom.dcmread(path, force=True).pixel_array)


def _note_geometry(series: Series, headers: list[SliceHeader], flips: Flips, notes: list[str]) -> None:
    """Note what is unknown or unusual in the series' units and orientation."""
    first = headers[0]
    if all(header.rescale_intercept is None for header in headers):
        notes.append("No rescale intercept: stored values are taken as Hounsfield units.")
    if first.pixel_spacing is None:
        notes.append("The pixel spacing is missing: 1 mm is assumed.")
    if flips.rows or flips.columns:
        notes.append(
            "The slices were stored turned and were brought to the usual view "
            "(front up, patient's right at the left)."
        )
    elif not series.is_axial and first.orientation is not None:
        notes.append("The slices are not axial.")


def _to_hounsfield(raw: NDArray[Any], header: SliceHeader) -> NDArray[np.int16]:
    """Return stored values as HU from air's -1024 on; padding outside the field of view becomes air."""
    slope = header.rescale_slope
    intercept = header.rescale_intercept or 0.0
    is_short_integer = raw.dtype.kind in "iu" and raw.dtype.itemsize <= 2
    if slope == 1 and intercept == int(intercept) and is_short_integer:
        hu = raw.astype(np.int32)
        hu += np.int32(intercept)
    else:
        rescaled = np.rint(raw.astype(np.float64) * slope + intercept)
        hu = rescaled.clip(-(2**31), 2**31 - 1).astype(np.int32)
    padding = header.padding_value
    if padding is not None:
        # Scanners that store signed pixels write the value as an unsigned one.
        if raw.dtype == np.int16 and padding > 32767:
            padding -= 65536
        hu[raw == padding] = AIR_HU
    return np.clip(hu, AIR_HU, MAX_HU, out=hu).astype(np.int16)


def _read_reduced_slice(header: SliceHeader, reduction: int, flips: Flips) -> NDArray[np.int16]:
    """Read one slice [H // reduction, W // reduction] in the radiological view.

    JPEG 2000 is decoded at the reduced size; of other pixels only `take_middle_rows` are averaged.
    """
    assert header.pixel_location is not None
    H, W = header.shape
    if reduction > 1 and header.pixel_location.transfer_syntax in JPEG_2000_SYNTAXES:
        hu = _to_hounsfield(read_pixels(header, reduction), header)
        return flip_to_radiological(hu[: H // reduction, : W // reduction], flips)
    raw = read_pixels(header)
    # Rows are flipped before they are reduced: which row is the middle one depends on where counting begins.
    if flips.rows:
        raw = raw[::-1]
    if reduction == 1:
        hu = _to_hounsfield(raw, header)
    else:
        hu = _to_hounsfield(take_middle_rows(raw, reduction), header)
        size = (W // reduction, H // reduction)
        hu = np.asarray(cv2.resize(hu, size, interpolation=cv2.INTER_AREA))
    return flip_to_radiological(hu, Flips(columns=flips.columns))
