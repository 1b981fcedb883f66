"""Plant identifiers in DICOM objects: in all elements of the standard's dictionary, sequences and headers."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pydicom
from pydicom.datadict import DicomDictionary
from pydicom.dataelem import DataElement
from pydicom.dataset import Dataset

from client.ingest.deidentify import (
    CODE_KEYWORDS,
    EMPTIED_KEYWORDS,
    NUMERIC_KEYWORDS,
    SEQUENCE_KEYWORDS,
    UID_KEYWORDS,
)

UID_ROOT = "1.2.840.99999.7.7"  # of planted UIDs
VALUES_BY_VR = {
    **dict.fromkeys(("AE", "CS", "SH", "LO", "LT", "ST", "UT", "UC", "UR"), "PLANTED"),
    "PN": "PLANTED^Anna^^^",
    "DA": "19470311",
    "DT": "19470311081547.31",
    "TM": "081547.314",
    "AS": "077Y",
    "DS": "3141592",
    "IS": "3141592",
    "OB": b"PLANTED ",
    "UN": b"PLANTED ",
    "OW": b"PLANTED ",
}
SIGNS = (b"PLANTED", b"Anna", b"19470311", b"081547", b"077Y", b"3141592", UID_ROOT.encode())
NECESSARY_KEYWORDS = {
    "SOPClassUID",
    "PixelData",
    "SpecificCharacterSet",
    "Modality",
    "PhotometricInterpretation",
    "BurnedInAnnotation",
}
PIXEL_MEANING_KEYWORDS = {"ModalityLUTSequence", "VOILUTSequence", "VOILUTFunction"}
ANSWER_KEYWORDS = {
    "NumberOfStudyRelatedInstances",
    "NumberOfSeriesRelatedInstances",
}  # of archives, not images
UNPLANTED_KEYWORDS = (
    UID_KEYWORDS | NUMERIC_KEYWORDS | NECESSARY_KEYWORDS | PIXEL_MEANING_KEYWORDS | ANSWER_KEYWORDS
)
assert EMPTIED_KEYWORDS.isdisjoint(UNPLANTED_KEYWORDS)


@cache
def _make_signs() -> list[DataElement]:
    """Make an element with a sign for each keyword of the dictionary that may hold one; takes a second."""
    elements = []
    for tag, (vr, _, _, _, keyword) in DicomDictionary.items():
        group, number = tag >> 16, tag & 0xFFFF
        if keyword and keyword not in UNPLANTED_KEYWORDS and group not in (0, 2, 4) and number:
            value = _make_value(tag, vr, keyword)
            if value is not None:
                elements.append(DataElement(tag, vr, value))
    return elements


def _make_value(tag: int, vr: str, keyword: str) -> Any:
    if vr == "SQ":
        return [_make_item(depth=1 if keyword in SEQUENCE_KEYWORDS else 0)]
    if vr == "UI":
        return f"{UID_ROOT}.{tag}"
    return VALUES_BY_VR.get(vr)


def plant(
    dataset: Dataset, patient: str = "PLANTED-1", accession: str = "PLANTED-2", everywhere: bool = True
) -> Dataset:
    """Plant signs in a dataset and return it.

    With `everywhere` each element of the dictionary that its pixels do not need holds one, else only the
    usual ones. The dataset shares elements with others, so it is to be written to a file next.
    """
    if everywhere:
        for element in _make_signs():
            is_needed = element.keyword in CODE_KEYWORDS | SEQUENCE_KEYWORDS and element.keyword in dataset
            if not is_needed:
                dataset.add(element)
    dataset.PatientName = "PLANTED^Anna"
    dataset.InstitutionName = "PLANTED"
    dataset.PatientBirthDate = "19470311"
    dataset.PatientID = patient
    dataset.AccessionNumber = accession
    dataset.StudyDate = "19470311"
    dataset.ImageType = [*dataset.ImageType[:2], "AXIAL", "PLANTED"]
    dataset.add_new(0x60003000, "OW", b"PLANTED ")
    dataset.add_new(0x60004000, "LT", "PLANTED")
    dataset.private_block(0x0009, "PLANTED CREATOR", create=True).add_new(1, "LO", "PLANTED")
    dataset.preamble = b"PLANTED ".ljust(128, b"\0")
    dataset.file_meta.SourceApplicationEntityTitle = "PLANTED"
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    return dataset


def _make_item(depth: int) -> Dataset:
    item = Dataset()
    item.PatientName = "PLANTED^Anna"
    item.PatientID = "PLANTED"
    item.TextValue = "PLANTED"
    item.PersonName = "PLANTED^Anna"
    item.ReferencedSOPInstanceUID = f"{UID_ROOT}.1"
    item.Date = "19470311"
    item.private_block(0x0011, "PLANTED CREATOR", create=True).add_new(1, "LO", "PLANTED")
    if depth:
        item.ConceptNameCodeSequence = [_make_item(depth - 1)]
        item.PixelMeasuresSequence = [_make_item(depth - 1)]  # a sequence that de-identification keeps
    return item


def find_signs(folder: Path, *identifiers: str) -> list[tuple[str, bytes]]:
    """Return (file, sign) for each planted sign, or identifier, in the bytes or the path of a file."""
    signs = [*SIGNS, *(text.encode() for text in identifiers)]
    matches = []
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            data = str(path.relative_to(folder)).encode() + path.read_bytes()
            matches += [(path.name, sign) for sign in signs if sign in data]
    return matches


def read_uids(path: Path) -> set[str]:
    """Return the UIDs of a file's study, series, image and frame of reference."""
    dataset = pydicom.dcmread(path, stop_before_pixels=True)
    return {str(dataset[keyword].value) for keyword in UID_KEYWORDS if keyword in dataset}
