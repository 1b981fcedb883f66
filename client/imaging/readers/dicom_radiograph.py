"""Radiographs in DICOM as grey images with bone bright."""

from __future__ import annotations

import warnings

import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset
from pydicom.pixels.processing import apply_modality_lut, apply_voi_lut

from client.imaging.readers.dicom_geometry import get_pixel_spacing
from client.imaging.readers.dicom_series import Series
from client.imaging.readers.dicom_slice_header import SliceHeader, acquisition_sort_key, rank_view
from client.imaging.readers.volume import Volume
from common.utils.errors import ConsiliumError


def read_radiograph(series: Series) -> Volume:
    """Read the series' first frontal image as uint8 [1, H, W], bone bright, by its own window.

    Without a window, or with one that shows nothing, percentiles 1 to 99 become black and white.

    Raises:
        ConsiliumError: The image cannot be decoded.
    """
    headers = sorted(
        series.headers, key=lambda candidate: (rank_view(candidate), *acquisition_sort_key(candidate))
    )
    header = headers[0]
    notes: list[str] = []
    if len(headers) > 1:
        notes.append(
            f"One of {len(headers)} radiographs in the series was read, "
            "a frontal one where the view is known."
        )
    try:
        grey = _decode_grey(header)
    except Exception as error:  # decoders fail in ways of their own
        raise ConsiliumError(
            f"{header.path} cannot be decoded ({type(error).__name__}); export the radiograph again"
        ) from error
    return Volume(
        voxels=grey[None],
        spacing=(1.0, *get_pixel_spacing(header)),
        positions=np.zeros(1),
        modality="XR",
        notes=notes,
    )


def _decode_grey(header: SliceHeader) -> NDArray[np.uint8]:
    """Decode one radiograph [H, W] to 0..255, bone bright."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dataset = pydicom.dcmread(header.path, force=True)
        pixels = np.asarray(dataset.pixel_array)
        if int(dataset.get("NumberOfFrames") or 1) > 1:
            pixels = pixels[header.frame]
        if pixels.ndim == 3:  # a colour copy of a grey image
            pixels = pixels.mean(axis=-1)
            low, high = 0.0, 255.0
        else:
            pixels, low, high = _apply_luts(pixels, dataset)
        scaled = (pixels - low) * (255.0 / max(high - low, 1e-6))
        grey = scaled.clip(0, 255).astype(np.uint8)
        if dataset.get("PhotometricInterpretation") == "MONOCHROME1":
            grey = 255 - grey
    return grey


def _apply_luts(pixels: NDArray[np.generic], dataset: Dataset) -> tuple[NDArray[np.float32], float, float]:
    """Return the values after DICOM's look-up tables, and those that become black and white."""
    rescaled = apply_modality_lut(pixels, dataset)
    windowed = apply_voi_lut(rescaled, dataset).astype(np.float32)
    low = float(windowed.min())
    high = float(windowed.max())
    has_window = "WindowCenter" in dataset or "VOILUTSequence" in dataset
    if has_window and high > low:
        return windowed, low, high
    # The outliers that are cut off are markers burnt into the image, and the collimator.
    unwindowed = rescaled.astype(np.float32)
    low, high = map(float, np.percentile(unwindowed, (1, 99)))
    return unwindowed, low, high
