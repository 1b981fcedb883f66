"""Tables that hospitals write: a manifest that lists the scans, and `labels.csv`."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd

from client.data.columns import REQUIRED_COLUMNS, normalise_split
from client.imaging.skipped import SkippedItem
from common.utils.errors import ConsiliumError

COLUMN_ALIASES = {
    "file": "path",
    "image": "path",
    "filename": "path",
    "patient_id": "patient",
    "data_centre": "source",
}
UNTYPED_COLUMNS = {*REQUIRED_COLUMNS, "series"}  # identifiers, whose digits are no numbers


def read_table(path: Path) -> pd.DataFrame:
    """Read a small CSV or parquet table, all values of a CSV as text and known columns under our names.

    Raises ConsiliumError when it cannot be read, or has two columns for one thing.
    """
    try:
        if path.suffix == ".parquet":
            table = pd.read_parquet(path)
        else:
            table = pd.read_csv(path, dtype=str, skipinitialspace=True)
    except Exception as error:  # pandas and pyarrow fail in many ways
        raise ConsiliumError(
            f"{path} cannot be read as a table ({type(error).__name__}); save it as CSV (UTF-8) or parquet"
        ) from error
    table.columns = table.columns.map(_normalise_column_name)
    repeated = table.columns[table.columns.duplicated()]
    if len(repeated):
        raise ConsiliumError(f"{path} has two columns for '{repeated[0]}'; remove one")
    return table


def _normalise_column_name(name: object) -> str:
    text = str(name).strip()
    return COLUMN_ALIASES.get(text.lower(), text)


def _parse_label_columns(table: pd.DataFrame) -> pd.DataFrame:
    """Turn label columns into numbers where all of their values are numbers, and splits into our words."""
    for column in table.columns.difference(list(UNTYPED_COLUMNS), sort=False):
        numbers = pd.to_numeric(table[column], errors="coerce")
        if (numbers.notna() == table[column].notna()).all():
            table[column] = numbers.astype(float)
    if "split" in table:
        table["split"] = table["split"].map(normalise_split, na_action="ignore")
    return table


def read_manifest(path: Path) -> tuple[pd.DataFrame, list[SkippedItem]]:
    """Read a table that lists the scans.

    It has a column path (or file, image), and where they are known label (taken for covid), patient, split,
    source and so on. Paths are relative to the table's folder.

    Returns:
        The table with absolute paths, and the rows that were skipped.

    Raises:
        ConsiliumError: There is no column of paths, or two scans have one name.
    """
    table = read_table(path)
    if "path" not in table:
        raise ConsiliumError(
            f"{path} has no column path, file or image; give the column of paths one of these names"
        )
    if "covid" not in table and "label" in table:
        table = table.rename(columns={"label": "covid"})
    is_index = table.columns.str.startswith("Unnamed")  # what pandas calls a saved index
    table = _parse_label_columns(table.loc[:, ~is_index].copy())
    table["path"] = table["path"].map(lambda file: str((path.parent / file).resolve()), na_action="ignore")
    table, skipped = _skip_unusable_rows(table)
    _fill_identifiers(table, path)
    return table, skipped


def _skip_unusable_rows(table: pd.DataFrame) -> tuple[pd.DataFrame, list[SkippedItem]]:
    """Drop rows without an existing file, and rows that repeat another."""
    is_repeated = table["path"].duplicated()
    if "series" in table:
        is_repeated &= table["series"].duplicated()
    usable_rows: list[int] = []
    skipped: list[SkippedItem] = []
    for row, (file, file_is_repeated) in enumerate(zip(table["path"], is_repeated, strict=True)):
        reason = _exclusion_reason(file, file_is_repeated)
        if reason:
            skipped.append(SkippedItem(str(file), reason))
        else:
            usable_rows.append(row)
    return table.iloc[usable_rows].reset_index(drop=True), skipped


def _exclusion_reason(file: object, is_repeated: bool) -> str:
    """Say why a manifest's row is no scan; empty when it is one."""
    if not isinstance(file, str):
        return "a row without a path"
    if is_repeated:
        return "listed twice"
    if not Path(file).exists():
        return "the file is not there"
    return ""


def _fill_identifiers(table: pd.DataFrame, path: Path) -> None:
    """Name scans after their paths and patients after their scans, where the manifest does not."""
    if "scan" not in table:
        table["scan"] = table["path"].map(lambda file: os.path.relpath(file, path.parent))
        if "series" in table:
            table["scan"] += table["series"].radd("#").fillna("")
    num_repeated = int(table["scan"].duplicated().sum())
    if num_repeated:
        raise ConsiliumError(
            f"{path}: {num_repeated} scans have the name of another; give each scan a name of its own"
        )
    if "patient" not in table:
        table["patient"] = table["scan"]
    table["patient"] = table["patient"].fillna(table["scan"])


def join_labels(table: pd.DataFrame, labels: pd.DataFrame, folder: Path) -> tuple[pd.DataFrame, int]:
    """Join a table of labels to the scans found in `folder`; its values replace those from folders' names.

    Rows are matched by path, scan or patient, whichever of these columns comes first in this order.

    Returns:
        The scans with their labels, and the number of label rows that match no scan.

    Raises:
        ConsiliumError: There is no such column, or two rows label the same scan.
    """
    key_columns = pd.Index(["path", "scan", "patient"]).intersection(labels.columns, sort=False)
    if key_columns.empty:
        raise ConsiliumError(
            f"{folder / 'labels.csv'} has no column path, scan or patient to find its scans by; add one"
        )
    key_column = key_columns[0]
    labels = _parse_label_columns(labels.dropna(subset=[key_column])).reset_index(drop=True)
    names = labels[key_column].astype(str).str.strip()
    num_repeated = int(names.duplicated().sum())
    if num_repeated:
        raise ConsiliumError(
            f"{folder / 'labels.csv'} labels {num_repeated} scans twice; keep one row of each"
        )
    row_by_name = dict(zip(names.str.rstrip("/"), labels.index, strict=True))
    matches = _match_rows(table, row_by_name, key_column, folder)
    for column in labels.columns.difference([key_column, "scan", "path"], sort=False):
        values = labels[column].reindex(matches)  # -1 is no row of the labels: NaN
        values.index = table.index
        if column in table:
            values = values.where(values.notna(), table[column])
        table[column] = values
    num_matched = len(set(matches) - {-1})
    return table, len(row_by_name) - num_matched


def _match_rows(table: pd.DataFrame, row_by_name: dict[str, int], key_column: str, folder: Path) -> list[int]:
    """Return for each scan its row in the table of labels, -1 for none."""
    if key_column == "patient":
        return table["patient"].map(lambda patient: row_by_name.get(patient, -1)).tolist()
    file_name_counts = Counter(Path(path).name for path in table["path"])
    matches: list[int] = []
    for scan in table.itertuples():
        known_names = filter(row_by_name.__contains__, _candidate_names(scan, folder, file_name_counts))
        first_name = next(known_names, "")
        matches.append(row_by_name.get(first_name, -1))
    return matches


def _candidate_names(scan: Any, folder: Path, file_name_counts: Counter[str]) -> Iterator[str]:
    """Yield the names that a table of labels may call a scan by, the most specific first."""
    yield scan.scan
    yield scan.path
    yield os.path.relpath(scan.path, folder)
    file_name = Path(scan.path).name
    if file_name_counts[file_name] == 1:  # a bare name must not be ambiguous
        yield file_name
        yield re.sub(r"(\.nii)?\.[a-z]+(\.gz)?$", "", file_name, flags=re.IGNORECASE)
