"""Which studies a centre wants from its archive, and how an archive's answers are judged; read from the command line and from tables."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import pandas as pd

from client.imaging.readers.dicom_series import RADIOGRAPH_MODALITIES
from common.utils.errors import ConsiliumError

IDENTIFIER_KEYWORDS = {
    "study": "StudyInstanceUID",
    "accession": "AccessionNumber",
    "patient": "PatientID",
}  # a table's column: what DICOM calls it
COLUMN_SPELLINGS = {
    "studyinstanceuid": "study",
    "studyuid": "study",
    "accessionnumber": "accession",
    "patientid": "patient",
}


@dataclass(frozen=True)
class StudyFilter:
    """What to take. Dates are YYYYMMDD, both ends taken; `listed` holds (StudyInstanceUID | AccessionNumber | PatientID, value)."""

    since: str = ""
    until: str = ""
    modalities: tuple[str, ...] = ("CT", *RADIOGRAPH_MODALITIES)
    body_part: str = ""
    identifiers: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    @property
    def date_range(self) -> str:
        """DICOM's range matching, empty for any date (PS3.4 C.2.2.2.5)."""
        return f"{self.since}-{self.until}" if self.since or self.until else ""


@dataclass(frozen=True)
class DicomStudy:
    """A study as its archive names it. It identifies: nothing of it is printed or logged."""

    uid: str = field(repr=False)
    patient_id: str = field(repr=False)
    accession_number: str = field(repr=False)
    version: str = field(repr=False)  # another one when images were added


def is_listed(study: DicomStudy, study_filter: StudyFilter) -> bool:
    """Whether the list names just this study (archives take `*` and `?` in a value for any text), or there is no list."""
    own = {
        "StudyInstanceUID": study.uid,
        "AccessionNumber": study.accession_number,
        "PatientID": study.patient_id,
    }
    return not study_filter.identifiers or any(
        own[key].strip() == value for key, value in study_filter.identifiers
    )


class ImageSink(Protocol):
    """What a source gives images to; both may be called from another thread."""

    def add(self, dataset: Any) -> None:
        """One image, its `file_meta` with it."""

    def skip(self, reason: str, count: int = 1) -> None:
        """Something of the study that is not even fetched, with the reason."""


class StudySource(NamedTuple):
    """Where studies come from. `fetch` raises ConsiliumError, without identifiers, when a study does not come whole.

    `left` counts, after `find` has ended, what it met and could not offer.
    """

    find_studies: Callable[[StudyFilter], Iterable[DicomStudy]]
    fetch_study: Callable[[DicomStudy, StudyFilter, ImageSink], None]
    not_offered: Counter[str]


def parse_date(text: str) -> str:
    """`2020-04-01` or `20200401` as DICOM writes a day; empty stays empty. Raises ConsiliumError for another spelling."""
    for spelling in ("%Y-%m-%d", "%Y%m%d"):
        try:
            return datetime.strptime(text, spelling).strftime("%Y%m%d") if text else ""
        except ValueError:
            continue
    raise ConsiliumError(f"'{text}' is no day; write it as 2020-04-01")


def read_identifier_table(path: Path) -> pd.DataFrame:
    """A CSV of text whose columns study, accession and patient (or DICOM's names for them) are found. Raises ConsiliumError for another."""
    try:
        table = pd.read_csv(path, dtype=str, skipinitialspace=True)
    except Exception as error:  # pandas fails in many ways
        raise ConsiliumError(
            f"{path} cannot be read as a table ({type(error).__name__}); save it as CSV (UTF-8)"
        ) from None
    plain = [re.sub(r"[^a-z]", "", str(c).lower()) for c in table.columns]
    table.columns = [
        COLUMN_SPELLINGS.get(p, p if p in IDENTIFIER_KEYWORDS else str(c).strip())
        for c, p in zip(table.columns, plain, strict=True)
    ]
    if not set(IDENTIFIER_KEYWORDS) & set(table.columns):
        raise ConsiliumError(f"{path} has no column study, accession or patient; name one so")
    if table.columns.duplicated().any():
        raise ConsiliumError(
            f"{path} has two columns for '{table.columns[table.columns.duplicated()][0]}'; remove one"
        )
    for column in table.columns:
        table[column] = table[column].str.strip()
    return table


def read_study_list(path: Path) -> tuple[tuple[str, str], ...]:
    """The studies a CSV lists: of each row the study, else the accession number, else the patient (all studies of them)."""
    table = read_identifier_table(path)
    found = []
    for row in table.to_dict("records"):
        key = next((k for k in IDENTIFIER_KEYWORDS if isinstance(row.get(k), str) and row[k]), None)
        if key:
            found.append((IDENTIFIER_KEYWORDS[key], row[key]))
    if not found:
        raise ConsiliumError(
            f"{path} lists nothing; each row must hold a study, an accession number or a patient"
        )
    return tuple(dict.fromkeys(found))


def build_search_filters(study_filter: StudyFilter) -> list[dict[str, str]]:
    """The searches that find the wanted studies, keyword to value: one for each listed study, or else one for each modality."""
    dates = {"StudyDate": study_filter.date_range} if study_filter.date_range else {}
    if study_filter.identifiers:
        return [{**dates, key: value} for key, value in study_filter.identifiers]
    return [{**dates, "ModalitiesInStudy": modality} for modality in study_filter.modalities]


def series_exclusion_reason(modality: str, body_part: str, study_filter: StudyFilter) -> str:
    """Why a series is not wanted, empty when it is. An archive that does not say what part of the body it shows is believed."""
    if modality and modality not in study_filter.modalities:
        return f"modality {modality if re.fullmatch('[A-Z]{2,8}', modality) else '?'} is not asked for"
    if study_filter.body_part and body_part and body_part.upper() != study_filter.body_part.upper():
        return "it shows another part of the body"
    return ""


def check_complete(num_received: int, num_expected: str) -> None:
    """Raises ConsiliumError when fewer images came than the archive counts; an archive that does not count is believed."""
    if num_expected.isdigit() and num_received < int(num_expected):
        raise ConsiliumError(f"{num_received} of a series' {num_expected} images came")
