"""Fast header parser for plain DICOM files of one image; pydicom handles everything else.

It takes a tenth of pydicom's time. It accepts only files that begin with "DICM", are little-endian and not
deflated, and hold what a CT slice holds.
"""

from __future__ import annotations

import os
import struct
from enum import Enum, auto
from pathlib import Path
from typing import Any, NamedTuple

from pydicom.datadict import tag_for_keyword

IMPLICIT_VR_LE = "1.2.840.10008.1.2"
EXPLICIT_VR_LE = "1.2.840.10008.1.2.1"
UNCOMPRESSED_SYNTAXES = (IMPLICIT_VR_LE, EXPLICIT_VR_LE)
JPEG_LOSSLESS_SYNTAXES = ("1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70")
JPEG_LS_SYNTAXES = ("1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81")
JPEG_2000_SYNTAXES = ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91")
RLE_SYNTAXES = ("1.2.840.10008.1.2.5",)
SUPPORTED_SYNTAXES = frozenset(
    (
        *UNCOMPRESSED_SYNTAXES,
        *JPEG_LOSSLESS_SYNTAXES,
        *JPEG_LS_SYNTAXES,
        *JPEG_2000_SYNTAXES,
        *RLE_SYNTAXES,
    )
)
HEADER_READ_BYTES = 16384  # a CT's header takes 2 to 8 kB


class _ValueKind(Enum):
    """How the value of an element is encoded."""

    TEXT = auto()
    TEXT_LIST = auto()
    UNSIGNED_SHORT = auto()
    SHORT = auto()  # signed or unsigned, as the VR or the pixel representation says


_KEYWORDS_BY_KIND = {
    _ValueKind.TEXT: (
        "TransferSyntaxUID",
        "Modality",
        "PatientID",
        "SliceThickness",
        "GantryDetectorTilt",
        "ViewPosition",
        "StudyInstanceUID",
        "SeriesInstanceUID",
        "SeriesNumber",
        "InstanceNumber",
        "NumberOfFrames",
        "RescaleIntercept",
        "RescaleSlope",
    ),
    _ValueKind.TEXT_LIST: (
        "ImageType",
        "ImagerPixelSpacing",
        "ImagePositionPatient",
        "ImageOrientationPatient",
        "PixelSpacing",
    ),
    _ValueKind.UNSIGNED_SHORT: (
        "SamplesPerPixel",
        "Rows",
        "Columns",
        "BitsAllocated",
        "BitsStored",
        "PixelRepresentation",
    ),
    _ValueKind.SHORT: ("PixelPaddingValue",),
}
_REQUIRED_KEYWORDS = frozenset(
    ("SeriesInstanceUID", "SamplesPerPixel", "Rows", "Columns", "BitsAllocated", "BitsStored")
)


def _swap_tag(tag: int) -> int:
    """Return a tag as the number that its bytes in a little-endian file make: the group in the low half."""
    return (tag & 0xFFFF) << 16 | tag >> 16


def _get_keyword_tag(keyword: str) -> int:
    tag = tag_for_keyword(keyword)
    if tag is None:
        raise ValueError(f"pydicom does not know the keyword {keyword}")
    return _swap_tag(tag)


_ELEMENTS = {
    _get_keyword_tag(keyword): (keyword, kind)
    for kind, keywords in _KEYWORDS_BY_KIND.items()
    for keyword in keywords
}
_TRANSFER_SYNTAX_TAG = _get_keyword_tag("TransferSyntaxUID")
_PIXEL_REPRESENTATION_TAG = _get_keyword_tag("PixelRepresentation")
_ITEM_TAG = _swap_tag(0xFFFEE000)
_ITEM_END_TAG = _swap_tag(0xFFFEE00D)
_SEQUENCE_END_TAG = _swap_tag(0xFFFEE0DD)
_UNDEFINED_LENGTH = 0xFFFFFFFF
_META_GROUP = 0x0002
_IMAGE_GROUP = 0x0028  # the last group that holds an element of interest
# The value representations whose length takes 2 bytes; the length of all others takes 4.
_SHORT_VRS = frozenset(b"AE AS AT CS DA DS DT FL FD IS LO LT PN SH SL SS ST TM UI UL US".split())

_EXPLICIT_ELEMENT = struct.Struct("<I2sH")  # tag, VR, length
_IMPLICIT_ELEMENT = struct.Struct("<II")  # tag, length
_UINT32 = struct.Struct("<I")
_INT16 = struct.Struct("<h")
_UINT16 = struct.Struct("<H")

_PIXEL_DATA_TAG = b"\xe0\x7f\x10\0"
_SEQUENCE_END = b"\xfe\xff\xdd\xe0\0\0\0\0"

RawElements = dict[int, tuple[bytes, bytes]]  # {tag: (VR, value)}


class PixelLocation(NamedTuple):
    """The place of one slice's values in its file."""

    transfer_syntax: str
    offset: int  # of the first value; of a compressed image: no later than the pixel data element
    dtype: str  # "<i2" | "<u2"


class FastHeader(NamedTuple):
    """The values of a header by keyword, and the place of the pixels where it is certain."""

    values: dict[str, Any]  # texts and numbers as they stand in the file
    pixel_location: PixelLocation | None


def parse_header_fast(path: Path) -> FastHeader | None:
    """Parse the header of a plain DICOM file of one image; return None for any other file.

    Numbers that DICOM writes as text stay text; the caller converts them.

    Raises:
        OSError: The file cannot be opened or read.
    """
    file = os.open(path, os.O_RDONLY)
    try:
        data = os.pread(file, HEADER_READ_BYTES, 0)
        file_size = os.fstat(file).st_size
        raw: RawElements = {}
        header_end = _parse_elements(data, raw)
        if header_end is None:
            return None
        try:
            values = _decode_values(raw)
        except (struct.error, KeyError, ValueError):  # not what a slice holds
            return None
        return FastHeader(values, _locate_pixels(file, file_size, values, header_end))
    finally:
        os.close(file)


def _parse_elements(data: bytes, raw: RawElements) -> int | None:
    """Fill `raw` with the elements of interest; return their end, or None where the file is not plain."""
    if data[128:132] != b"DICM":
        return None
    try:
        offset = _parse_explicit_vr(data, 132, raw, _META_GROUP)
        syntax = raw[_TRANSFER_SYNTAX_TAG][1].rstrip(b" \0").decode("ascii")
        if syntax not in SUPPORTED_SYNTAXES:
            return None
        if syntax == IMPLICIT_VR_LE:
            offset = _parse_implicit_vr(data, offset, raw, _IMAGE_GROUP)
        else:
            offset = _parse_explicit_vr(data, offset, raw, _IMAGE_GROUP)
    except (struct.error, KeyError, ValueError):  # cut short, or damaged
        return None
    if offset > len(data):
        return None
    return offset


def _parse_explicit_vr(data: bytes, offset: int, raw: RawElements, last_group: int) -> int:
    """Fill `raw` with the elements from `offset` to the end of `last_group`; return the end's offset."""
    unpack_element = _EXPLICIT_ELEMENT.unpack_from
    while True:
        tag, vr, length = unpack_element(data, offset)
        if tag & 0xFFFF > last_group:
            return offset
        if vr in _SHORT_VRS:
            offset += 8
            if tag in _ELEMENTS:
                raw[tag] = vr, data[offset : offset + length]
            offset += length
            continue
        length = _UINT32.unpack_from(data, offset + 8)[0]
        offset += 12
        if length != _UNDEFINED_LENGTH:
            offset += length
        elif vr == b"SQ":
            offset = _skip_sequence(data, offset, explicit=True)
        else:
            raise ValueError(vr)


def _parse_implicit_vr(data: bytes, offset: int, raw: RawElements, last_group: int) -> int:
    """Do what `_parse_explicit_vr` does in a file that names no VRs."""
    while True:
        tag, length = _IMPLICIT_ELEMENT.unpack_from(data, offset)
        if tag & 0xFFFF > last_group:
            return offset
        offset += 8
        if length == _UNDEFINED_LENGTH:
            offset = _skip_sequence(data, offset, explicit=False)
            continue
        if tag in _ELEMENTS:
            raw[tag] = b"", data[offset : offset + length]
        offset += length


def _skip_sequence(data: bytes, offset: int, explicit: bool) -> int:
    """Return the end of a sequence of undefined length whose first item begins at `offset`."""
    depth = 1
    while depth:
        tag, length = _IMPLICIT_ELEMENT.unpack_from(data, offset)
        if tag == _ITEM_TAG:
            offset += 8
            if length != _UNDEFINED_LENGTH:
                offset += length
        elif tag == _ITEM_END_TAG:
            offset += 8
        elif tag == _SEQUENCE_END_TAG:
            depth -= 1
            offset += 8
        elif explicit and data[offset + 4 : offset + 6] in _SHORT_VRS:
            offset += 8 + _EXPLICIT_ELEMENT.unpack_from(data, offset)[2]
        else:
            offset += 12 if explicit else 8
            length = _UINT32.unpack_from(data, offset - 4)[0]
            if length == _UNDEFINED_LENGTH:
                depth += 1
            else:
                offset += length
    return offset


def _decode_values(raw: RawElements) -> dict[str, Any]:
    """Return the values by keyword. Raises KeyError, ValueError or struct.error where one is odd."""
    is_signed = raw[_PIXEL_REPRESENTATION_TAG][1] == b"\1\0"
    values: dict[str, Any] = {}
    for tag, (vr, encoded) in raw.items():
        keyword, kind = _ELEMENTS[tag]
        if kind is _ValueKind.UNSIGNED_SHORT:
            values[keyword] = _UINT16.unpack(encoded)[0]
        elif kind is _ValueKind.SHORT:
            signed_value = vr == b"SS" or (not vr and is_signed)
            number_format = _INT16 if signed_value else _UINT16
            values[keyword] = number_format.unpack(encoded)[0]
        else:
            text = encoded.decode("ascii").rstrip(" \0")
            is_list = kind is _ValueKind.TEXT_LIST and text
            values[keyword] = text.split("\\") if is_list else text
    if "NumberOfFrames" in values or not values.keys() >= _REQUIRED_KEYWORDS:
        raise ValueError("the file does not hold exactly one slice")
    return values


def _locate_pixels(
    file: int, file_size: int, values: dict[str, Any], header_end: int
) -> PixelLocation | None:
    """Return where the pixels lie if they have 16 bits each and end the file, so that none is missing."""
    if values["SamplesPerPixel"] != 1 or values["BitsAllocated"] != 16:
        return None
    syntax = values["TransferSyntaxUID"]
    is_signed = values["PixelRepresentation"] == 1
    dtype = "<i2" if is_signed else "<u2"
    if syntax in UNCOMPRESSED_SYNTAXES:
        pixel_bytes = 2 * values["Rows"] * values["Columns"]
        if _pixel_data_ends_file(file, file_size, pixel_bytes, syntax):
            return PixelLocation(syntax, file_size - pixel_bytes, dtype)
        return None
    is_complete = os.pread(file, 8, file_size - 8) == _SEQUENCE_END
    # Decoders do not agree on the sign of signed values of fewer than 16 bits.
    if is_complete and (not is_signed or values["BitsStored"] == 16):
        return PixelLocation(syntax, header_end, dtype)
    return None


def _pixel_data_ends_file(file: int, file_size: int, pixel_bytes: int, syntax: str) -> bool:
    """Check that the last `pixel_bytes` of the file are the value of the pixel data element."""
    if pixel_bytes > file_size:
        return False
    length = _UINT32.pack(pixel_bytes)
    if syntax == IMPLICIT_VR_LE:
        element_headers: tuple[bytes, ...] = (_PIXEL_DATA_TAG + length,)
    else:
        element_headers = (_PIXEL_DATA_TAG + b"OW\0\0" + length, _PIXEL_DATA_TAG + b"OB\0\0" + length)
    preceding = os.pread(file, 12, max(0, file_size - pixel_bytes - 12))
    return preceding.endswith(element_headers)
