"""What a cohort's table says of each task: the target of every scan, and what a person should know before training on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from client.data.cohort import SPLITS
from common.utils.errors import ConsiliumError
from common.config.schema import Task
from common.learning.losses import task_label_columns


def encode_classes(df: pd.DataFrame, column: str, classes: Sequence[str] = ()) -> NDArray[np.float64]:
    """The class of each scan, `[N]`, NaN = missing. Binary (no `classes`): 0 or 1; else the index of the class, found by name or number.

    A column that is not there is missing throughout. Raises ConsiliumError for a value that is no class.
    """
    out = np.full(len(df), np.nan)
    if column not in df:
        return out
    values = df[column]
    given = values.notna().to_numpy()
    numbers = pd.to_numeric(values, errors="coerce").to_numpy(dtype=float)
    if not classes:
        wrong = given & ~np.isin(numbers, (0.0, 1.0))
        if wrong.any():
            raise ConsiliumError(f"column '{column}' has {int(wrong.sum())} values that are neither 0 nor 1; write 0, 1 or nothing")
        return numbers
    index = {name: k for k, name in enumerate(classes)}
    named = np.array([index.get(_class_name(v), -1) if g else -1 for v, g in zip(values, given, strict=True)], dtype=int)
    if given.any() and (named[given] < 0).all() and np.isin(numbers[given], range(len(classes))).all():
        return numbers  # the file holds the classes' numbers
    wrong = given & (named < 0)
    if wrong.any():
        known = ", ".join(classes)
        raise ConsiliumError(f"column '{column}' has {int(wrong.sum())} values that are no class of this task; the classes are: {known}")
    out[given] = named[given]
    return out


def task_targets(df: pd.DataFrame, name: str, task: Task) -> NDArray[np.float64]:
    """The targets of a task whose labels stand in the table: class [N], or numbers [N, R] of a regression; NaN = missing.

    A multiclass task with `edges` counts how many of them the number (the sum of its columns; missing if one is) exceeds. Masks, clusters
    and the pictures themselves are no column's values: NaN [N]. Raises ConsiliumError for a value that is no class or no number.
    """
    columns = task_label_columns(name, task)
    if task.type == "segmentation" or not columns:
        return np.full(len(df), np.nan)
    if task.type == "regression":
        return np.stack([_numeric_column(df, c) for c in columns], axis=1)
    if task.type == "multiclass" and task.bin_edges:
        if task.classes and len(task.classes) != len(task.bin_edges) + 1:
            raise ConsiliumError(
                f"task '{name}' has {len(task.classes)} classes and {len(task.bin_edges)} edges; give one class more than edges"
            )
        number = np.sum([_numeric_column(df, c) for c in columns], axis=0)
        classes = np.searchsorted(np.asarray(task.bin_edges), number, side="left").astype(float)  # edges strictly below it
        return np.where(np.isnan(number), np.nan, classes)
    return encode_classes(df, columns[0], task.classes)


def _numeric_column(df: pd.DataFrame, column: str) -> NDArray[np.float64]:
    """A column's numbers [N]; NaN where missing, throughout where there is no such column. Raises ConsiliumError for a word."""
    if column not in df:
        return np.full(len(df), np.nan)
    numbers = pd.to_numeric(df[column], errors="coerce").to_numpy(dtype=float)
    wrong = df[column].notna().to_numpy() & ~np.isfinite(numbers)
    if wrong.any():
        raise ConsiliumError(f"column '{column}' has {int(wrong.sum())} values that are no numbers; write a number or nothing")
    return numbers


def _class_name(value: object) -> str:
    """`1.0` in a column that became float is the class "1"."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def check_labels(df: pd.DataFrame, tasks: Mapping[str, Task]) -> list[str]:
    """What a person should know before training on this cohort, as sentences without identifiers.

    Raises ConsiliumError when the cohort is empty or labels no task at all.
    """
    if df.empty:
        raise ConsiliumError("the cohort is empty; it must hold at least one scan")
    said: list[str] = []
    labelled = 0
    for split in SPLITS:
        if not (df["split"] == split).any():
            said.append(f"no scan is in the {split} split")
    if len(df) > 9 and df["patient"].nunique() == 1:
        said.append("every scan names the same patient, so all fall into one split; give the patients in labels.csv")
    for name, task in tasks.items():
        columns = task_label_columns(name, task)
        if not columns:  # the scans themselves are its labels
            labelled += 1
            continue
        absent = [c for c in columns if c not in df]
        if absent and len(absent) < len(columns):
            said.append(f"task '{name}' adds up or predicts several columns, of which {len(absent)} are not there ({', '.join(absent)})")
        found = {split: _count_labels(df[df["split"] == split], name, task) for split in SPLITS}
        if not sum(sum(c.values()) for c in found.values()):
            word = "mask" if task.type == "segmentation" else "label"
            shown = f"column '{columns[0]}'" if len(columns) == 1 else f"columns {', '.join(columns)}"
            said.append(f"no scan has a {word} for task '{name}' ({shown}); this centre will not train it")
            continue
        labelled += 1
        if task.type in ("segmentation", "regression"):
            here = ", ".join(f"{c['labelled']} in {split}" for split, c in found.items())
            said.append(f"task '{name}': {'masks' if task.type == 'segmentation' else 'numbers'} of {here}")
            continue
        for split, count in found.items():
            if len(count) == 1 and columns[0] != "source":  # one source a centre is the rule
                said.append(f"task '{name}' has one class only in {split} ({next(iter(count))}); it has no AUC there")
    if tasks and not labelled:
        wanted = ", ".join(sorted({c for n, t in tasks.items() for c in task_label_columns(n, t)}))
        raise ConsiliumError(f"the cohort has no label for any task; fill at least one of the columns: {wanted}")
    return said


def _count_labels(df: pd.DataFrame, name: str, task: Task) -> dict[str, int]:
    """Scans of each class that has any; `labelled` for masks (rows that name a file) and for numbers."""
    column = task_label_columns(name, task)[0]
    if task.type == "segmentation":
        return {"labelled": sum(isinstance(v, str) and bool(v.strip()) for v in df[column]) if column in df else 0}
    if task.type == "multiclass" and not task.classes and not task.bin_edges:  # `source` before the federation is known
        return dict(df[column].dropna().map(_class_name).value_counts()) if column in df else {}
    found = task_targets(df, name, task)
    if task.type == "regression":
        return {"labelled": int(np.isfinite(found).all(axis=1).sum())}
    names = task.classes or [str(k) for k in range(len(task.bin_edges) + 1 if task.bin_edges else 2)]
    return {str(c): int(n) for c, n in zip(names, np.bincount(found[~np.isnan(found)].astype(int), minlength=len(names)), strict=True) if n}
