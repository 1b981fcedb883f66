"""Checks of a cohort table that was read from a file.

Every check raises ConsiliumError with a sentence that holds neither a path nor an identifier, because it may
be sent to the coordinator. Rows are counted as a spreadsheet does: the header is row 1.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from client.data.columns import MODALITIES, SPLITS, WINDOW_COLUMNS
from common.utils.errors import ConsiliumError


def check_columns(cohort: pd.DataFrame, centre: str) -> None:
    """Check that the table has a row and the columns that nothing can replace."""
    for column in ("scan", "path", "split"):
        if column not in cohort and len(cohort.columns):
            raise ConsiliumError(
                f"centre '{centre}': its cohort table lacks the column {column}; "
                "make the table with `consilium-centre cohort`"
            )
    if cohort.empty:
        raise ConsiliumError(f"centre '{centre}': its cohort table is empty; it must hold at least one scan")


def check_scans(cohort: pd.DataFrame, centre: str) -> None:
    """Check that every row has a scan of its own and a path."""
    for column in ("scan", "path"):
        is_missing = cohort[column].isna()
        if is_missing.any():
            raise ConsiliumError(
                f"centre '{centre}': row {_first_row_number(is_missing)} of its cohort table "
                f"has no {column}; fill it in or remove the row"
            )
    num_repeated = int(cohort["scan"].duplicated().sum())
    if num_repeated:
        raise ConsiliumError(
            f"centre '{centre}': {num_repeated} scans stand twice in its cohort table; "
            "give each scan a name of its own"
        )


def check_splits(cohort: pd.DataFrame, centre: str) -> None:
    """Check that every split is train, val or test, and that a patient's scans are in one of them."""
    is_wrong = ~cohort["split"].isin(SPLITS)
    if is_wrong.any():
        raise ConsiliumError(
            f"centre '{centre}': the split in row {_first_row_number(is_wrong)} of its cohort table is not "
            f"train, val or test ({int(is_wrong.sum())} such rows)"
        )
    num_divided = count_divided_patients(cohort["split"], cohort["patient"])
    if num_divided:
        raise ConsiliumError(
            f"centre '{centre}': {num_divided} patients stand in more than one split of its cohort table; "
            "put all scans of a patient into one split"
        )


def check_modalities(cohort: pd.DataFrame, centre: str) -> None:
    """Check that every modality is CT, XR or missing."""
    is_wrong = cohort["modality"].notna() & ~cohort["modality"].isin(MODALITIES)
    if is_wrong.any():
        raise ConsiliumError(
            f"centre '{centre}': the modality in row {_first_row_number(is_wrong)} of its cohort table "
            f"is not CT or XR ({int(is_wrong.sum())} such rows); write CT, XR (any radiograph) or nothing"
        )


def check_windows(cohort: pd.DataFrame, centre: str) -> None:
    """Check that a window has both ends, in order."""
    present = cohort.columns.intersection(WINDOW_COLUMNS)
    if len(present) == 1:
        raise ConsiliumError(
            f"centre '{centre}': its cohort table has one of window_low and window_high; give both or none"
        )
    if present.empty:
        return
    is_wrong = cohort["window_low"] >= cohort["window_high"]
    if is_wrong.any():
        raise ConsiliumError(
            f"centre '{centre}': in row {_first_row_number(is_wrong)} of its cohort table window_low is "
            "not below window_high; swap or correct them"
        )


def count_divided_patients(splits: pd.Series, patients: pd.Series) -> int:
    """Count the patients whose scans are in more than one split."""
    return int((splits.groupby(patients).nunique() > 1).sum())


def _first_row_number(is_wrong: pd.Series) -> int:
    return int(np.flatnonzero(is_wrong.to_numpy())[0]) + 2
