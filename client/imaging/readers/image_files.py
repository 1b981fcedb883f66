"""Scans kept as pictures: a folder of slices, or one picture (a radiograph)."""

from __future__ import annotations

import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from client.imaging.readers.volume import Indices, LazyVolume, Volume, Voxels
from common.utils.errors import ConsiliumError

JPEG_SUFFIXES = (".jpg", ".jpeg")
IMAGE_SUFFIXES = (*JPEG_SUFFIXES, ".png", ".bmp", ".tif", ".tiff")
REDUCED_READ_FLAGS = {
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}
UNKNOWN_GEOMETRY_NOTE = "Pictures, not DICOM: spacing unknown, slices in the order of their names."


def natural_sort_key(name: str) -> list[tuple[int, int | str]]:
    """A sorting key that puts `2.jpg` before `10.jpg`."""
    return [
        (0, int(part)) if part.isdigit() else (1, part) for part in re.split(r"(\d+)", name.lower()) if part
    ]


def _read_grey(
    path: Path | str, flags: int = cv2.IMREAD_GRAYSCALE | cv2.IMREAD_ANYDEPTH
) -> NDArray[Any] | None:
    """The picture in grey, 8 or 16 bits [H, W], or None where it cannot be decoded."""
    try:
        with open(path, "rb", buffering=0) as file:
            data = np.frombuffer(file.read(), np.uint8)
        image = cv2.imdecode(data, flags) if data.size else None
    except (OSError, cv2.error):
        return None
    return None if image is None else np.asarray(image)


def _to_uint8(voxels: NDArray[Any]) -> NDArray[np.uint8]:
    """16-bit pictures hold 10, 12 or 16 bits: their brightest value becomes 255, the same for all slices of a scan."""
    if voxels.dtype == np.uint8:
        return voxels
    return (voxels.astype(np.float32) * (255.0 / max(float(voxels.max()), 1.0))).astype(np.uint8)


def _list_images(folder: Path) -> list[str]:
    names = (n for n in os.listdir(folder) if n.lower().endswith(IMAGE_SUFFIXES) and not n.startswith("."))
    return [os.path.join(folder, name) for name in sorted(names, key=natural_sort_key)]


def read_slice_folder(folder: Path) -> Volume:
    """A folder of pictures, one a slice, in the natural order of their names (2 before 10).

    Of pictures of different sizes the majority is kept; a picture that cannot be read is left out. Both are noted. Raises
    ConsiliumError when fewer than half can be read.
    """
    files = _list_images(folder)
    images = [image for image in map(_read_grey, files) if image is not None]
    if not files or len(images) * 2 < len(files):
        raise ConsiliumError(
            f"{folder}: {len(files) - len(images)} of {len(files)} pictures cannot be read; export the scan again"
        )
    notes = [UNKNOWN_GEOMETRY_NOTE]
    if len(images) < len(files):
        notes.append(f"{len(files) - len(images)} of {len(files)} pictures cannot be read and were left out.")
    shape, _ = Counter(image.shape for image in images).most_common(1)[0]
    kept = [image for image in images if image.shape == shape]
    if len(kept) < len(images):
        notes.append(
            f"{len(images) - len(kept)} of {len(images)} pictures have another size than {shape[0]} x {shape[1]} and were left out."
        )
    return Volume(
        _to_uint8(np.stack(kept)), (1.0, 1.0, 1.0), np.arange(len(kept), dtype=np.float64), "CT", notes
    )


def open_slice_folder(folder: Path) -> LazyVolume | None:
    """The scan of `read_slices`, unread, where every picture looks like a whole JPEG and all are of one size; else None.

    A reduced picture is decoded as such: each block of 8 x 8 pixels gives only the frequencies that it is to show.
    """
    files = _list_images(folder)
    shapes = {_read_jpeg_shape(file) if file.lower().endswith(JPEG_SUFFIXES) else None for file in files}
    H, W = shape = shapes.pop() or (0, 0)
    if shapes or not H:
        return None

    def decoded(z: int, how: int, expected: tuple[int, int]) -> NDArray[np.uint8]:
        image = _read_grey(files[z], how)
        if image is None or image.shape != expected or image.dtype != np.uint8:
            raise ValueError("a picture cannot be read, or is not as its header says")
        return image

    def read(z: int) -> NDArray[np.uint8]:
        return decoded(z, cv2.IMREAD_GRAYSCALE, shape)

    def small(which: Indices, step: int) -> Voxels:
        if step == 1:
            return np.stack([read(z) for z in which])
        reduced = [decoded(z, REDUCED_READ_FLAGS[step], (-(-H // step), -(-W // step))) for z in which]
        return np.stack(reduced)[:, : H // step, : W // step]

    return LazyVolume(
        (len(files), H, W),
        (1.0, 1.0, 1.0),
        np.arange(len(files), dtype=np.float64),
        False,
        read,
        small,
        [UNKNOWN_GEOMETRY_NOTE],
    )


def _read_jpeg_shape(path: str) -> tuple[int, int] | None:
    """Height and width of a grey or colour JPEG of 8 bits by its frame header (ITU T.81, B.2.2); None where the file does not end as a JPEG does."""
    file = os.open(path, os.O_RDONLY)
    try:
        head, size = os.pread(file, 8192, 0), os.fstat(file).st_size
        tail = os.pread(file, 2, max(0, size - 2))
    finally:
        os.close(file)
    at = 2
    while head[:2] == b"\xff\xd8" and tail == b"\xff\xd9" and at + 9 <= len(head) and head[at] == 0xFF:
        marker, length = head[at + 1], int.from_bytes(head[at + 2 : at + 4], "big")
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # start of a frame, not tables
            return int.from_bytes(head[at + 5 : at + 7], "big"), int.from_bytes(head[at + 7 : at + 9], "big")
        at += 2 + length
    return None


def read_image_file(path: Path) -> Volume:
    """One picture, taken as a radiograph (Z = 1). Raises ConsiliumError when it cannot be decoded."""
    image = _read_grey(path)
    if image is None:
        raise ConsiliumError(f"{path} cannot be read as a picture; export it again")
    return Volume(_to_uint8(image[None]), (1.0, 1.0, 1.0), np.zeros(1), "XR", [])
