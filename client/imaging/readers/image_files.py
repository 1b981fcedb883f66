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

JPEG_START = b"\xff\xd8"
JPEG_END = b"\xff\xd9"
JPEG_HEADER_BYTES = 8192
# Markers between a frame's first and last that do not start one: Huffman tables, a reserved one, arithmetic
# coding.
JPEG_TABLE_MARKERS = (0xC4, 0xC8, 0xCC)


def natural_sort_key(name: str) -> list[tuple[int, int | str]]:
    """Return a sorting key that puts `2.jpg` before `10.jpg`."""
    key: list[tuple[int, int | str]] = []
    for part in re.split(r"(\d+)", name.lower()):
        if part.isdigit():
            key.append((0, int(part)))
        elif part:
            key.append((1, part))
    return key


def read_image_file(path: Path) -> Volume:
    """Read one picture as a radiograph (Z = 1).

    Raises:
        ConsiliumError: The picture cannot be decoded.
    """
    image = _read_grey(path)
    if image is None:
        raise ConsiliumError(f"{path} cannot be read as a picture; export it again")
    return Volume(
        voxels=_to_uint8(image[None]), spacing=(1.0, 1.0, 1.0), positions=np.zeros(1), modality="XR"
    )


def read_slice_folder(folder: Path) -> Volume:
    """Read a folder of pictures, one a slice, in the natural order of their names (2 before 10).

    Of pictures of different sizes the majority is kept; a picture that cannot be read is left out. Both are
    noted.

    Raises:
        ConsiliumError: Fewer than half of the pictures can be read.
    """
    files = _list_images(folder)
    images = [image for image in map(_read_grey, files) if image is not None]
    unreadable = len(files) - len(images)
    if not files or len(images) * 2 < len(files):
        raise ConsiliumError(
            f"{folder}: {unreadable} of {len(files)} pictures cannot be read; export the scan again"
        )
    notes = [UNKNOWN_GEOMETRY_NOTE]
    if unreadable:
        notes.append(f"{unreadable} of {len(files)} pictures cannot be read and were left out.")
    usual_shape, count = Counter(image.shape for image in images).most_common(1)[0]
    if count < len(images):
        H, W = usual_shape
        notes.append(
            f"{len(images) - count} of {len(images)} pictures have another size than {H} x {W} "
            "and were left out."
        )
    slices = np.stack([image for image in images if image.shape == usual_shape])
    return Volume(
        voxels=_to_uint8(slices),
        spacing=(1.0, 1.0, 1.0),
        positions=np.arange(len(slices), dtype=np.float64),
        modality="CT",
        notes=notes,
    )


def open_slice_folder(folder: Path) -> LazyVolume | None:
    """Open the scan of `read_slice_folder`; return None unless all are complete JPEGs of one size.

    A reduced picture is decoded at its reduced size: of each block of 8 x 8 pixels only the frequencies that
    it shows.
    """
    files = _list_images(folder)
    shape = _find_common_jpeg_shape(files)
    if shape is None:
        return None
    H, W = shape

    def decode(z: int, read_flags: int, expected_shape: tuple[int, int]) -> NDArray[np.uint8]:
        image = _read_grey(files[z], read_flags)
        if image is None or image.shape != expected_shape or image.dtype != np.uint8:
            raise ValueError("a picture cannot be read, or is not as its header says")
        return image

    def read_slice(z: int) -> NDArray[np.uint8]:
        return decode(z, cv2.IMREAD_GRAYSCALE, (H, W))

    def read_reduced(indices: Indices, reduction: int) -> Voxels:
        if reduction == 1:
            return np.stack([read_slice(z) for z in indices])
        read_flags = REDUCED_READ_FLAGS[reduction]
        rounded_up = (-(-H // reduction), -(-W // reduction))
        reduced = np.stack([decode(z, read_flags, rounded_up) for z in indices])
        return reduced[:, : H // reduction, : W // reduction]

    return LazyVolume(
        shape=(len(files), H, W),
        spacing=(1.0, 1.0, 1.0),
        positions=np.arange(len(files), dtype=np.float64),
        is_hounsfield=False,
        read_slice=read_slice,
        read_reduced=read_reduced,
        notes=[UNKNOWN_GEOMETRY_NOTE],
    )


def _list_images(folder: Path) -> list[str]:
    """Return the paths of the folder's pictures in natural order, hidden ones left out."""
    names = [
        name
        for name in os.listdir(folder)
        if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")
    ]
    names.sort(key=natural_sort_key)
    return [os.path.join(folder, name) for name in names]


def _read_grey(
    path: Path | str, flags: int = cv2.IMREAD_GRAYSCALE | cv2.IMREAD_ANYDEPTH
) -> NDArray[Any] | None:
    """Return the picture in grey [H, W], 8 or 16 bits, or None where it cannot be decoded."""
    try:
        with open(path, "rb", buffering=0) as file:
            encoded = np.frombuffer(file.read(), np.uint8)
        if not encoded.size:
            return None
        image = cv2.imdecode(encoded, flags)
    except (OSError, cv2.error):
        return None
    if image is None:
        return None
    return np.asarray(image)


def _to_uint8(voxels: NDArray[Any]) -> NDArray[np.uint8]:
    """Return 16-bit pictures as 8-bit ones, their brightest value as 255, the same for all slices of a scan.

    Such pictures hold 10, 12 or 16 bits, and do not say which.
    """
    if voxels.dtype == np.uint8:
        return voxels
    brightest = max(float(voxels.max()), 1.0)
    return (voxels.astype(np.float32) * (255.0 / brightest)).astype(np.uint8)


def _find_common_jpeg_shape(files: list[str]) -> tuple[int, int] | None:
    """Return height and width where all files look like complete JPEGs of one size, else None."""
    if not all(file.lower().endswith(JPEG_SUFFIXES) for file in files):
        return None
    shapes = set(map(_read_jpeg_shape, files))
    if len(shapes) != 1:
        return None
    shape = shapes.pop()
    if shape is None or shape[0] == 0:
        return None
    return shape


def _read_jpeg_shape(path: str) -> tuple[int, int] | None:
    """Return a JPEG's height and width by its frame header (ITU T.81, B.2.2); None if it is incomplete."""
    file = os.open(path, os.O_RDONLY)
    try:
        head = os.pread(file, JPEG_HEADER_BYTES, 0)
        size = os.fstat(file).st_size
        tail = os.pread(file, 2, max(0, size - 2))
    finally:
        os.close(file)
    if not head.startswith(JPEG_START) or tail != JPEG_END:
        return None
    offset = 2
    while offset + 9 <= len(head) and head[offset] == 0xFF:
        marker = head[offset + 1]
        if 0xC0 <= marker <= 0xCF and marker not in JPEG_TABLE_MARKERS:
            height = int.from_bytes(head[offset + 5 : offset + 7], "big")
            width = int.from_bytes(head[offset + 7 : offset + 9], "big")
            return height, width
        offset += 2 + int.from_bytes(head[offset + 2 : offset + 4], "big")
    return None
