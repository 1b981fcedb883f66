"""The columns of a cohort table, and the words that may stand in them.

| column | holds |
|---|---|
| `scan` | the scan's name, unique in the table |
| `path` | its file or folder, absolute or relative to the table's folder |
| `patient` | whose scan it is |
| `source` | where it was acquired |
| `split` | train, val or test |
| `window_low`, `window_high` | optional: what to show as 0 and 255, in the image's units |
| `series` | optional: a SeriesInstanceUID, where a folder holds several series |
| `modality` | optional: CT or XR |
| `lungs` | optional: the path of a lung mask |

All other columns are labels: numbers, class names, or paths of masks; an empty cell is a missing label.
"""

from __future__ import annotations

import pandas as pd

SPLITS = ("train", "val", "test")
MODALITIES = ("CT", "XR")
REQUIRED_COLUMNS = ["scan", "path", "patient", "source", "split"]
WINDOW_COLUMNS = ["window_low", "window_high"]
OPTIONAL_COLUMNS = [*WINDOW_COLUMNS, "series", "modality", "lungs"]
TEXT_COLUMNS = [*REQUIRED_COLUMNS, "series", "modality", "lungs"]
SPLIT_ALIASES = {"training": "train", "valid": "val", "validation": "val", "dev": "val", "testing": "test"}


def normalise_split(text: object) -> str:
    """Return train, val or test for the usual spellings; anything else comes back in lower case."""
    word = str(text).strip().lower()
    return SPLIT_ALIASES.get(word, word)


def find_task_columns(cohort: pd.DataFrame) -> set[str]:
    """Return the columns that a task may take its labels from: the labels, and the source."""
    return {*find_label_columns(cohort), "source"}


def find_label_columns(cohort: pd.DataFrame) -> list[str]:
    """List the columns that may hold labels: all that have no meaning of their own."""
    return cohort.columns.difference(REQUIRED_COLUMNS + OPTIONAL_COLUMNS, sort=False).tolist()
