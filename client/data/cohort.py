"""A cohort: a centre's table of scans and labels, one row a scan.

Columns: `scan` (unique), `path` (relative to the table's folder, or absolute), `patient`, `source`, `split` (train | val | test), then any
labels (numbers, class names, or the path of a mask; empty = missing), and optionally `window_low`/`window_high` (shown as 0..255, in the
image's units), `series` (a SeriesInstanceUID, where a folder holds several), `modality` (CT | XR) and `lungs` (the path of a lung mask).
What identifies a patient stands in this table and nowhere else: sentences made here count, they never quote.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from client.data.discovery import SkippedItem, discover_scans, normalise_split
from common.utils.errors import ConsiliumError

SPLITS = ("train", "val", "test")
REQUIRED_COLUMNS = ["scan", "path", "patient", "source", "split"]
OPTIONAL_COLUMNS = ["window_low", "window_high", "series", "modality", "lungs"]
MODALITIES = ("CT", "XR")


def assign_split(patient: str, seed: int = 0, fractions: Sequence[float] = (0.7, 0.15, 0.15)) -> str:
    """The split of a patient: a hash of (seed, patient) and of nothing else, so that scans added later move nobody."""
    place = int.from_bytes(hashlib.sha256(f"{seed}/{patient}".encode()).digest()[:8], "big") / 2**64
    return SPLITS[int(np.searchsorted(np.cumsum(fractions)[:-1], place * sum(fractions), side="right"))]


def build_cohort(
    folder: Path, centre: str, seed: int = 0, fractions: Sequence[float] = (0.7, 0.15, 0.15)
) -> tuple[pd.DataFrame, list[SkippedItem]]:
    """The cohort of a folder (DICOM, NIfTI, pictures, the COV19-CT-DB layout) or of a manifest (CSV, parquet), and what was left out.

    Paths are absolute. A split that is given is kept; the other patients are divided by `split_of`.
    Raises ConsiliumError when nothing is found or one patient is given two splits.
    """
    if len(fractions) != 3 or min(fractions) < 0 or sum(fractions) <= 0:
        raise ConsiliumError(f"the shares of train, val and test are {tuple(fractions)}; give three numbers, none below 0")
    table, skipped = discover_scans(Path(folder))
    if table.empty:
        why = f" ({len(skipped)} skipped, the first because: {skipped[0].reason})" if skipped else ""
        raise ConsiliumError(f"{folder} holds no scan{why}; it must hold DICOM, NIfTI, folders of slices or pictures, or be a manifest")
    table["source"] = table.get("source", centre)
    given = table["split"] if "split" in table else pd.Series(np.nan, index=table.index, dtype=object)
    by_patient = given.groupby(table["patient"]).first()  # the first that is not missing
    table["split"] = [by_patient[p] if isinstance(by_patient[p], str) else assign_split(p, seed, fractions) for p in table["patient"]]
    torn = int((given.groupby(table["patient"]).nunique() > 1).sum())
    if torn:
        raise ConsiliumError(f"{folder}: {torn} patients are given more than one split; a patient's scans must stay together")
    labels = find_label_columns(table)
    base = (Path(folder) if Path(folder).is_dir() else Path(folder).parent).resolve()
    for column in (c for c in table if c not in REQUIRED_COLUMNS and _holds_file_paths(table[c], base)):
        table[column] = table[column].map(lambda v: str(base / v.strip()), na_action="ignore")
    return table[REQUIRED_COLUMNS + labels + [c for c in OPTIONAL_COLUMNS if c in table]].reset_index(drop=True), skipped


def _holds_file_paths(values: pd.Series, base: Path) -> bool:
    """Whether a column's first value is the path of a file, or of a folder below another: then all are (a manifest's masks)."""
    first = values.dropna().head(1).tolist()
    if not first or not isinstance(first[0], str):
        return False
    named = first[0].strip()  # a class may be called as a folder beside the table is
    return (base / named).is_file() or ("/" in named and (base / named).is_dir())


def save_cohort(df: pd.DataFrame, path: Path) -> None:
    """Write the table as `.csv` or `.parquet`; paths (masks' too) below its folder become relative, so that the folder can move."""
    base = Path(path).resolve().parent
    base.mkdir(parents=True, exist_ok=True)
    out = df.copy()
    for column in ["path", *(c for c in out if c not in REQUIRED_COLUMNS and _holds_file_paths(out[c], base))]:
        out[column] = out[column].map(lambda p: _relative_path(Path(p), base), na_action="ignore")
    if Path(path).suffix == ".parquet":
        out.to_parquet(path, index=False)
    else:
        out.to_csv(path, index=False)


def _relative_path(path: Path, base: Path) -> str:
    return path.relative_to(base).as_posix() if path.is_absolute() and path.is_relative_to(base) else str(path)


def load_cohort(path: Path, centre: str) -> pd.DataFrame:
    """Read and check a cohort table: `.csv`, `.parquet`, or a folder that holds `cohort.csv` or `cohort.parquet`.

    `source` defaults to the centre, `patient` to the scan. Raises ConsiliumError, without path or identifier (the sentence may be
    sent to the coordinator), when the table is missing, unreadable, empty, lacks columns, or names a scan or split wrongly.
    """
    path, at = Path(path), f"centre '{centre}'"
    if path.is_dir():
        path = next((path / name for name in ("cohort.csv", "cohort.parquet") if (path / name).is_file()), path / "cohort.csv")
    if not path.is_file():
        raise ConsiliumError(
            f"{at}: its cohort table is not there; check the data path in site.yaml, or make it with `consilium-centre cohort`"
        )
    names = [*REQUIRED_COLUMNS, "series", "modality", "lungs"]
    try:
        csv = path.suffix != ".parquet"
        df = pd.read_csv(path, dtype=dict.fromkeys(names, str), skipinitialspace=True) if csv else pd.read_parquet(path)
    except pd.errors.EmptyDataError:
        df = pd.DataFrame()
    except Exception as error:  # pandas and pyarrow fail in many ways, and their texts quote the file
        raise ConsiliumError(
            f"{at}: its cohort table cannot be read ({type(error).__name__}); write it as CSV (UTF-8) or parquet"
        ) from None
    missing = [c for c in ("scan", "path", "split") if c not in df]
    if missing and len(df.columns):
        raise ConsiliumError(f"{at}: its cohort table lacks the column {missing[0]}; make it with `consilium-centre cohort`")
    if df.empty:
        raise ConsiliumError(f"{at}: its cohort table is empty; it must hold at least one scan")
    for column in (c for c in names if c in df):
        df[column] = df[column].astype(object).where(df[column].notna(), np.nan).map(lambda v: str(v).strip(), na_action="ignore")
    df["patient"] = df["patient"].fillna(df["scan"]) if "patient" in df else df["scan"]
    df["source"] = df.get("source", centre)
    for column in ("scan", "path"):
        if df[column].isna().any():
            raise ConsiliumError(f"{at}: row {_first_row_number(df[column].isna())} of its cohort table has no {column}; fill it in or remove the row")
    if df["scan"].duplicated().any():
        raise ConsiliumError(
            f"{at}: {int(df['scan'].duplicated().sum())} scans stand twice in its cohort table; each needs a name of its own"
        )
    df["split"] = df["split"].map(normalise_split, na_action="ignore")
    wrong = ~df["split"].isin(SPLITS)
    if wrong.any():
        raise ConsiliumError(
            f"{at}: the split in row {_first_row_number(wrong)} of its cohort table is not train, val or test ({int(wrong.sum())} such rows)"
        )
    torn = int((df.groupby("patient")["split"].nunique() > 1).sum())
    if torn:
        raise ConsiliumError(
            f"{at}: {torn} patients stand in more than one split of its cohort table; a patient's scans must stay together"
        )
    if "modality" in df:
        df["modality"] = df["modality"].str.upper()
        wrong = df["modality"].notna() & ~df["modality"].isin(MODALITIES)
        if wrong.any():
            raise ConsiliumError(
                f"{at}: the modality in row {_first_row_number(wrong)} of its cohort table is not CT or XR ({int(wrong.sum())} such rows); "
                "write CT, XR (any radiograph) or nothing"
            )
    for column in ("window_low", "window_high"):
        if column in df:
            df[column] = pd.to_numeric(df[column], errors="coerce")
    if ("window_low" in df) != ("window_high" in df):
        raise ConsiliumError(f"{at}: its cohort table has one of window_low and window_high; give both or none")
    if "window_low" in df and (df["window_low"] >= df["window_high"]).any():
        raise ConsiliumError(
            f"{at}: row {_first_row_number(df['window_low'] >= df['window_high'])} of its cohort table has window_low not below window_high"
        )
    for column in find_label_columns(df):
        if df[column].dtype == bool or pd.api.types.is_numeric_dtype(df[column]):
            df[column] = df[column].astype(float)
    return df


def filter_modality(df: pd.DataFrame, modality: str) -> pd.DataFrame:
    """The scans of `preprocess.modality`: rows that say another are not part; what says nothing, and a table without the column, stays."""
    if modality == "any" or "modality" not in df:
        return df
    return df[df["modality"].isna() | (df["modality"] == modality)].reset_index(drop=True)


def _first_row_number(wrong: pd.Series) -> int:
    """The first wrong row as a spreadsheet counts: the header is row 1."""
    return int(np.flatnonzero(wrong.to_numpy())[0]) + 2


def find_label_columns(df: pd.DataFrame) -> list[str]:
    """The columns that may be labels: all that have no meaning of their own."""
    return [c for c in df.columns if c not in REQUIRED_COLUMNS and c not in OPTIONAL_COLUMNS]
