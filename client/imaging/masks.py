"""Masks of scans: read, brought to the kept slices' geometry, and written back in the scan's own.

A mask is a NIfTI file, a picture, or a folder of pictures, as large as its scan. A lung mask of a CT tells the lungs apart: 1 is the
patient's right one (at the image's left), 2 the left one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import nibabel
import numpy as np
from numpy.typing import NDArray

from client.imaging import lung_segmentation
from client.imaging.lung_segmentation_xr import segment_radiograph_lungs
from client.imaging.readers.image_files import IMAGE_SUFFIXES, read_image_file, read_slice_folder
from client.imaging.readers.nifti import NIFTI_SUFFIXES, read_axial_array
from client.imaging.readers.volume import Volume
from client.imaging.slice_pipeline import letterbox_box
from common.utils.errors import ConsiliumError

ASPECT_TOLERANCE = 0.02  # by how much a picture's shape may differ from its scan's and still show the same


def read_mask(path: Path) -> NDArray[np.uint8]:
    """A mask as uint8 [Z, H, W], 0 or 1: above 0 in a NIfTI file, above half of the largest value in pictures.

    Raises ConsiliumError where nothing can be read, FileNotFoundError where nothing is.
    """
    return _binarise(*_read_values(path))


def _binarise(values: NDArray[Any], is_nifti: bool) -> NDArray[np.uint8]:
    return (values > (0 if is_nifti else values.max() / 2)).astype(np.uint8)


def read_lung_mask(path: Path, split_sides: bool) -> NDArray[np.uint8]:
    """A lung mask: 0 or 1, or with `tell_apart` 1 for the right lung and 2 for the left. A file of exactly 0, 1 and 2 says which itself."""
    values, nifti = _read_values(path)
    if np.array_equal(np.unique(values), [0, 1, 2]):
        return (values if split_sides else values > 0).astype(np.uint8)
    mask = _binarise(values, nifti)
    return lung_segmentation.label_sides(mask) if split_sides else mask


def _read_values(path: Path) -> tuple[NDArray[Any], bool]:
    """What the files hold [Z, H, W], and whether it is NIfTI."""
    if not path.exists():
        raise FileNotFoundError(path)
    if path.is_dir():
        if not any(p.name.lower().endswith(IMAGE_SUFFIXES) for p in path.iterdir()):
            raise ConsiliumError(
                f"{path} holds no pictures; a mask is a NIfTI file, a picture, or a folder of pictures"
            )
        return read_slice_folder(path).voxels, False
    if path.name.lower().endswith(NIFTI_SUFFIXES):
        return read_axial_array(path)[0], True
    return read_image_file(path).voxels, False


def find_lung_mask(volume: Volume, is_ct: bool) -> NDArray[np.uint8]:
    """Our own lung mask [Z, H, W] of a scan: 1 right and 2 left of a CT, 1 of a radiograph. All 0 where no lungs are found."""
    if is_ct:
        return lung_segmentation.label_sides(lung_segmentation.make_lung_mask(volume.voxels))
    shades = (-1000.0, 300.0) if volume.is_hounsfield else (0.0, 255.0)
    return np.stack(
        [segment_radiograph_lungs(lung_segmentation.apply_window(image, shades)) for image in volume.voxels]
    ).astype(np.uint8)


def resize_to_scan(mask: NDArray[np.uint8], shape: tuple[int, int, int], is_image: bool) -> NDArray[np.uint8]:
    """The mask at its scan's `shape` [Z, H, W]; a `picture` of another size is resized, if its sides have the same ratio.

    Raises ConsiliumError (without any name) when it cannot be this scan's.
    """
    (Z, H, W), (z, h, w) = shape, mask.shape
    if mask.shape == shape:
        return mask
    if not is_image or z != Z or abs(h * W / (w * H) - 1) > ASPECT_TOLERANCE:
        raise ConsiliumError(
            f"it has {z} slices of {h} x {w} pixels, its scan {Z} of {H} x {W}; give a mask of the scan's own size"
        )
    return np.stack([cv2.resize(m, (W, H), interpolation=cv2.INTER_NEAREST_EXACT) for m in mask])


def crop_to_slices(
    mask: NDArray[np.uint8], indices: NDArray[np.integer] | list[int], box: lung_segmentation.Box, size: int
) -> NDArray[np.uint8]:
    """The mask [Z, H, W] at the kept slices, uint8 [S, size, size]: as `slices.square` cuts and scales them, 0 around the crop.

    A pixel has the value that covers at least half of it.
    """
    y0, y1, x0, x1 = box
    top, bottom, left, right = letterbox_box(y1 - y0, x1 - x0, size)
    method = cv2.INTER_AREA if size < max(y1 - y0, x1 - x0) else cv2.INTER_LINEAR
    kept = np.zeros((len(indices), size, size), np.uint8)
    for s, z in enumerate(indices):
        part = mask[z, y0:y1, x0:x1]
        for value in np.unique(part[part > 0]):
            share = cv2.resize(
                (part == value).astype(np.float32), (right - left, bottom - top), interpolation=method
            )
            kept[s, top:bottom, left:right][share >= 0.5] = value
    return kept


def write_nifti_mask(
    out_path: Path,
    probability: NDArray[np.floating],
    indices: NDArray[np.integer] | list[int],
    box: lung_segmentation.Box,
    volume: Volume,
    threshold: float,
) -> None:
    """Write the kept slices' maps [S, size, size] as a mask of the whole scan: uint8 NIfTI, 1 from probability `cut` on, lying over the scan.

    Each map is resized back into the crop's box; between two kept slices it is interpolated linearly by where the slices lie (mm), and
    nothing is said beyond the outermost ones. Slices that lie unevenly (one is missing) are written on an even grid. A tilted gantry's shear is
    not written. Raises ConsiliumError when the file cannot be written.
    """
    y0, y1, x0, x1 = box
    top, bottom, left, right = letterbox_box(y1 - y0, x1 - x0, probability.shape[-1])
    maps = [
        cv2.resize(
            np.asarray(m[top:bottom, left:right], np.float32),
            (x1 - x0, y1 - y0),
            interpolation=cv2.INTER_LINEAR,
        )
        for m in probability
    ]
    lies, step, wanted = _make_even_grid(volume)
    kept, first = np.unique(np.asarray(indices), return_index=True)  # a slice that was repeated counts once
    at = lies[kept]
    mask = np.zeros((len(wanted), *volume.voxels.shape[1:]), np.uint8)
    for z, here in enumerate(wanted):
        if not at[0] - 1e-3 * step <= here <= at[-1] + 1e-3 * step:
            continue
        above = min(int(np.searchsorted(at, here)), len(at) - 1)
        below = max(above - 1, 0)
        share = 1.0 if above == below else float(np.clip((here - at[below]) / (at[above] - at[below]), 0, 1))
        mask[z, y0:y1, x0:x1] = (1 - share) * maps[first[below]] + share * maps[first[above]] >= threshold
    (x, y), (_, high, wide) = volume.origin, volume.spacing
    # Columns run left and rows back, where NIfTI's axes run right and front.
    affine = np.array([[-wide, 0, 0, -x], [0, -high, 0, -y], [0, 0, step, wanted[0]], [0, 0, 0, 1]])
    image: Any = nibabel.Nifti1Image(mask.transpose(2, 1, 0), affine)  # type: ignore[no-untyped-call]
    image.header.set_xyzt_units("mm")
    try:
        Path(out_path).parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(image, out_path)
    except OSError as error:
        raise ConsiliumError(
            f"the mask cannot be written to {out_path} ({error.strerror}); choose another folder"
        ) from error


def _make_even_grid(volume: Volume) -> tuple[NDArray[np.float64], float, NDArray[np.float64]]:
    """Where the scan's slices lie (mm), and an even grid over them: its step and its places; the slices' own places where they are even."""
    lies, Z = volume.positions.astype(np.float64), len(volume.voxels)
    if Z == 1:
        return lies, volume.spacing[0], lies
    if np.array_equal(lies, np.arange(Z)):  # positions unknown: numbered only
        lies = lies * volume.spacing[0]
    gaps = np.diff(lies)
    if np.ptp(gaps) <= 0.1 * gaps.mean():
        return lies, float(gaps.mean()), lies
    step = float(np.median(gaps))
    return lies, step, lies[0] + step * np.arange(round((lies[-1] - lies[0]) / step) + 1)
