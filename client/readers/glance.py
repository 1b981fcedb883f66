"""A quick look at the header of a plain DICOM file of one image: a tenth of pydicom's time, which has the word on all that is not plain.

Only files that begin with "DICM", are in little endian and not deflated, and hold what a CT slice holds; for any other `glance` is None.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any, NamedTuple

IMPLICIT, EXPLICIT = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1"
PLAIN = (IMPLICIT, EXPLICIT)
LOSSLESS = ("1.2.840.10008.1.2.4.57", "1.2.840.10008.1.2.4.70")  # JPEG Lossless
JPEG_LS = ("1.2.840.10008.1.2.4.80", "1.2.840.10008.1.2.4.81")
JPEG_2000 = ("1.2.840.10008.1.2.4.90", "1.2.840.10008.1.2.4.91")
RLE = ("1.2.840.10008.1.2.5",)
READ = 16384  # bytes: a CT's header is 2 to 8 kB

# What is wanted, by how its value is kept: a text, a list of texts, an unsigned short, or a short that may have a sign.
_KINDS = {
    "text": "00020010 TransferSyntaxUID 00080060 Modality 00100020 PatientID 00180050 SliceThickness 00181120 GantryDetectorTilt "
    "00185101 ViewPosition 0020000D StudyInstanceUID 0020000E SeriesInstanceUID 00200011 SeriesNumber 00200013 InstanceNumber "
    "00280008 NumberOfFrames 00281052 RescaleIntercept 00281053 RescaleSlope",
    "list": "00080008 ImageType 00181164 ImagerPixelSpacing 00200032 ImagePositionPatient 00200037 ImageOrientationPatient 00280030 PixelSpacing",
    "short": "00280002 SamplesPerPixel 00280010 Rows 00280011 Columns 00280100 BitsAllocated 00280101 BitsStored 00280103 PixelRepresentation",
    "signed": "00280120 PixelPaddingValue",
}


def _low_first(tag: str) -> int:
    """A tag as it is read from a file of little endian as one number."""
    return int(tag[4:] + tag[:4], 16)


_WANTED = {
    _low_first(t): (name, kind) for kind, text in _KINDS.items() for t, name in zip(text.split()[::2], text.split()[1::2], strict=True)
}
_SYNTAX, _SIGN, _LAST = _low_first("00020010"), _low_first("00280103"), _low_first("00281053")
_SHORT_VRS = frozenset(b"AE AS AT CS DA DS DT FL FD IS LO LT PN SH SL SS ST TM UI UL US".split())  # with a length of 2 bytes
_ITEM, _ITEM_ENDS, _SEQUENCE_ENDS, _OPEN = _low_first("FFFEE000"), _low_first("FFFEE00D"), _low_first("FFFEE0DD"), 0xFFFFFFFF
_EXPLICIT, _IMPLICIT, _WIDE, _SIGNED, _UNSIGNED = map(struct.Struct, ("<I2sH", "<II", "<I", "<h", "<H"))

Raw = dict[int, tuple[bytes, bytes]]  # {tag: (VR, value)}


class Pixels(NamedTuple):
    """Where one slice's values lie in its file."""

    syntax: str
    offset: int  # of the first value; of a compressed image: no later than the pixel data element
    dtype: str  # "<i2" | "<u2"


def glance(path: Path) -> tuple[dict[str, Any], Pixels | None] | None:
    """({keyword: value} of what a slice's Head is made of, where its pixels lie if that is certain), or None.

    Texts and numbers come as in the file; whoever wants a number takes the text for one or leaves it.
    """
    file = os.open(path, os.O_RDONLY)
    try:
        data, size = os.pread(file, READ, 0), os.fstat(file).st_size
        found = _walk(data)
        if found is None:
            return None
        values, end = found
        return values, _pixels(file, size, values, end)
    finally:
        os.close(file)


def _walk(data: bytes) -> tuple[dict[str, Any], int] | None:
    """The wanted values, and where the walk ended: behind them. None where anything is not plain."""
    if data[128:132] != b"DICM":
        return None
    raw: Raw = {}
    try:
        at = _explicit(data, 132, raw, 0x0002)
        syntax = raw[_SYNTAX][1].rstrip(b" \0").decode("ascii")
        if syntax not in (*PLAIN, *LOSSLESS, *JPEG_LS, *JPEG_2000, *RLE):
            return None
        at = (_implicit if syntax == IMPLICIT else _explicit)(data, at, raw, 0x0028)
        values = _values(raw)
    except (struct.error, KeyError, ValueError):  # cut short, or not what a slice holds
        return None
    return (values, at) if at <= len(data) else None


def _explicit(data: bytes, at: int, raw: Raw, last: int) -> int:
    """Fill `raw` from `at` on to the end of the group `last`; returns where that is."""
    unpack, wanted, short = _EXPLICIT.unpack_from, _WANTED, _SHORT_VRS
    while True:
        tag, vr, length = unpack(data, at)
        if tag & 0xFFFF > last:
            return at
        if vr in short:
            at += 8
            if tag in wanted:
                raw[tag] = vr, data[at : at + length]
            at += length
        else:
            length = _WIDE.unpack_from(data, at + 8)[0]
            if length == _OPEN and vr != b"SQ":
                raise ValueError(vr)
            at = _behind(data, at + 12, True) if length == _OPEN else at + 12 + length


def _implicit(data: bytes, at: int, raw: Raw, last: int) -> int:
    """As `_explicit`, of a file that names no VRs."""
    while True:
        tag, length = _IMPLICIT.unpack_from(data, at)
        if tag & 0xFFFF > last:
            return at
        at += 8
        if length == _OPEN:
            at = _behind(data, at, False)
            continue
        if tag in _WANTED:
            raw[tag] = b"", data[at : at + length]
        at += length


def _behind(data: bytes, at: int, explicit: bool) -> int:
    """Where a sequence of unknown length ends whose first item is at `at`."""
    depth = 1
    while depth:
        tag, length = _IMPLICIT.unpack_from(data, at)
        if tag == _ITEM:
            at += 8 + (0 if length == _OPEN else length)
        elif tag in (_ITEM_ENDS, _SEQUENCE_ENDS):
            depth -= tag == _SEQUENCE_ENDS
            at += 8
        elif explicit and data[at + 4 : at + 6] in _SHORT_VRS:
            at += 8 + _EXPLICIT.unpack_from(data, at)[2]
        else:
            at += 12 if explicit else 8
            length = _WIDE.unpack_from(data, at - 4)[0]
            depth += length == _OPEN
            at += 0 if length == _OPEN else length
    return at


def _values(raw: Raw) -> dict[str, Any]:
    """The values by keyword. Raises KeyError or ValueError where one is missing or odd."""
    values: dict[str, Any] = {}
    signed = raw[_SIGN][1] == b"\1\0"
    for tag, (vr, value) in raw.items():
        name, kind = _WANTED[tag]
        if kind == "short":
            values[name] = _UNSIGNED.unpack(value)[0]
        elif kind == "signed":
            values[name] = (_SIGNED if vr == b"SS" or (not vr and signed) else _UNSIGNED).unpack(value)[0]
        else:
            text = value.decode("ascii").rstrip(" \0")
            values[name] = text.split("\\") if kind == "list" and text else text
    if "NumberOfFrames" in values or not values.keys() >= _NEEDED:
        raise ValueError("not one slice's")
    return values


_NEEDED = {"SeriesInstanceUID", "SamplesPerPixel", "Rows", "Columns", "BitsAllocated", "BitsStored"}


def _pixels(file: int, size: int, values: dict[str, Any], end: int) -> Pixels | None:
    """Where the pixels lie: 16 bits a value and nothing behind them, so that no byte of theirs is missing."""
    syntax, signed = values["TransferSyntaxUID"], values["PixelRepresentation"] == 1
    if values["SamplesPerPixel"] != 1 or values["BitsAllocated"] != 16:
        return None
    dtype = "<i2" if signed else "<u2"
    if syntax not in PLAIN:
        whole = os.pread(file, 8, size - 8) == b"\xfe\xff\xdd\xe0\0\0\0\0"
        return Pixels(syntax, end, dtype) if whole and (not signed or values["BitsStored"] == 16) else None
    length = 2 * values["Rows"] * values["Columns"]
    before = os.pread(file, 12, max(0, size - length - 12))
    header = b"\xe0\x7f\x10\0" + (before[4:8] if syntax == EXPLICIT else b"") + _WIDE.pack(length)
    whole = before[-len(header) :] == header and (syntax == IMPLICIT or before[4:8] in (b"OW\0\0", b"OB\0\0"))
    return Pixels(syntax, size - length, dtype) if whole else None
