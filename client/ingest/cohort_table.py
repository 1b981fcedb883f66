"""Update the cohort table: one row per study, one split per patient, labels joined by pseudonym.

What a person has written into the table stays: other columns, other rows, a split, a source.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
from pydicom.datadict import tag_for_keyword

from client.data.cohort import assign_split
from client.data.columns import OPTIONAL_COLUMNS, REQUIRED_COLUMNS
from client.ingest.pseudonyms import make_pseudonym
from client.ingest.selection import IDENTIFIER_KEYWORDS, read_identifier_table
from common.utils.errors import ConsiliumError

# Columns of a hospital's table that may identify a patient; no label has such a name.
IDENTIFYING_COLUMN = re.compile(
    r"(^|[^a-z])"
    r"(name|id|ids|uid|mrn|birth|born|dob|date|day|address|phone|email|insurance|physician|ssn|nhs)"
    r"([^a-z]|$)"
)


@dataclass(frozen=True)
class CohortRow:
    """The columns that an ingest fills; the names are the table's."""

    scan: str  # the study's pseudonym
    path: str  # relative to the table's folder
    patient: str  # pseudonym
    source: str
    modality: str


@dataclass(frozen=True)
class LabelTable:
    """Labels by pseudonym."""

    key_column: str  # what the pseudonyms are of: "scan", "patient" or "accession"
    labels: pd.DataFrame  # index: pseudonyms; a column per label, empty text where it is missing
    ignored_columns: list[str]


def read_cohort_table(path: Path) -> pd.DataFrame:
    """Read the table as text, empty cells as empty text; a missing table as one without rows.

    Raises ConsiliumError when the table cannot be read or lacks a column, or when the cohort is stored as
    parquet, to which no rows can be added.
    """
    if not path.exists():
        parquet_path = path.with_suffix(".parquet")
        if parquet_path.exists():
            raise ConsiliumError(f"the cohort is stored as {parquet_path}; save it as {path.name} first")
        return pd.DataFrame(columns=[*REQUIRED_COLUMNS, "modality"], dtype=str)
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, skipinitialspace=True)
    except Exception as error:  # pandas fails in many ways
        raise ConsiliumError(
            f"{path} cannot be read as a table ({type(error).__name__}); repair it, or move it away"
        ) from None
    for column in ("scan", "path", "split"):
        if column not in table:
            raise ConsiliumError(f"{path} lacks the column {column}; repair it, or move it away")
    return table


def write_cohort_table(table: pd.DataFrame, path: Path) -> None:
    """Replace the file; a process that is killed leaves the old table or the new one."""
    incomplete = path.with_name(f".{path.name}.new")
    table.to_csv(incomplete, index=False)
    if path.exists():
        shutil.copymode(path, incomplete)
    incomplete.replace(path)


def upsert_row(table: pd.DataFrame, row: CohortRow, seed: int) -> pd.DataFrame:
    """Return the table with the scan's row, new or in place of the scan's old one.

    The split is the one that the patient already has in the table, else the one that `assign_split` gives.
    """
    values = asdict(row)
    new_columns = [column for column in values if column not in table]
    table = table.reindex(columns=[*table.columns, *new_columns], fill_value="")
    values["split"] = _find_split(table, row.patient) or assign_split(row.patient, seed)
    scan_index = table.index[table["scan"] == row.scan]
    if scan_index.empty:
        return pd.concat([table, pd.DataFrame([values])], ignore_index=True).fillna("")
    position = scan_index[0]
    values["source"] = table.loc[position, "source"] or row.source  # a person may have named the scanner
    table.loc[position, list(values)] = list(values.values())
    return table


def _find_split(table: pd.DataFrame, patient: str) -> str:
    """Return the first split of the patient's rows, or an empty text."""
    splits = table.loc[table["patient"] == patient, "split"]
    return next(filter(None, splits), "")


def read_labels(path: Path, key: bytes) -> LabelTable:
    """Read labels from a CSV whose rows are named by study, else accession number, else patient.

    Raises ConsiliumError when the table cannot be read, names a row twice, or has no column that is a label.
    """
    table = read_identifier_table(path)
    identifier = next(column for column in IDENTIFIER_KEYWORDS if column in table)
    table = table[table[identifier].notna() & (table[identifier] != "")]
    num_duplicates = int(table[identifier].duplicated().sum())
    if num_duplicates:
        raise ConsiliumError(
            f"{path} labels {num_duplicates} of its {identifier} values twice; keep one row of each"
        )
    label_columns: list[str] = []
    ignored_columns: list[str] = []
    for column in table.columns.difference(list(IDENTIFIER_KEYWORDS), sort=False):
        if _is_label_column(column):
            label_columns.append(column)
        else:
            ignored_columns.append(column)
    if not label_columns:
        raise ConsiliumError(f"{path} has no column that is a label; put each label into a column of its own")
    labels = table[label_columns].fillna("")
    labels.index = pd.Index([make_pseudonym(key, identifier, value) for value in table[identifier]])
    key_column = "scan" if identifier == "study" else identifier
    return LabelTable(key_column, labels, ignored_columns)


def _is_label_column(column: str) -> bool:
    """Return whether a column can be a label: it has no meaning in a cohort table and identifies nobody."""
    if column in (*REQUIRED_COLUMNS, *OPTIONAL_COLUMNS):
        return False
    words = re.sub(r"([a-z])([A-Z])", r"\1 \2", column).lower()
    if IDENTIFYING_COLUMN.search(words):
        return False
    return tag_for_keyword(column) is None  # no column of DICOM values


def join_labels(table: pd.DataFrame, labels: LabelTable, accessions: Mapping[str, str]) -> pd.DataFrame:
    """Return a copy of the table with the labels; a missing label leaves the cell as it is.

    `accessions` is {scan: pseudonym of its accession number}.
    """
    joined = table.copy()
    if labels.labels.empty or table.empty:
        return joined
    if labels.key_column == "accession":
        pseudonyms = table["scan"].map(dict(accessions))
    else:
        pseudonyms = table[labels.key_column]
    for column in labels.labels:
        new_values = pseudonyms.map(labels.labels[column].to_dict()).fillna("")
        old_values = joined.get(column, pd.Series("", index=table.index))
        joined[column] = new_values.where(new_values != "", old_values)
    return joined
