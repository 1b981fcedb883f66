"""A cohort: a centre's table of scans and labels, one row a scan (columns: client/data/columns.py).

What identifies a patient stands in this table and nowhere else; error messages of this module count rows and
never quote them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from client.data import cohort_checks
from client.data.columns import (
    OPTIONAL_COLUMNS,
    REQUIRED_COLUMNS,
    SPLITS,
    TEXT_COLUMNS,
    WINDOW_COLUMNS,
    find_label_columns,
    normalise_split,
)
from client.data.discovery import discover_scans
from client.imaging.skipped import SkippedItem
from common.utils.errors import ConsiliumError

DEFAULT_FRACTIONS = (0.7, 0.15, 0.15)  # of train, val and test


def assign_split(patient: str, seed: int = 0, fractions: Sequence[float] = DEFAULT_FRACTIONS) -> str:
    """Return a patient's split: a hash of seed and patient alone, so that scans added later move nobody.

    `fractions` are the shares of train, val and test; they need not add up to 1.
    """
    digest = hashlib.sha256(f"{seed}/{patient}".encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64  # in [0, 1)
    boundaries = np.cumsum(fractions)[:-1]
    return SPLITS[int(np.searchsorted(boundaries, position * sum(fractions), side="right"))]


def build_cohort(
    folder: Path, centre: str, seed: int = 0, fractions: Sequence[float] = DEFAULT_FRACTIONS
) -> tuple[pd.DataFrame, list[SkippedItem]]:
    """Build the cohort table of a folder of scans or of a manifest.

    Args:
        folder: DICOM, NIfTI, images, the COV19-CT-DB layout, or a manifest (CSV or parquet).
        centre: The source of scans that have none.
        seed: Of the split.
        fractions: Shares of train, val and test among patients without a split; a given split is kept.

    Returns:
        The table, with absolute paths, and what was skipped.

    Raises:
        ConsiliumError: Nothing was found, the fractions are wrong, or a patient has two splits.
    """
    if len(fractions) != 3 or min(fractions) < 0 or sum(fractions) <= 0:
        raise ConsiliumError(
            f"the shares of train, val and test are {tuple(fractions)}; give three numbers, none below 0"
        )
    table, skipped = discover_scans(Path(folder))
    if table.empty:
        first_reason = ""
        if skipped:
            first_reason = f" ({len(skipped)} skipped, the first because: {skipped[0].reason})"
        raise ConsiliumError(
            f"{folder} holds no scan{first_reason}; "
            "it must hold DICOM, NIfTI, folders of slices or pictures, or be a manifest"
        )
    table["source"] = table.get("source", centre)
    _fill_splits(table, seed, fractions, folder)
    label_columns = find_label_columns(table)
    _make_file_paths_absolute(table, Path(folder))
    optional_columns = pd.Index(OPTIONAL_COLUMNS).intersection(table.columns, sort=False)
    return table[[*REQUIRED_COLUMNS, *label_columns, *optional_columns]].reset_index(drop=True), skipped


def _fill_splits(table: pd.DataFrame, seed: int, fractions: Sequence[float], folder: Path) -> None:
    """Give every scan its patient's split; raises ConsiliumError when a patient has two."""
    if "split" not in table:
        table["split"] = pd.Series(np.nan, index=table.index, dtype=object)
    num_divided = cohort_checks.count_divided_patients(table["split"], table["patient"])
    if num_divided:
        raise ConsiliumError(
            f"{folder}: {num_divided} patients have more than one split; put all scans of a patient into one"
        )
    first_splits = table["split"].groupby(table["patient"]).first()  # the first that is not missing
    split_by_patient = first_splits.to_dict()
    for patient, split in split_by_patient.items():
        if not isinstance(split, str):
            split_by_patient[patient] = assign_split(str(patient), seed, fractions)
    table["split"] = table["patient"].map(split_by_patient)


def _make_file_paths_absolute(table: pd.DataFrame, folder: Path) -> None:
    """Make the paths of masks absolute; a manifest's are relative to its folder."""
    base = folder
    if not base.is_dir():
        base = base.parent
    base = base.resolve()
    for column in _find_file_columns(table, base):
        table[column] = table[column].map(lambda path: str(base / path.strip()), na_action="ignore")


def _find_file_columns(table: pd.DataFrame, base: Path) -> list[str]:
    """List the columns beside the required ones that hold paths below `base`."""
    columns = table.columns.difference(REQUIRED_COLUMNS, sort=False)
    return [column for column in columns if _holds_file_paths(table[column], base)]


def _holds_file_paths(values: pd.Series, base: Path) -> bool:
    """Tell whether a column holds paths: its first value is a file, or a folder below another."""
    present = values.dropna()
    if present.empty or not isinstance(present.iloc[0], str):
        return False
    name = present.iloc[0].strip()
    if (base / name).is_file():
        return True
    return "/" in name and (base / name).is_dir()  # a class may have the name of a folder beside the table


def save_cohort(cohort: pd.DataFrame, path: Path) -> None:
    """Write the table as CSV or parquet; paths below its folder become relative: the folder can move."""
    base = Path(path).resolve().parent
    base.mkdir(parents=True, exist_ok=True)
    table = cohort.copy()
    for column in ["path", *_find_file_columns(table, base)]:
        table[column] = table[column].map(lambda file: _relative_path(Path(file), base), na_action="ignore")
    if Path(path).suffix == ".parquet":
        table.to_parquet(path, index=False)
    else:
        table.to_csv(path, index=False)


def _relative_path(path: Path, base: Path) -> str:
    if path.is_absolute() and path.is_relative_to(base):
        return path.relative_to(base).as_posix()
    return str(path)


def load_cohort(path: Path, centre: str) -> pd.DataFrame:
    """Read and check a cohort table: CSV, parquet, or a folder that holds `cohort.csv` or `cohort.parquet`.

    `source` defaults to the centre, `patient` to the scan. Raises ConsiliumError, without path or identifier
    because the sentence may be sent to the coordinator, when the table is missing, unreadable, empty or
    wrong.
    """
    cohort = _read_cohort_file(Path(path), centre)
    cohort_checks.check_columns(cohort, centre)
    _strip_text_columns(cohort)
    if "patient" not in cohort:
        cohort["patient"] = cohort["scan"]
    cohort["patient"] = cohort["patient"].fillna(cohort["scan"])
    cohort["source"] = cohort.get("source", centre)
    cohort_checks.check_scans(cohort, centre)
    cohort["split"] = cohort["split"].map(normalise_split, na_action="ignore")
    cohort_checks.check_splits(cohort, centre)
    if "modality" in cohort:
        cohort["modality"] = cohort["modality"].str.upper()
        cohort_checks.check_modalities(cohort, centre)
    for column in cohort.columns.intersection(WINDOW_COLUMNS):
        cohort[column] = pd.to_numeric(cohort[column], errors="coerce")
    cohort_checks.check_windows(cohort, centre)
    for column in find_label_columns(cohort):
        if pd.api.types.is_numeric_dtype(cohort[column]):  # booleans are numeric, too
            cohort[column] = cohort[column].astype(float)
    return cohort


def _read_cohort_file(path: Path, centre: str) -> pd.DataFrame:
    """Read a table as it is, identifiers as text; raises ConsiliumError when it is missing or unreadable."""
    candidates = [path]
    if path.is_dir():
        candidates = [path / "cohort.csv", path / "cohort.parquet"]
    file = next(filter(Path.is_file, candidates), None)
    if file is None:
        raise ConsiliumError(
            f"centre '{centre}': its cohort table is not there; check the data path in site.yaml, "
            "or make the table with `consilium-centre cohort`"
        )
    try:
        if file.suffix == ".parquet":
            return pd.read_parquet(file)
        return pd.read_csv(file, dtype=dict.fromkeys(TEXT_COLUMNS, str), skipinitialspace=True)
    except pd.errors.EmptyDataError:
        return pd.DataFrame()
    except Exception as error:  # pandas and pyarrow fail in many ways, and their messages quote the file
        raise ConsiliumError(
            f"centre '{centre}': its cohort table cannot be read ({type(error).__name__}); "
            "write it as CSV (UTF-8) or parquet"
        ) from None


def _strip_text_columns(cohort: pd.DataFrame) -> None:
    """Turn identifiers into text without surrounding spaces, missing ones into NaN."""
    for column in cohort.columns.intersection(TEXT_COLUMNS):
        values = cohort[column].astype(object)
        values = values.where(cohort[column].notna(), np.nan)
        cohort[column] = values.map(lambda value: str(value).strip(), na_action="ignore")


def filter_modality(cohort: pd.DataFrame, modality: str) -> pd.DataFrame:
    """Keep the scans of `preprocess.modality`, and those whose modality is not known."""
    if modality == "any" or "modality" not in cohort:
        return cohort
    is_kept = cohort["modality"].isna() | (cohort["modality"] == modality)
    return cohort[is_kept].reset_index(drop=True)
