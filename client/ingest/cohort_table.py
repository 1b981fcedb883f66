"""The cohort's table as studies come in: a row a study, patients kept in one split, labels joined by the names that the site's key makes.

What a person wrote into the table stays as it is: other columns, other rows, a split.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
from pydicom.datadict import tag_for_keyword

from client.data.cohort import assign_split
from client.data.columns import OPTIONAL_COLUMNS, REQUIRED_COLUMNS
from client.ingest.pseudonyms import make_pseudonym
from client.ingest.selection import IDENTIFIER_KEYWORDS, read_identifier_table
from common.utils.errors import ConsiliumError

# Columns of a hospital's table that are no labels; what a coordinator's task reads is never called so.
IDENTIFYING_COLUMN = re.compile(
    r"(^|[^a-z])(name|id|ids|uid|mrn|birth|born|dob|date|day|address|phone|email|insurance|physician|ssn|nhs)([^a-z]|$)"
)


def read_cohort_table(path: Path) -> pd.DataFrame:
    """The table as text, empty cells as ""; a new one where there is none."""
    if not path.exists():
        if path.with_suffix(".parquet").exists():
            raise ConsiliumError(
                f"{path.with_suffix('.parquet')} holds the cohort; save it as {path.name} first, rows are added to that"
            )
        return pd.DataFrame(columns=[*REQUIRED_COLUMNS, "modality"], dtype=str)
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, skipinitialspace=True)
    except Exception as error:  # pandas fails in many ways
        raise ConsiliumError(
            f"{path} cannot be read as a table ({type(error).__name__}); repair it, or move it away"
        ) from None
    missing = [c for c in ("scan", "path", "split") if c not in table]
    if missing:
        raise ConsiliumError(f"{path} lacks the column {missing[0]}; repair it, or move it away")
    return table


def write_cohort_table(table: pd.DataFrame, path: Path) -> None:
    """Replace the file at once: a kill leaves the old one or the new one."""
    fresh = path.with_name(f".{path.name}.new")
    table.to_csv(fresh, index=False)
    if path.exists():
        shutil.copymode(path, fresh)
    fresh.replace(path)


def upsert_row(table: pd.DataFrame, row: dict[str, str], seed: int) -> pd.DataFrame:
    """The table with the scan's row, new or in place of its old one; the patient's split is the one that stands there, else `split_of`."""
    table = table.reindex(columns=[*table.columns, *(c for c in row if c not in table)], fill_value="")
    own = table["patient"] == row["patient"] if "patient" in table else pd.Series(False, index=table.index)
    given = [split for split in table.loc[own, "split"] if split]
    row = {"split": given[0] if given else assign_split(row["patient"], seed), **row}
    at = table.index[table["scan"] == row["scan"]]
    if len(at):
        kept = {"source": table.loc[at[0], "source"] or row["source"]}  # a person may have named the scanner
        table.loc[at[0], list(row)] = list((row | kept).values())
        return table
    return pd.concat([table, pd.DataFrame([row])], ignore_index=True).fillna("")


def read_labels(path: Path, key: bytes) -> tuple[pd.DataFrame, list[str]]:
    """Labels by the names that the key makes: `column` (scan | patient | accession), `name`, then the labels; and what was left out.

    Found by study, else by accession number, else by patient. Raises ConsiliumError when a row is there twice or there is no label.
    """
    table = read_identifier_table(path)
    by = next(k for k in IDENTIFIER_KEYWORDS if k in table)
    table = table[table[by].notna() & (table[by] != "")]
    if table[by].duplicated().any():
        raise ConsiliumError(
            f"{path} labels {int(table[by].duplicated().sum())} of its {by} values twice; keep one row of each"
        )
    rest = [str(c) for c in table if c not in IDENTIFIER_KEYWORDS]
    meant = [
        c
        for c in rest
        if c not in (*REQUIRED_COLUMNS, *OPTIONAL_COLUMNS)
        and not IDENTIFYING_COLUMN.search(_separate_words(c))
        and tag_for_keyword(c) is None
    ]
    if not meant:
        raise ConsiliumError(f"{path} has no column that is a label; each label is a column of its own")
    out = table[meant].fillna("")
    out.insert(0, "column", "scan" if by == "study" else by)
    out.insert(1, "name", [make_pseudonym(key, by, value) for value in table[by]])
    return out, [c for c in rest if c not in meant]


def _separate_words(column: str) -> str:
    return re.sub(r"([a-z])([A-Z])", r"\1 \2", column).lower()


def join_labels(table: pd.DataFrame, labels: pd.DataFrame, accessions: dict[str, str]) -> pd.DataFrame:
    """The table with the labels that are given; an empty one changes nothing. `accessions` is {scan: accession number's name}."""
    if labels.empty or table.empty:
        return table
    by: Any = labels["column"].iloc[0]
    names = table["scan"].map(accessions) if by == "accession" else table[by]
    for column in labels.columns[2:]:
        given = names.map(dict(zip(labels["name"], labels[column], strict=True))).fillna("")
        old = table[column] if column in table else pd.Series("", index=table.index)
        table[column] = given.where(given != "", old)
    return table
