"""Select the studies that a centre ingests: by date, modality, body part, or a list of identifiers."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd

from client.imaging.readers.dicom_series import RADIOGRAPH_MODALITIES
from common.utils.errors import ConsiliumError

IDENTIFIER_KEYWORDS = {
    "study": "StudyInstanceUID",
    "accession": "AccessionNumber",
    "patient": "PatientID",
}  # {column of a table: DICOM keyword}
COLUMN_SPELLINGS = {
    "studyinstanceuid": "study",
    "studyuid": "study",
    "accessionnumber": "accession",
    "patientid": "patient",
}


@dataclass(frozen=True)
class StudyFilter:
    """What to ingest.

    Dates are YYYYMMDD, both ends included. `identifiers` holds pairs of a DICOM keyword (StudyInstanceUID,
    AccessionNumber or PatientID) and its value.
    """

    since: str = ""
    until: str = ""
    modalities: tuple[str, ...] = ("CT", *RADIOGRAPH_MODALITIES)
    body_part: str = ""
    identifiers: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    @property
    def date_range(self) -> str:
        """The dates in DICOM's range matching (PS3.4 C.2.2.2.5), empty for any date."""
        if not self.since and not self.until:
            return ""
        return f"{self.since}-{self.until}"


@dataclass(frozen=True)
class DicomStudy:
    """A study as its archive names it. Its values identify a patient: they are never printed or logged."""

    uid: str = field(repr=False)
    patient_id: str = field(repr=False)
    accession_number: str = field(repr=False)
    version: str = field(repr=False)  # changes when images are added


def is_listed(study: DicomStudy, study_filter: StudyFilter) -> bool:
    """Return whether the filter lists exactly this study, or lists none.

    The check is needed because archives take `*` and `?` in a value for any text.
    """
    if not study_filter.identifiers:
        return True
    values = {
        "StudyInstanceUID": study.uid,
        "AccessionNumber": study.accession_number,
        "PatientID": study.patient_id,
    }
    return any(values[keyword].strip() == value for keyword, value in study_filter.identifiers)


def parse_date(text: str) -> str:
    """Return a date such as `2020-04-01` or `20200401` as YYYYMMDD; empty text stays empty.

    Raises ConsiliumError for any other text.
    """
    if not text:
        return ""
    for spelling in ("%Y-%m-%d", "%Y%m%d"):
        try:
            return datetime.strptime(text, spelling).strftime("%Y%m%d")
        except ValueError:
            continue
    raise ConsiliumError(f"'{text}' is not a date; write it as 2020-04-01")


def read_identifier_table(path: Path) -> pd.DataFrame:
    """Read a CSV as text, with its identifier columns renamed to study, accession and patient.

    Raises ConsiliumError when the file cannot be read, has no identifier column, or has a column twice.
    """
    try:
        table = pd.read_csv(path, dtype=str, skipinitialspace=True)
    except Exception as error:  # pandas fails in many ways
        raise ConsiliumError(
            f"{path} cannot be read as a table ({type(error).__name__}); save it as CSV (UTF-8)"
        ) from None
    table.columns = pd.Index([_normalise_column(str(column)) for column in table.columns])
    if table.columns.intersection(list(IDENTIFIER_KEYWORDS)).empty:
        raise ConsiliumError(f"{path} has no column study, accession or patient; add or rename one")
    duplicates = table.columns[table.columns.duplicated()]
    if not duplicates.empty:
        raise ConsiliumError(f"{path} has two columns for '{duplicates[0]}'; remove one")
    for column in table.columns:
        table[column] = table[column].str.strip()
    return table


def _normalise_column(column: str) -> str:
    """Return study, accession or patient for their usual spellings, else the column without outer spaces."""
    letters = re.sub(r"[^a-z]", "", column.lower())
    if letters in IDENTIFIER_KEYWORDS:
        return letters
    return COLUMN_SPELLINGS.get(letters, column.strip())


def read_study_list(path: Path) -> tuple[tuple[str, str], ...]:
    """Read the studies that a CSV lists, as pairs for `StudyFilter.identifiers`.

    Each row gives its study, else its accession number, else its patient, who stands for all of the
    patient's studies. Raises ConsiliumError when the table cannot be read or lists nothing.
    """
    identifiers: dict[tuple[str, str], None] = {}  # a set in the table's order
    for row in read_identifier_table(path).to_dict("records"):
        column = _first_identifier(row)
        if column:
            identifiers[IDENTIFIER_KEYWORDS[column], row[column]] = None
    if not identifiers:
        raise ConsiliumError(
            f"{path} lists no study; give each row a study, an accession number or a patient"
        )
    return tuple(identifiers)


def _first_identifier(row: Mapping[Hashable, Any]) -> str:
    """Return the first identifier column that has a value in the row, or an empty text."""
    for column in IDENTIFIER_KEYWORDS:
        value = row.get(column)
        if isinstance(value, str) and value:
            return column
    return ""


def build_search_filters(study_filter: StudyFilter) -> list[dict[str, str]]:
    """Return the searches that find the selected studies, as {DICOM keyword: value}.

    There is one for each listed identifier, or else one for each modality.
    """
    dates = {}
    if study_filter.date_range:
        dates["StudyDate"] = study_filter.date_range
    if study_filter.identifiers:
        return [{**dates, keyword: value} for keyword, value in study_filter.identifiers]
    return [{**dates, "ModalitiesInStudy": modality} for modality in study_filter.modalities]


def series_exclusion_reason(modality: str, body_part: str, study_filter: StudyFilter) -> str:
    """Return why a series is not selected, or an empty text when it is.

    An unknown modality or body part excludes nothing.
    """
    if modality and modality not in study_filter.modalities:
        # Any other text could identify a patient.
        shown_modality = modality if re.fullmatch("[A-Z]{2,8}", modality) else "?"
        return f"modality {shown_modality} is not selected"
    if study_filter.body_part and body_part and body_part.upper() != study_filter.body_part.upper():
        return "it shows another body part"
    return ""
