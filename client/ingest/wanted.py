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

from client.readers.headers import RADIOGRAPH
from common.errors import ConsiliumError

KEYS = {"study": "StudyInstanceUID", "accession": "AccessionNumber", "patient": "PatientID"}  # a table's column: what DICOM calls it
SPELT = {"studyinstanceuid": "study", "studyuid": "study", "accessionnumber": "accession", "patientid": "patient"}


@dataclass(frozen=True)
class Wanted:
    """What to take. Dates are YYYYMMDD, both ends taken; `listed` holds (StudyInstanceUID | AccessionNumber | PatientID, value)."""

    since: str = ""
    until: str = ""
    modalities: tuple[str, ...] = ("CT", *RADIOGRAPH)
    body_part: str = ""
    listed: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    @property
    def dates(self) -> str:
        """DICOM's range matching, empty for any date (PS3.4 C.2.2.2.5)."""
        return f"{self.since}-{self.until}" if self.since or self.until else ""


@dataclass(frozen=True)
class Study:
    """A study as its archive names it. It identifies: nothing of it is printed or logged."""

    uid: str = field(repr=False)
    patient: str = field(repr=False)
    accession: str = field(repr=False)
    version: str = field(repr=False)  # another one when images were added


def is_listed(study: Study, wanted: Wanted) -> bool:
    """Whether the list names just this study (archives take `*` and `?` in a value for any text), or there is no list."""
    own = {"StudyInstanceUID": study.uid, "AccessionNumber": study.accession, "PatientID": study.patient}
    return not wanted.listed or any(own[key].strip() == value for key, value in wanted.listed)


class Taker(Protocol):
    """What a source gives images to; both may be called from another thread."""

    def take(self, dataset: Any) -> None:
        """One image, its `file_meta` with it."""

    def skip(self, reason: str, count: int = 1) -> None:
        """Something of the study that is not even fetched, with the reason."""


class Source(NamedTuple):
    """Where studies come from. `fetch` raises ConsiliumError, without identifiers, when a study does not come whole.

    `left` counts, after `find` has ended, what it met and could not offer.
    """

    find: Callable[[Wanted], Iterable[Study]]
    fetch: Callable[[Study, Wanted, Taker], None]
    left: Counter[str]


def day(text: str) -> str:
    """`2020-04-01` or `20200401` as DICOM writes a day; empty stays empty. Raises ConsiliumError for another spelling."""
    for spelling in ("%Y-%m-%d", "%Y%m%d"):
        try:
            return datetime.strptime(text, spelling).strftime("%Y%m%d") if text else ""
        except ValueError:
            continue
    raise ConsiliumError(f"'{text}' is no day; write it as 2020-04-01")


def read_keys(path: Path) -> pd.DataFrame:
    """A CSV of text whose columns study, accession and patient (or DICOM's names for them) are found. Raises ConsiliumError for another."""
    try:
        table = pd.read_csv(path, dtype=str, skipinitialspace=True)
    except Exception as error:  # pandas fails in many ways
        raise ConsiliumError(f"{path} cannot be read as a table ({type(error).__name__}); save it as CSV (UTF-8)") from None
    plain = [re.sub(r"[^a-z]", "", str(c).lower()) for c in table.columns]
    table.columns = [SPELT.get(p, p if p in KEYS else str(c).strip()) for c, p in zip(table.columns, plain, strict=True)]
    if not set(KEYS) & set(table.columns):
        raise ConsiliumError(f"{path} has no column study, accession or patient; name one so")
    if table.columns.duplicated().any():
        raise ConsiliumError(f"{path} has two columns for '{table.columns[table.columns.duplicated()][0]}'; remove one")
    for column in table.columns:
        table[column] = table[column].str.strip()
    return table


def read_list(path: Path) -> tuple[tuple[str, str], ...]:
    """The studies a CSV lists: of each row the study, else the accession number, else the patient (all studies of them)."""
    table = read_keys(path)
    found = []
    for row in table.to_dict("records"):
        key = next((k for k in KEYS if isinstance(row.get(k), str) and row[k]), None)
        if key:
            found.append((KEYS[key], row[key]))
    if not found:
        raise ConsiliumError(f"{path} lists nothing; each row must hold a study, an accession number or a patient")
    return tuple(dict.fromkeys(found))


def queries(wanted: Wanted) -> list[dict[str, str]]:
    """The searches that find the wanted studies, keyword to value: one for each listed study, or else one for each modality."""
    dates = {"StudyDate": wanted.dates} if wanted.dates else {}
    if wanted.listed:
        return [{**dates, key: value} for key, value in wanted.listed]
    return [{**dates, "ModalitiesInStudy": modality} for modality in wanted.modalities]


def unwanted(modality: str, body_part: str, wanted: Wanted) -> str:
    """Why a series is not wanted, empty when it is. An archive that does not say what part of the body it shows is believed."""
    if modality and modality not in wanted.modalities:
        return f"modality {modality if re.fullmatch('[A-Z]{2,8}', modality) else '?'} is not asked for"
    if wanted.body_part and body_part and body_part.upper() != wanted.body_part.upper():
        return "it shows another part of the body"
    return ""


def whole(came: int, expected: str) -> None:
    """Raises ConsiliumError when fewer images came than the archive counts; an archive that does not count is believed."""
    if expected.isdigit() and came < int(expected):
        raise ConsiliumError(f"{came} of a series' {expected} images came")
