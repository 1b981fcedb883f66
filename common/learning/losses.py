"""Losses of tasks whose labels may be missing, with priors.

`L = sum_t w_t * sum_{i labelled for t} l_t(i) / n_t`: rows without the label are selected away, never multiplied by zero, so that a NaN or
an infinite output of an unlabelled row cannot reach the gradient (the indicator function of arXiv 2405.13771, eq. 1).

| kind | output | target | missing |
|---|---|---|---|
| binary | [B, 1] logit | [B] 0 or 1 | NaN |
| multiclass | [B, K] logits | [B] class | NaN |
| regression | [B, R] | [B, R] | NaN in any of the R |
| segmentation | [B, S, H, W] logits | uint8 [B, S, H, W], 0 or 1 | UNKNOWN throughout |
| inpainting | [B, S, H, W] logits of the grey | [B, S, H, W] in [0, 1]: what was painted over, NaN elsewhere | never |
| contrast | [B, width] | none: client/training/moco.py | never |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common.config.schema import Task

IGNORE_INDEX = 255  # a mask's pixel of which nothing is known; a scan without a mask has no others
DENSE_TYPES = ("segmentation", "inpainting")  # a value for every pixel
UNSUPERVISED_TYPES = ("inpainting", "contrastive")  # every scan is its own label


def output_dim(task: Task) -> int:
    """Width of the head: one logit for a binary or dense task, K for a multiclass one, R for a regression."""
    if task.type == "multiclass":
        return len(task.classes)
    if task.type == "regression":
        return len(task.label_columns) or 1
    return task.contrastive.projection_dim if task.type == "contrastive" else 1


def task_label_columns(name: str, task: Task) -> list[str]:
    """The cohort's columns that a task's labels come from; none for a task that needs no label."""
    if task.type in UNSUPERVISED_TYPES or task.num_clusters:
        return []
    return task.label_columns or [task.label_column or name]


def class_names(name: str, task: Task) -> list[str]:
    """The cells that a task's scans are counted in: its classes, or all labelled together. The count of the unlabelled comes after them."""
    if task.type == "binary":
        return [f"no {name}", name]
    return task.classes if task.type == "multiclass" else ["labelled"]


def needs_decoder(tasks: Mapping[str, Task]) -> bool:
    """Whether any task reads the full-resolution map."""
    return any(uses_feature_map(task) for task in tasks.values())


def uses_feature_map(task: Task) -> bool:
    """Whether a task's head stands on the decoder's map instead of the encoder's features."""
    return task.type in DENSE_TYPES or task.head_input == "map"


def find_labelled_rows(task: Task, target: Tensor) -> Tensor:
    """[B] bool: which rows have the label."""
    if task.type == "segmentation":
        return (target != IGNORE_INDEX).flatten(1).any(1)
    if task.type in UNSUPERVISED_TYPES:
        return torch.ones(len(target), dtype=torch.bool, device=target.device)
    known = torch.isfinite(target)
    return known.flatten(1).all(1) if target.ndim > 1 else known


def compute_loss_sum(
    task: Task, output: Tensor, target: Tensor, adjustment: Tensor | None = None
) -> tuple[Tensor, int]:
    """Summed loss over the labelled rows, and their number; shapes in the module's docstring. A row's loss is a mean over its pixels or columns.

    `adjustment` [K] is added to the logits (a binary task's single logit takes the difference of its two).
    """
    rows = find_labelled_rows(task, target)
    n = int(rows.sum())
    z, y = output[rows].float(), target[rows]
    if not n:
        return z.sum(), 0
    if task.type == "binary":
        z = z.squeeze(1)
        if adjustment is not None:
            z = z + (adjustment[1] - adjustment[0])
        return F.binary_cross_entropy_with_logits(z, y.float(), reduction="sum"), n
    if task.type == "multiclass":
        if adjustment is not None:
            z = z + adjustment
        return F.cross_entropy(z, y.long(), reduction="sum"), n
    if task.type == "regression":
        return F.smooth_l1_loss(z, y.float().reshape(z.shape), reduction="none").mean(1).sum(), n
    if task.type == "inpainting":
        return torch.stack(
            [F.l1_loss(a[k := torch.isfinite(b)].sigmoid(), b[k].float()) for a, b in zip(z, y, strict=True)]
        ).sum(), n
    return compute_dense_loss(z, y, task.dice_weight).sum(), n


def compute_dense_loss(logits: Tensor, mask: Tensor, dice_weight: float) -> Tensor:
    """[B]: cross-entropy over the known pixels + `dice` * (1 - soft Dice) of each scan, from logits and mask [B, S, H, W].

    Dice (Milletari et al., V-Net, 3DV 2016) with one pixel added above and below, so that an empty mask well met costs nothing.
    """
    known = (mask != IGNORE_INDEX).flatten(1).float()
    y = (mask == 1).flatten(1).float()
    z = logits.flatten(1)
    cross = (F.binary_cross_entropy_with_logits(z, y, reduction="none") * known).sum(1) / known.sum(1).clamp(
        min=1
    )
    if not dice_weight:
        return cross
    p = z.sigmoid() * known
    return cross + dice_weight * (1 - (2 * (p * y).sum(1) + 1) / (p.sum(1) + y.sum(1) + 1))


@dataclass
class BatchLoss:
    """A batch's loss to differentiate, and the sums behind it: {task: (summed loss, labelled rows)}."""

    total: Tensor
    sums_by_task: dict[str, tuple[float, int]]


def compute_stage_loss(
    tasks: Mapping[str, Task],
    outputs: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    adjustments: Mapping[str, Tensor],
    labelled_counts: Mapping[str, int] | None = None,
) -> BatchLoss:
    """The loss of a stage on one batch (module docstring) for the tasks that have an output.

    `labelled` gives n_t of the whole batch when this is only a part of it (gradient accumulation); the parts' losses then add up to the
    batch's. A batch without any label has loss 0 and gradient 0.
    """
    total = next(iter(outputs.values())).new_zeros((), dtype=torch.float32)
    sums: dict[str, tuple[float, int]] = {}
    for name, task in tasks.items():
        if name not in outputs:
            sums[name] = (0.0, 0)
            continue
        summed, n = compute_loss_sum(task, outputs[name], targets[name], adjustments.get(name))
        sums[name] = (float(summed.detach()), n)
        if n:
            total = total + task.loss_weight * summed / (labelled_counts[name] if labelled_counts else n)
    return BatchLoss(total, sums)
