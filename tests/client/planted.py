"""Objects that name a patient wherever they can: in every element of the standard's dictionary, sequences, private elements, headers."""

from __future__ import annotations

from functools import cache
from pathlib import Path

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

ROOT = "1.2.840.99999.7.7"  # of planted UIDs
BY_VR = {
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
SIGNS = (b"PLANTED", b"Anna", b"19470311", b"081547", b"077Y", b"3141592", ROOT.encode())
STAYS = (
    UID_KEYWORDS
    | NUMERIC_KEYWORDS
    | {
        "SOPClassUID",
        "PixelData",
        "SpecificCharacterSet",
        "Modality",
        "PhotometricInterpretation",
        "BurnedInAnnotation",
    }
)
STAYS |= {"ModalityLUTSequence", "VOILUTSequence", "VOILUTFunction"}  # they change what the pixels mean
STAYS |= {
    "NumberOfStudyRelatedInstances",
    "NumberOfSeriesRelatedInstances",
}  # an archive's answer, not an image's


@cache
def _signs() -> list[DataElement]:
    """An element for each of the dictionary that may hold a sign; made once, as it takes a second."""
    elements = []
    for tag, (vr, _, _, _, word) in DicomDictionary.items():
        if word and word not in STAYS and tag >> 16 not in (0, 2, 4) and tag & 0xFFFF:
            value = (
                [_item(1 if word in SEQUENCE_KEYWORDS else 0)]
                if vr == "SQ"
                else f"{ROOT}.{tag}"
                if vr == "UI"
                else BY_VR.get(vr)
            )
            elements += [] if value is None else [DataElement(tag, vr, value)]
    return elements


def plant(
    dataset: Dataset, patient: str = "PLANTED-1", accession: str = "PLANTED-2", everywhere: bool = True
) -> Dataset:
    """The dataset with signs: `everywhere` in each element of the dictionary that its pixels do not need, else in the usual ones. To be written."""
    for element in _signs() if everywhere else []:
        if not (element.keyword in CODE_KEYWORDS | SEQUENCE_KEYWORDS and element.keyword in dataset):
            dataset.add(element)
    dataset.PatientName, dataset.InstitutionName, dataset.PatientBirthDate = (
        "PLANTED^Anna",
        "PLANTED",
        "19470311",
    )
    dataset.PatientID, dataset.AccessionNumber, dataset.StudyDate = patient, accession, "19470311"
    dataset.ImageType = [*dataset.ImageType[:2], "AXIAL", "PLANTED"]
    dataset.add_new(0x60003000, "OW", b"PLANTED ")
    dataset.add_new(0x60004000, "LT", "PLANTED")
    dataset.private_block(0x0009, "PLANTED CREATOR", create=True).add_new(1, "LO", "PLANTED")
    dataset.preamble = b"PLANTED ".ljust(128, b"\0")
    dataset.file_meta.SourceApplicationEntityTitle = "PLANTED"
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    return dataset


def _item(depth: int) -> Dataset:
    item = Dataset()
    item.PatientName, item.PatientID, item.TextValue, item.PersonName = (
        "PLANTED^Anna",
        "PLANTED",
        "PLANTED",
        "PLANTED^Anna",
    )
    item.ReferencedSOPInstanceUID, item.Date = f"{ROOT}.1", "19470311"
    item.private_block(0x0011, "PLANTED CREATOR", create=True).add_new(1, "LO", "PLANTED")
    if depth:
        item.ConceptNameCodeSequence = [_item(depth - 1)]
        item.PixelMeasuresSequence = [_item(depth - 1)]  # of a kind that is kept
    return item


def signs_in(folder: Path, *more: str) -> list[tuple[str, bytes]]:
    """Where below `folder` a planted sign, or one of `more`, is found: in a file's bytes or in a path."""
    found = []
    for path in [p for p in sorted(folder.rglob("*")) if p.is_file()]:
        data = str(path.relative_to(folder)).encode() + path.read_bytes()
        found += [(path.name, sign) for sign in (*SIGNS, *(text.encode() for text in more)) if sign in data]
    return found


def uids_of(path: Path) -> set[str]:
    """The study's, series', image's and frame's own UIDs in a file."""
    dataset = pydicom.dcmread(path, stop_before_pixels=True)
    return {str(dataset[word].value) for word in UID_KEYWORDS if word in dataset}


assert EMPTIED_KEYWORDS.isdisjoint(STAYS)
