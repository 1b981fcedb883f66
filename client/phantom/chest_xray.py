"""A radiograph of a made-up CT.

Its digitally reconstructed projection from back to front, and masks on the same grid.

Rays are parallel (Siddon, Med. Phys. 1985, with every ray along y). The image is processed as digital
radiographs are: the logarithm of the exposure, which is the attenuation's line integral, with its local
contrast raised, through an S-shaped curve whose middle is set by the body itself (automatic exposure). Head
up, the patient's right on the image's left; bone is bright (MONOCHROME2).
"""

from __future__ import annotations

from itertools import pairwise

import cv2
import numpy as np
from numpy.typing import NDArray

WATER_ATTENUATION = 0.02  # 1/mm: what water absorbs of X-rays in a millimetre
BONE_THRESHOLD_HU = 150
# Above the threshold, absorption exceeds a CT's numbers by this factor: radiographs use a lower voltage.
BONE_ATTENUATION_FACTOR = 2.5
MIN_BODY_ATTENUATION = 1.0  # line integral, of 50 mm of water: less is beside the patient
CONTRAST_BLUR = 12.0  # mm: the contrast of smaller things (ribs, vessels) is raised
MIN_MASK_THICKNESS = 10.0  # mm along a ray that make a mask's pixel
ZONES_PER_LUNG = 3


def project_radiograph(voxels: NDArray[np.int16], pixel_mm: float, slice_mm: float) -> NDArray[np.uint8]:
    """Project a CT [Z, N, N] (HU.

    Feet to head, rows to the back, columns to the patient's left) to a radiograph [h, w].

    `pixel_mm` and `slice_mm` are the CT's; the radiograph's pixels are `pixel_mm` square, so w = N. Without a
    patient it is black.
    """
    depth = voxels.shape[1]
    soft = np.maximum(voxels, -1000).sum(axis=1, dtype=np.int32) + 1000 * depth
    bone = np.maximum(voxels, BONE_THRESHOLD_HU).sum(axis=1, dtype=np.int32) - BONE_THRESHOLD_HU * depth
    line_integrals = WATER_ATTENUATION / 1000 * pixel_mm * (soft + BONE_ATTENUATION_FACTOR * bone)
    absorbed = _to_square_pixels(line_integrals, pixel_mm, slice_mm)
    body = absorbed > MIN_BODY_ATTENUATION
    if not body.any():
        return np.zeros(absorbed.shape, np.uint8)
    raised = absorbed + 0.8 * (absorbed - cv2.GaussianBlur(absorbed, (0, 0), CONTRAST_BLUR / pixel_mm))
    low, high = np.percentile(raised[body], (2, 98))
    grey = 255 / (1 + np.exp((low + 0.4 * (high - low) - raised) * (6 / max(high - low, 1e-3))))
    return np.asarray(np.rint(grey), np.uint8)


def project_mask(
    mask: NDArray[np.bool_], pixel_mm: float, slice_mm: float, min_thickness: float = MIN_MASK_THICKNESS
) -> NDArray[np.bool_]:
    """Return where a ray meets at least `min_thickness` mm of a mask [Z, N, N]: [h, w], as the radiograph."""
    thickness = mask.sum(axis=1, dtype=np.float32) * pixel_mm
    return np.asarray(_to_square_pixels(thickness, pixel_mm, slice_mm) >= min_thickness)


def compute_zone_fractions(lung: NDArray[np.bool_], affected: NDArray[np.bool_]) -> list[float]:
    """Return the affected fraction of a lung's upper, middle and lower third by height (both masks [h, w]).

    It is 0 where there is no lung.
    """
    rows = np.flatnonzero(lung.any(axis=1))
    if not len(rows):
        return [0.0] * ZONES_PER_LUNG
    edges = np.linspace(rows[0], rows[-1] + 1, ZONES_PER_LUNG + 1).round().astype(int)
    fractions = []
    for top, bottom in pairwise(edges):
        zone = lung[top:bottom]
        fractions.append(float((zone & affected[top:bottom]).sum() / max(zone.sum(), 1)))
    return fractions


def _to_square_pixels(sums: NDArray[np.float32], pixel_mm: float, slice_mm: float) -> NDArray[np.float32]:
    """Resample sums along the rays [Z, N], feet first, to a smooth image with square pixels, head up."""
    num_slices, num_columns = sums.shape
    size = (num_columns, max(1, round(num_slices * slice_mm / pixel_mm)))
    return np.asarray(cv2.resize(sums[::-1].astype(np.float32), size, interpolation=cv2.INTER_CUBIC))
