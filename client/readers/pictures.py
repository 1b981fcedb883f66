"""Scans kept as pictures: a folder of slices, or one picture (a radiograph)."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from client.readers.volume import Volume
from common.errors import ConsiliumError

PICTURES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff")


def natural(name: str) -> list[tuple[int, int | str]]:
    """A sorting key that puts `2.jpg` before `10.jpg`."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name.lower()) if part]


def _grey(path: Path) -> NDArray[Any] | None:
    """The picture in grey, 8 or 16 bits [H, W], or None where it cannot be decoded."""
    try:
        data = np.fromfile(path, dtype=np.uint8)
        image = cv2.imdecode(data, cv2.IMREAD_GRAYSCALE | cv2.IMREAD_ANYDEPTH) if data.size else None
    except (OSError, cv2.error):
        return None
    return None if image is None else np.asarray(image)


def _eight_bits(voxels: NDArray[Any]) -> NDArray[np.uint8]:
    """16-bit pictures hold 10, 12 or 16 bits: their brightest value becomes 255, the same for all slices of a scan."""
    if voxels.dtype == np.uint8:
        return voxels
    return (voxels.astype(np.float32) * (255.0 / max(float(voxels.max()), 1.0))).astype(np.uint8)


def read_slices(folder: Path) -> Volume:
    """A folder of pictures, one a slice, in the natural order of their names (2 before 10).

    Of pictures of different sizes the majority is kept; a picture that cannot be read is left out. Both are noted. Raises
    ConsiliumError when fewer than half can be read.
    """
    files = sorted(
        (p for p in folder.iterdir() if p.name.lower().endswith(PICTURES) and not p.name.startswith(".")), key=lambda p: natural(p.name)
    )
    images = [image for image in map(_grey, files) if image is not None]
    if not files or len(images) * 2 < len(files):
        raise ConsiliumError(f"{folder}: {len(files) - len(images)} of {len(files)} pictures cannot be read; export the scan again")
    notes = ["Pictures, not DICOM: spacing unknown, slices in the order of their names."]
    if len(images) < len(files):
        notes.append(f"{len(files) - len(images)} of {len(files)} pictures cannot be read and were left out.")
    shape, _ = Counter(image.shape for image in images).most_common(1)[0]
    kept = [image for image in images if image.shape == shape]
    if len(kept) < len(images):
        notes.append(
            f"{len(images) - len(kept)} of {len(images)} pictures have another size than {shape[0]} x {shape[1]} and were left out."
        )
    return Volume(_eight_bits(np.stack(kept)), (1.0, 1.0, 1.0), np.arange(len(kept), dtype=np.float64), "CT", notes)


def read_picture(path: Path) -> Volume:
    """One picture, taken as a radiograph (Z = 1). Raises ConsiliumError when it cannot be decoded."""
    image = _grey(path)
    if image is None:
        raise ConsiliumError(f"{path} cannot be read as a picture; export it again")
    return Volume(_eight_bits(image[None]), (1.0, 1.0, 1.0), np.zeros(1), "XR", [])
