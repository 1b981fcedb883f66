"""Masks of scans: read, and brought to the geometry of the kept slices.

A mask is a NIfTI file, a picture, or a folder of pictures, as large as its scan. A lung mask of a CT labels
the lungs: 1 is the patient's right one (at the image's left), 2 the left one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from client.imaging import lung_segmentation
from client.imaging.lung_segmentation import Box
from client.imaging.lung_segmentation_xr import segment_radiograph_lungs
from client.imaging.readers.image_files import IMAGE_SUFFIXES, read_image_file, read_slice_folder
from client.imaging.readers.nifti import NIFTI_SUFFIXES, read_axial_array
from client.imaging.readers.volume import Volume
from client.imaging.slice_pipeline import GREY_WINDOW, Window, letterbox_box
from common.utils.errors import ConsiliumError

ASPECT_TOLERANCE = 0.02  # by how much a picture's shape may differ from its scan's and still show the same
RADIOGRAPH_HU_WINDOW: Window = (-1000.0, 300.0)


class _MaskValues(NamedTuple):
    """What the files of a mask hold."""

    values: NDArray[Any]  # [Z, H, W]
    is_nifti: bool

    def binarise(self) -> NDArray[np.uint8]:
        """Return 1 above 0 in NIfTI, above half of the largest value in pictures; else 0."""
        threshold = 0 if self.is_nifti else self.values.max() / 2
        return (self.values > threshold).astype(np.uint8)


def read_mask(path: Path) -> NDArray[np.uint8]:
    """Read a mask as uint8 [Z, H, W]: 1 above 0 in NIfTI, above half of the largest value in pictures.

    Raises:
        ConsiliumError: Nothing can be read.
        FileNotFoundError: There is no such file.
    """
    return _read_values(path).binarise()


def read_lung_mask(path: Path, split_sides: bool) -> NDArray[np.uint8]:
    """Read a lung mask: 0 or 1, or with `split_sides` 1 for the right lung and 2 for the left.

    A file that holds exactly 0, 1 and 2 labels the lungs itself; of any other the two sides are found.

    Raises:
        ConsiliumError: Nothing can be read.
        FileNotFoundError: There is no such file.
    """
    content = _read_values(path)
    labels_sides = np.array_equal(np.unique(content.values), [0, 1, 2])
    if labels_sides and split_sides:
        return content.values.astype(np.uint8)
    if labels_sides:
        return (content.values > 0).astype(np.uint8)
    mask = content.binarise()
    if split_sides:
        return lung_segmentation.label_sides(mask)
    return mask


def find_lung_mask(volume: Volume, is_ct: bool) -> NDArray[np.uint8]:
    """Segment the lungs of a scan [Z, H, W]: 1 right and 2 left of a CT, 1 of a radiograph, 0 elsewhere."""
    if is_ct:
        return lung_segmentation.label_sides(lung_segmentation.make_lung_mask(volume.voxels))
    window = RADIOGRAPH_HU_WINDOW if volume.is_hounsfield else GREY_WINDOW
    lungs = [
        segment_radiograph_lungs(lung_segmentation.apply_window(image, window)) for image in volume.voxels
    ]
    return np.stack(lungs).astype(np.uint8)


def resize_to_scan(mask: NDArray[np.uint8], shape: tuple[int, int, int], is_image: bool) -> NDArray[np.uint8]:
    """Return the mask at its scan's `shape` [Z, H, W]; an image of the same aspect ratio is resized.

    Raises:
        ConsiliumError: The mask cannot be this scan's; the message holds no name.
    """
    if mask.shape == shape:
        return mask
    Z, H, W = shape
    z, h, w = mask.shape
    has_same_aspect = abs(h * W / (w * H) - 1) <= ASPECT_TOLERANCE
    if not is_image or z != Z or not has_same_aspect:
        raise ConsiliumError(
            f"it has {z} slices of {h} x {w} pixels, its scan {Z} of {H} x {W}; "
            "give a mask of the scan's own size"
        )
    return np.stack([cv2.resize(image, (W, H), interpolation=cv2.INTER_NEAREST_EXACT) for image in mask])


def crop_to_slices(
    mask: NDArray[np.uint8], indices: NDArray[np.integer] | list[int], box: Box, size: int
) -> NDArray[np.uint8]:
    """Return the mask [Z, H, W] at the kept slices [S, size, size], cropped and scaled as by `letterbox`.

    A pixel has the value that covers at least half of it; it is 0 around the crop.
    """
    y0, y1, x0, x1 = box
    top, bottom, left, right = letterbox_box(y1 - y0, x1 - x0, size)
    interpolation = cv2.INTER_AREA if size < max(y1 - y0, x1 - x0) else cv2.INTER_LINEAR
    cropped = np.zeros((len(indices), size, size), np.uint8)
    for target, z in zip(cropped, indices, strict=True):
        source = mask[z, y0:y1, x0:x1]
        for value in np.unique(source[source > 0]):
            is_value = (source == value).astype(np.float32)
            share = cv2.resize(is_value, (right - left, bottom - top), interpolation=interpolation)
            target[top:bottom, left:right][share >= 0.5] = value
    return cropped


def _read_values(path: Path) -> _MaskValues:
    """Read the files of a mask. Raises ConsiliumError, and FileNotFoundError where there is none."""
    if not path.exists():
        raise FileNotFoundError(path)
    if path.is_dir():
        if not any(entry.name.lower().endswith(IMAGE_SUFFIXES) for entry in path.iterdir()):
            raise ConsiliumError(
                f"{path} holds no pictures; a mask is a NIfTI file, a picture, or a folder of pictures"
            )
        return _MaskValues(read_slice_folder(path).voxels, is_nifti=False)
    if path.name.lower().endswith(NIFTI_SUFFIXES):
        values, _ = read_axial_array(path)
        return _MaskValues(values, is_nifti=True)
    return _MaskValues(read_image_file(path).voxels, is_nifti=False)
