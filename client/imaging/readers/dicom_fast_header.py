"""A quick look at the header of a plain DICOM file of one image: a tenth of pydicom's time, which has the word on all that is not plain.

Only files that begin with "DICM", are in little endian and not deflated, and hold what a CT slice holds; for any other `glance` is None.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

IMPLICIT_VR_LE, EXPLICIT_VR_LE = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1"
UNCOMPRESSED_SYNTAXES = (IMPLICIT_VR_LE, EXPLICIT_VR_LE)
JPEG_LOSSLESS_SYNTAXES = ("1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70")  # JPEG Lossless
JPEG_LS_SYNTAXES = ("1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81")
JPEG_2000_SYNTAXES = ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91")
RLE_SYNTAXES = ("1.2.840.10008.1.2.5",)
HEADER_READ_BYTES = 16384  # bytes: a CT's header is 2 to 8 kB

# What is wanted, by how its value is kept: a text, a list of texts, an unsigned short, or a short that may have a sign.
_TAGS_BY_KIND = {
    "text": "00020010 TransferSyntaxUID 00080060 Modality 00100020 PatientID 00180050 SliceThickness 00181120 GantryDetectorTilt "
    "00185101 ViewPosition 0020000D StudyInstanceUID 0020000E SeriesInstanceUID 00200011 SeriesNumber 00200013 InstanceNumber "
    "00280008 NumberOfFrames 00281052 RescaleIntercept 00281053 RescaleSlope",
    "list": "00080008 ImageType 00181164 ImagerPixelSpacing 00200032 ImagePositionPatient 00200037 ImageOrientationPatient 00280030 PixelSpacing",
    "short": "00280002 SamplesPerPixel 00280010 Rows 00280011 Columns 00280100 BitsAllocated 00280101 BitsStored 00280103 PixelRepresentation",
    "signed": "00280120 PixelPaddingValue",
}


def _parse_tag(tag: str) -> int:
    """A tag as it is read from a file of little endian as one number."""
    return int(tag[4:] + tag[:4], 16)


_WANTED_TAGS = {
    _parse_tag(t): (name, kind)
    for kind, text in _TAGS_BY_KIND.items()
    for t, name in zip(text.split()[::2], text.split()[1::2], strict=True)
}
_TRANSFER_SYNTAX_TAG, _PIXEL_REPRESENTATION_TAG, _RESCALE_SLOPE_TAG = (
    _parse_tag("00020010"),
    _parse_tag("00280103"),
    _parse_tag("00281053"),
)
_SHORT_VRS = frozenset(
    b"AE AS AT CS DA DS DT FL FD IS LO LT PN SH SL SS ST TM UI UL US".split()
)  # with a length of 2 bytes
_ITEM_TAG, _ITEM_END_TAG, _SEQUENCE_END_TAG, _UNDEFINED_LENGTH = (
    _parse_tag("FFFEE000"),
    _parse_tag("FFFEE00D"),
    _parse_tag("FFFEE0DD"),
    0xFFFFFFFF,
)
_EXPLICIT_ELEMENT, _IMPLICIT_ELEMENT, _UINT32, _INT16, _UINT16 = map(
    struct.Struct, ("<I2sH", "<II", "<I", "<h", "<H")
)

RawElements = dict[int, tuple[bytes, bytes]]  # {tag: (VR, value)}


class PixelLocation(NamedTuple):
    """Where one slice's values lie in its file."""

    transfer_syntax: str
    offset: int  # of the first value; of a compressed image: no later than the pixel data element
    dtype: str  # "<i2" | "<u2"


def parse_header_fast(path: Path) -> tuple[dict[str, Any], PixelLocation | None] | None:
    """({keyword: value} of what a slice's Head is made of, where its pixels lie if that is certain), or None.

    Texts and numbers come as in the file; whoever wants a number takes the text for one or leaves it.
    """
    file = os.open(path, os.O_RDONLY)
    try:
        data, size = os.pread(file, HEADER_READ_BYTES, 0), os.fstat(file).st_size
        found = _parse_elements(data)
        if found is None:
            return None
        values, end = found
        return values, _locate_pixels(file, size, values, end)
    finally:
        os.close(file)


def _parse_elements(data: bytes) -> tuple[dict[str, Any], int] | None:
    """The wanted values, and where the walk ended: behind them. None where anything is not plain."""
    if data[128:132] != b"DICM":
        return None
    raw: RawElements = {}
    try:
        at = _parse_explicit_vr(data, 132, raw, 0x0002)
        syntax = raw[_TRANSFER_SYNTAX_TAG][1].rstrip(b" \0").decode("ascii")
        if syntax not in (
            *UNCOMPRESSED_SYNTAXES,
            *JPEG_LOSSLESS_SYNTAXES,
            *JPEG_LS_SYNTAXES,
            *JPEG_2000_SYNTAXES,
            *RLE_SYNTAXES,
        ):
            return None
        at = (_parse_implicit_vr if syntax == IMPLICIT_VR_LE else _parse_explicit_vr)(data, at, raw, 0x0028)
        values = _decode_values(raw)
    except (struct.error, KeyError, ValueError):  # cut short, or not what a slice holds
        return None
    return (values, at) if at <= len(data) else None


def _parse_explicit_vr(data: bytes, at: int, raw: RawElements, last_group: int) -> int:
    """Fill `raw` from `at` on to the end of the group `last`; returns where that is."""
    unpack, wanted, short = _EXPLICIT_ELEMENT.unpack_from, _WANTED_TAGS, _SHORT_VRS
    while True:
        tag, vr, length = unpack(data, at)
        if tag & 0xFFFF > last_group:
            return at
        if vr in short:
            at += 8
            if tag in wanted:
                raw[tag] = vr, data[at : at + length]
            at += length
        else:
            length = _UINT32.unpack_from(data, at + 8)[0]
            if length == _UNDEFINED_LENGTH and vr != b"SQ":
                raise ValueError(vr)
            at = _skip_sequence(data, at + 12, True) if length == _UNDEFINED_LENGTH else at + 12 + length


def _parse_implicit_vr(data: bytes, at: int, raw: RawElements, last_group: int) -> int:
    """As `_explicit`, of a file that names no VRs."""
    while True:
        tag, length = _IMPLICIT_ELEMENT.unpack_from(data, at)
        if tag & 0xFFFF > last_group:
            return at
        at += 8
        if length == _UNDEFINED_LENGTH:
            at = _skip_sequence(data, at, False)
            continue
        if tag in _WANTED_TAGS:
            raw[tag] = b"", data[at : at + length]
        at += length


def _skip_sequence(data: bytes, at: int, explicit: bool) -> int:
    """Where a sequence of unknown length ends whose first item is at `at`."""
    depth = 1
    while depth:
        tag, length = _IMPLICIT_ELEMENT.unpack_from(data, at)
        if tag == _ITEM_TAG:
            at += 8 + (0 if length == _UNDEFINED_LENGTH else length)
        elif tag in (_ITEM_END_TAG, _SEQUENCE_END_TAG):
            depth -= tag == _SEQUENCE_END_TAG
            at += 8
        elif explicit and data[at + 4 : at + 6] in _SHORT_VRS:
            at += 8 + _EXPLICIT_ELEMENT.unpack_from(data, at)[2]
        else:
            at += 12 if explicit else 8
            length = _UINT32.unpack_from(data, at - 4)[0]
            depth += length == _UNDEFINED_LENGTH
            at += 0 if length == _UNDEFINED_LENGTH else length
    return at


def _decode_values(raw: RawElements) -> dict[str, Any]:
    """The values by keyword. Raises KeyError or ValueError where one is missing or odd."""
    values: dict[str, Any] = {}
    signed = raw[_PIXEL_REPRESENTATION_TAG][1] == b"\1\0"
    for tag, (vr, value) in raw.items():
        name, kind = _WANTED_TAGS[tag]
        if kind == "short":
            values[name] = _UINT16.unpack(value)[0]
        elif kind == "signed":
            values[name] = (_INT16 if vr == b"SS" or (not vr and signed) else _UINT16).unpack(value)[0]
        else:
            text = value.decode("ascii").rstrip(" \0")
            values[name] = text.split("\\") if kind == "list" and text else text
    if "NumberOfFrames" in values or not values.keys() >= _REQUIRED_KEYWORDS:
        raise ValueError("not one slice's")
    return values


_REQUIRED_KEYWORDS = {
    "SeriesInstanceUID",
    "SamplesPerPixel",
    "Rows",
    "Columns",
    "BitsAllocated",
    "BitsStored",
}


def _locate_pixels(file: int, size: int, values: dict[str, Any], end: int) -> PixelLocation | None:
    """Where the pixels lie: 16 bits a value and nothing behind them, so that no byte of theirs is missing."""
    syntax, signed = values["TransferSyntaxUID"], values["PixelRepresentation"] == 1
    if values["SamplesPerPixel"] != 1 or values["BitsAllocated"] != 16:
        return None
    dtype = "<i2" if signed else "<u2"
    if syntax not in UNCOMPRESSED_SYNTAXES:
        whole = os.pread(file, 8, size - 8) == b"\xfe\xff\xdd\xe0\0\0\0\0"
        return (
            PixelLocation(syntax, end, dtype)
            if whole and (not signed or values["BitsStored"] == 16)
            else None
        )
    length = 2 * values["Rows"] * values["Columns"]
    before = os.pread(file, 12, max(0, size - length - 12))
    header = b"\xe0\x7f\x10\0" + (before[4:8] if syntax == EXPLICIT_VR_LE else b"") + _UINT32.pack(length)
    whole = before[-len(header) :] == header and (
        syntax == IMPLICIT_VR_LE or before[4:8] in (b"OW\0\0", b"OB\0\0")
    )
    return PixelLocation(syntax, size - length, dtype) if whole else None
