"""What a cohort table says about each task: every scan's target, and what to know before training on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from client.data.columns import SPLITS
from common.config.schema import Task
from common.learning.losses import task_label_columns
from common.utils.errors import ConsiliumError


def encode_classes(cohort: pd.DataFrame, column: str, classes: Sequence[str] = ()) -> NDArray[np.float64]:
    """Return the class of each scan, [N]; NaN is missing, as is every scan when the column does not exist.

    Without `classes` the label is binary, 0 or 1; else it is a class's index, by its name or, where no value
    is a name, by its number. Raises ConsiliumError for a value that is no class.
    """
    if column not in cohort:
        return np.full(len(cohort), np.nan)
    values = cohort[column]
    is_given = values.notna().to_numpy()
    numbers = pd.to_numeric(values, errors="coerce").to_numpy(dtype=float)
    if not classes:
        is_binary = np.isin(numbers, (0.0, 1.0))
        _require_none(is_given & ~is_binary, column, "neither 0 nor 1; write 0, 1 or nothing")
        return numbers
    index_by_name = {name: index for index, name in enumerate(classes)}
    names = values.map(_class_name, na_action="ignore")
    indices = np.asarray(names.map(index_by_name), dtype=np.float64)
    is_named = ~np.isnan(indices)
    if is_given.any() and not is_named.any() and np.isin(numbers[is_given], range(len(classes))).all():
        return numbers  # the column holds the classes' numbers
    valid_names = ", ".join(classes)
    _require_none(is_given & ~is_named, column, f"no class of this task; the classes are: {valid_names}")
    return indices


def _require_none(is_wrong: NDArray[np.bool_], column: str, fault: str) -> None:
    """Raise ConsiliumError when any value of the column is wrong."""
    if is_wrong.any():
        raise ConsiliumError(f"column '{column}' has {int(is_wrong.sum())} values that are {fault}")


def task_targets(cohort: pd.DataFrame, name: str, task: Task) -> NDArray[np.float64]:
    """Return the targets of a task from the table: classes [N], or numbers [N, R] of a regression.

    NaN is missing. A multiclass task with `bin_edges` counts how many of them the sum of its columns
    exceeds, which is missing if one of the columns is. Masks, clusters and the images themselves are no
    column's values: NaN [N]. Raises ConsiliumError for a value that is no class or no number.
    """
    columns = task_label_columns(name, task)
    if task.type == "segmentation" or not columns:
        return np.full(len(cohort), np.nan)
    if task.type == "regression":
        return np.stack([_numeric_column(cohort, column) for column in columns], axis=1)
    if task.type == "multiclass" and task.bin_edges:
        return _bin_column_sum(cohort, columns, name, task)
    return encode_classes(cohort, columns[0], task.classes)


def _bin_column_sum(
    cohort: pd.DataFrame, columns: Sequence[str], name: str, task: Task
) -> NDArray[np.float64]:
    """Return [N]: how many of the task's edges lie strictly below the sum of the columns."""
    if task.classes and len(task.classes) != len(task.bin_edges) + 1:
        raise ConsiliumError(
            f"task '{name}' has {len(task.classes)} classes and {len(task.bin_edges)} edges; "
            "give one class more than edges"
        )
    totals = np.sum([_numeric_column(cohort, column) for column in columns], axis=0)
    bins = np.searchsorted(np.asarray(task.bin_edges), totals, side="left").astype(float)
    return np.where(np.isnan(totals), np.nan, bins)


def _numeric_column(cohort: pd.DataFrame, column: str) -> NDArray[np.float64]:
    """Return a column's numbers, [N]; NaN where missing, throughout where there is no such column.

    Raises ConsiliumError for a value that is no number.
    """
    if column not in cohort:
        return np.full(len(cohort), np.nan)
    numbers = pd.to_numeric(cohort[column], errors="coerce").to_numpy(dtype=float)
    is_given = cohort[column].notna().to_numpy()
    _require_none(is_given & ~np.isfinite(numbers), column, "no numbers; write a number or nothing")
    return numbers


def _class_name(value: object) -> str:
    """Return the value as a class's name; 1.0, in a column that became float, is the class "1"."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


def check_labels(cohort: pd.DataFrame, tasks: Mapping[str, Task]) -> list[str]:
    """Say what a person should know before training on this cohort, in sentences without identifiers.

    Raises ConsiliumError when the cohort is empty or labels no task at all.
    """
    if cohort.empty:
        raise ConsiliumError("the cohort is empty; it must hold at least one scan")
    notes = _note_splits(cohort)
    all_columns: set[str] = set()
    num_trainable = 0
    for name, task in tasks.items():
        columns = task_label_columns(name, task)
        all_columns.update(columns)
        if not columns:  # the scans themselves are its labels
            num_trainable += 1
            continue
        notes += _note_absent_columns(cohort, name, columns)
        counts = _count_labels_by_split(cohort, name, task)
        if not any(counts.values()):
            notes.append(_note_unlabelled(name, task, columns))
            continue
        num_trainable += 1
        notes += _note_counts(name, task, columns, counts)
    if tasks and not num_trainable:
        raise ConsiliumError(
            "the cohort has no label for any task; "
            f"fill at least one of the columns: {', '.join(sorted(all_columns))}"
        )
    return notes


def _count_labels_by_split(cohort: pd.DataFrame, name: str, task: Task) -> dict[str, Counter[str]]:
    """Return {split: {class: its scans}} of a task; see `_count_labels`."""
    counts = {}
    for split in SPLITS:
        rows = cohort[cohort["split"] == split]
        counts[split] = +Counter(_count_labels(rows, name, task))  # + drops classes without a scan
    return counts


def _note_splits(cohort: pd.DataFrame) -> list[str]:
    """Note empty splits, and a cohort that seems to be one patient's."""
    empty_splits = pd.Index(SPLITS).difference(cohort["split"].unique().tolist(), sort=False)
    notes = [f"no scan is in the {split} split" for split in empty_splits]
    if len(cohort) > 9 and cohort["patient"].nunique() == 1:
        notes.append(
            "every scan names the same patient, so all are in one split; give the patients in labels.csv"
        )
    return notes


def _note_absent_columns(cohort: pd.DataFrame, name: str, columns: Sequence[str]) -> list[str]:
    """Note that some, but not all, columns of a task are absent."""
    absent = pd.Index(columns).difference(cohort.columns, sort=False)
    if len(absent) in (0, len(columns)):
        return []
    return [
        f"task '{name}' adds up or predicts several columns, "
        f"of which {len(absent)} are not there ({', '.join(absent)})"
    ]


def _note_unlabelled(name: str, task: Task, columns: Sequence[str]) -> str:
    """Note that no scan is labelled for a task."""
    label_word = "mask" if task.type == "segmentation" else "label"
    column_words = f"columns {', '.join(columns)}"
    if len(columns) == 1:
        column_words = f"column '{columns[0]}'"
    return f"no scan has a {label_word} for task '{name}' ({column_words}); this centre will not train it"


def _note_counts(
    name: str, task: Task, columns: Sequence[str], counts: Mapping[str, Counter[str]]
) -> list[str]:
    """Note how many masks or numbers each split has, or that it has a single class."""
    label_words = {"segmentation": "masks", "regression": "numbers"}
    if task.type in label_words:
        per_split = [f"{split_counts['labelled']} in {split}" for split, split_counts in counts.items()]
        return [f"task '{name}': {label_words[task.type]} of {', '.join(per_split)}"]
    if columns[0] == "source":  # one source a centre is the rule
        return []
    notes: list[str] = []
    for split, split_counts in counts.items():
        if len(split_counts) == 1:
            (only_class,) = split_counts
            notes.append(f"task '{name}' has one class only in {split} ({only_class}); it has no AUC there")
    return notes


def _count_labels(cohort: pd.DataFrame, name: str, task: Task) -> dict[str, int]:
    """Count the scans of each class; masks and numbers are counted as `labelled`."""
    column = task_label_columns(name, task)[0]
    if task.type == "segmentation":
        return {"labelled": _count_file_names(cohort, column)}
    if task.type == "multiclass" and not task.classes and not task.bin_edges:
        sources = cohort.get(column, pd.Series(dtype=object))  # not yet known to all
        return dict(sources.dropna().map(_class_name).value_counts())
    targets = task_targets(cohort, name, task)
    if task.type == "regression":
        return {"labelled": int(np.isfinite(targets).all(axis=1).sum())}
    num_classes = max(2, len(task.bin_edges) + 1)
    class_names = task.classes or list(map(str, range(num_classes)))
    class_counts = np.bincount(targets[~np.isnan(targets)].astype(int), minlength=len(class_names))
    return dict(zip(class_names, class_counts.tolist(), strict=True))


def _count_file_names(cohort: pd.DataFrame, column: str) -> int:
    """Count the cells of a column that name a file."""
    if column not in cohort:
        return 0
    return sum(map(_is_file_name, cohort[column]))


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())
