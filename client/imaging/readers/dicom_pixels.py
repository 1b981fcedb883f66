"""The stored values of one slice, read as they are or decoded by the fastest decoder.

pydicom with its plugins decodes them too, two to five times as slowly (tests/benchmarks/README.md), and is
used for everything unusual.
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
from client.imaging.readers.dicom_slice_header import SliceHeader

ENCAPSULATED_PIXEL_DATA = b"\xe0\x7f\x10\0OB\0\0\xff\xff\xff\xff"  # the head of encapsulated pixel data
JPEG_2000_DEPTH_OFFSET = 42  # Ssiz of the first component (ITU T.800, A.5.1)
HALVINGS = {2: 1, 4: 2, 8: 3}  # by reduction


def read_pixels(header: SliceHeader, reduction: int = 1) -> NDArray[Any]:
    """Return the stored values [H, W] of a slice whose pixels are located.

    JPEG 2000 can also be reduced by 2, 4 or 8; its sides are then rounded up.

    Raises:
        ValueError: The image is not as its header says.
        Exception: The decoder fails in a way of its own.
    """
    assert header.pixel_location is not None
    syntax, offset, dtype = header.pixel_location
    H, W = header.shape
    if syntax in UNCOMPRESSED_SYNTAXES:
        # Not memory-mapped: a file that is cut short meanwhile would kill the process.
        return np.fromfile(header.path, dtype, H * W, offset=offset).reshape(H, W)
    frame = _read_frame(header, offset)
    if reduction > 1:
        values = _decode_reduced_jpeg2000(frame, reduction, dtype)
    else:
        values = _decode_frame(frame, syntax, dtype).reshape(H, W)
    reduced_shape = (-(-H // reduction), -(-W // reduction))
    if values.dtype.itemsize != 2 or values.shape != reduced_shape:
        raise ValueError("the compressed image is not as its header says")
    return values.view(dtype)


def _read_frame(header: SliceHeader, offset: int) -> bytes:
    """Return the compressed image that follows `offset` in the slice's file."""
    with open(header.path, "rb", buffering=0) as file:
        content = file.read()
    start = content.find(ENCAPSULATED_PIXEL_DATA, offset)
    if start < 0:
        raise ValueError("the file holds no encapsulated pixel data")
    encapsulated = content[start + len(ENCAPSULATED_PIXEL_DATA) :]
    return next(generate_frames(encapsulated, number_of_frames=1))


def _decode_frame(frame: bytes, syntax: str, dtype: str) -> NDArray[Any]:
    """Decode one compressed image by the decoder of its transfer syntax."""
    if syntax in JPEG_LOSSLESS_SYNTAXES:
        return np.asarray(imagecodecs.jpeg_decode(frame))
    if syntax in JPEG_LS_SYNTAXES:
        return np.asarray(imagecodecs.jpegls_decode(frame))
    if syntax in JPEG_2000_SYNTAXES:
        values = np.asarray(imagecodecs.jpeg2k_decode(frame, numthreads=1))
        if values.dtype != np.dtype(dtype):
            raise ValueError("header and image disagree on whether values are signed")
        return values
    return np.frombuffer(imagecodecs.dicomrle_decode(frame, np.dtype(dtype)), dtype)


def _decode_reduced_jpeg2000(frame: bytes, reduction: int, dtype: str) -> NDArray[Any]:
    """Decode JPEG 2000 at a half, a quarter or an eighth, the finer wavelets left undecoded."""
    depth = frame[JPEG_2000_DEPTH_OFFSET]  # bits less one, and 128 where values are signed
    bits = (depth & 127) + 1
    is_signed = depth > 127
    if is_signed != (dtype == "<i2") or bits > 16:
        raise ValueError("header and image disagree on whether values are signed")
    with Image.open(io.BytesIO(frame)) as image:
        image.reduce = HALVINGS[reduction]  # type: ignore[assignment, method-assign]
        values = np.asarray(image).astype(np.int32)
    # Pillow shifts values so that they fill 16 bits from 0 on.
    values >>= 16 - bits
    if is_signed:
        values -= 1 << bits - 1
    return values.astype(dtype)
