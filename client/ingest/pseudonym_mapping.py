"""The table that links pseudonyms to identifiers; written only on request, readable by its owner only."""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from pathlib import Path

from client.ingest.pseudonyms import make_patient_pseudonym
from client.ingest.selection import DicomStudy

HEADER = ["scan", "patient", "StudyInstanceUID", "PatientID", "AccessionNumber"]


def update_mapping(path: Path, studies: Mapping[str, DicomStudy], key: bytes) -> None:
    """Add {pseudonym: study} to the table, in place of older rows of the same studies.

    Whoever has the table can undo the pseudonyms, so its mode is 0600.
    """
    rows = _read_rows(path)
    for pseudonym, study in studies.items():
        patient = make_patient_pseudonym(key, study.patient_id, study.uid)
        rows[pseudonym] = [pseudonym, patient, study.uid, study.patient_id, study.accession_number]
    incomplete = path.with_name("mapping.new")
    descriptor = os.open(incomplete, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "w", newline="") as file:
        csv.writer(file).writerows([HEADER, *rows.values()])
    incomplete.replace(path)


def _read_rows(path: Path) -> dict[str, list[str]]:
    """Return {pseudonym: row}, without the header."""
    if not path.exists():
        return {}
    with path.open(newline="") as file:
        _, *rows = csv.reader(file)
    return {row[0]: row for row in rows}
