"""One slice's stored values out of its DICOM file: as they are where they are plain, else by the fastest decoder there is.

pydicom with its plugins decodes them too, two to five times as slowly (tests/benchmarks/README.md), and has the word on all that is odd.
"""

from __future__ import annotations

import io
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydicom.encaps import generate_frames

from client.imaging.readers.dicom_fast_header import (
    JPEG_2000_SYNTAXES,
    JPEG_LOSSLESS_SYNTAXES,
    JPEG_LS_SYNTAXES,
    UNCOMPRESSED_SYNTAXES,
)
from client.imaging.readers.dicom_series import SliceHeader

ENCAPSULATED_PIXEL_DATA = b"\xe0\x7f\x10\0OB\0\0\xff\xff\xff\xff"  # the head of encapsulated pixel data


def read_pixels(head: SliceHeader, reduction: int = 1) -> NDArray[Any]:
    """The values [H, W] of a slice whose `pixels` are known; of JPEG 2000 also reduced by a `step` of 2, 4 or 8, rounded up.

    Raises what the decoder raises, ValueError where the image is not as its header says.
    """
    assert head.pixel_location is not None
    syntax, offset, dtype = head.pixel_location
    H, W = head.shape
    if (
        syntax in UNCOMPRESSED_SYNTAXES
    ):  # not mapped: a file that is cut short meanwhile would kill the process
        return np.fromfile(head.path, dtype, H * W, offset=offset).reshape(H, W)
    with open(head.path, "rb", buffering=0) as file:
        whole = file.read()
    at = whole.find(ENCAPSULATED_PIXEL_DATA, offset)
    if at < 0:
        raise ValueError("no encapsulated pixel data")
    frame = next(generate_frames(whole[at + len(ENCAPSULATED_PIXEL_DATA) :], number_of_frames=1))
    values = (
        _decode_reduced_jpeg2000(frame, reduction, dtype)
        if reduction > 1
        else _decode_frame(frame, syntax, dtype).reshape(H, W)
    )
    if values.dtype.itemsize != 2 or values.shape != (-(-H // reduction), -(-W // reduction)):
        raise ValueError("the compressed image is not as its header says")
    return values.view(dtype)


def _decode_frame(frame: bytes, syntax: str, dtype: str) -> NDArray[Any]:
    if syntax in JPEG_LOSSLESS_SYNTAXES:
        return np.asarray(imagecodecs.jpeg_decode(frame))
    if syntax in JPEG_LS_SYNTAXES:
        return np.asarray(imagecodecs.jpegls_decode(frame))
    if syntax in JPEG_2000_SYNTAXES:
        values = np.asarray(imagecodecs.jpeg2k_decode(frame, numthreads=1))
        if values.dtype != np.dtype(dtype):
            raise ValueError("signed in the header and not in the image, or the other way round")
        return values
    return np.frombuffer(imagecodecs.dicomrle_decode(frame, np.dtype(dtype)), dtype)


def _decode_reduced_jpeg2000(frame: bytes, reduction: int, dtype: str) -> NDArray[Any]:
    """JPEG 2000 at a half, a quarter or an eighth: Pillow leaves the finer wavelets undecoded, and shifts values to fill 16 bits from 0 on."""
    depth = frame[
        42
    ]  # Ssiz of the first component (ITU T.800, A.5.1): bits less one, and 128 where values are signed
    bits, signed = (depth & 127) + 1, depth > 127
    if signed != (dtype == "<i2") or bits > 16:
        raise ValueError("signed in the header and not in the image, or the other way round")
    with Image.open(io.BytesIO(frame)) as image:
        image.reduce = {2: 1, 4: 2, 8: 3}[reduction]  # type: ignore[assignment, method-assign]
        values = np.asarray(image).astype(np.int32)
    return ((values >> (16 - bits)) - (signed << bits - 1)).astype(dtype)
