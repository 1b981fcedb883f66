"""The columns of a table of predictions, by type of task.

| type | columns |
|---|---|
| binary | `<task>`: its probability |
| multiclass | `<task>_<class>`: their probabilities |
| regression | `<task>_<column>`, or `<task>` of a single column, in the label's units |
| segmentation with a severity column | `<task>_right`, `<task>_left`: affected per cent of each lung |
| | `<task>_severity`: the larger of the two (client/imaging/severity.py) |
| segmentation | `<task>_share`: affected per cent of the chosen slices |
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.imaging.lung_segmentation import Box
from client.imaging.severity import compute_affected_fractions, compute_severity
from client.imaging.slice_pipeline import letterbox_box
from common.config.schema import Task

SEVERITY_SUFFIXES = ("right", "left", "severity")


def list_output_columns(task_name: str, task: Task) -> list[str]:
    """List a task's columns."""
    if task.type == "multiclass":
        return _add_suffixes(task_name, task.classes)
    if task.type == "regression" and task.label_columns:
        return _add_suffixes(task_name, task.label_columns)
    if task.type == "segmentation" and task.severity_column:
        return _add_suffixes(task_name, SEVERITY_SUFFIXES)
    if task.type == "segmentation":
        return _add_suffixes(task_name, ["share"])
    return [task_name]


def _add_suffixes(task_name: str, suffixes: Iterable[str]) -> list[str]:
    return [f"{task_name}_{suffix}" for suffix in suffixes]


def compute_output_values(
    task: Task, output: Tensor, box: Box, lung_mask: NDArray[np.uint8] | None = None
) -> list[float]:
    """Compute the values of a task's columns for one scan.

    Args:
        task: The task.
        output: The scan's raw output; no prior is added at inference.
        box: Of the scan's crop, in its pixels.
        lung_mask: [S, H, W], 1 the right and 2 the left lung. If its sides are not distinguished (on a
            radiograph) there is a severity only.

    Returns:
        One value a column, NaN where it is not known.
    """
    if task.type == "binary":
        return _round_each(torch.sigmoid(output[:1]), 6)
    if task.type == "multiclass":
        return _round_each(torch.softmax(output, 0), 6)
    if task.type == "regression":
        return _round_each(output, 6)
    lesion = (output.sigmoid() >= task.threshold).numpy()
    if not task.severity_column:
        return [_to_percent(_affected_share_of_slices(lesion, box))]
    if lung_mask is None:
        return [np.nan] * len(SEVERITY_SUFFIXES)
    shares = [np.nan, np.nan, compute_severity(lesion, lung_mask)]
    if (lung_mask == 2).any():
        shares[:2] = compute_affected_fractions(lesion, lung_mask)
    return list(map(_to_percent, shares))


def _round_each(values: Tensor, digits: int) -> list[float]:
    return [round(value, digits) for value in values.tolist()]


def _to_percent(share: float) -> float:
    return round(100 * share, 2)


def _affected_share_of_slices(lesion: NDArray[np.bool_], box: Box) -> float:
    """Return the share of the slices that is lesion, without the padding to a square."""
    y0, y1, x0, x1 = box
    top, bottom, left, right = letterbox_box(y1 - y0, x1 - x0, lesion.shape[-1])
    return float(lesion[:, top:bottom, left:right].mean())
