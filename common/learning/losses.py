"""Compute the losses of tasks whose labels may be missing, with priors.

`L = sum_t w_t * sum_{i labelled for t} l_t(i) / n_t`. Rows without the label are left out, not multiplied by
zero, so that a NaN or an infinite output of an unlabelled row cannot reach the gradient (the indicator
function of arXiv 2405.13771, eq. 1).

| type | output | target | missing label |
|---|---|---|---|
| binary | [B, 1] logit | [B] 0 or 1 | NaN |
| multiclass | [B, K] logits | [B] class | NaN |
| regression | [B, R] | [B, R] | NaN in any of the R |
| segmentation | [B, S, H, W] logits | uint8 [B, S, H, W], 0 or 1 | IGNORE_INDEX throughout |
| inpainting | [B, S, H, W] logits of the intensity | [B, S, H, W] in [0, 1], NaN where not masked | never |
| contrastive | [B, width] | none: client/training/moco.py | never |
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common.config.schema import Task

IGNORE_INDEX = 255  # an unknown pixel of a mask; a scan without a mask has no others
DENSE_TYPES = ("segmentation", "inpainting")  # tasks with an output for every pixel
UNSUPERVISED_TYPES = ("inpainting", "contrastive")  # tasks for which every scan is its own label


def output_dim(task: Task) -> int:
    """Return the width of a task's head: K for multiclass, R for regression, 1 for binary and dense tasks."""
    if task.type == "multiclass":
        return len(task.classes)
    if task.type == "regression":
        return len(task.label_columns) or 1
    if task.type == "contrastive":
        return task.contrastive.projection_dim
    return 1


def task_label_columns(name: str, task: Task) -> list[str]:
    """Return the cohort's columns with a task's labels; none for a task that needs no labels."""
    if task.type in UNSUPERVISED_TYPES or task.num_clusters:
        return []
    return task.label_columns or [task.label_column or name]


def list_read_columns(name: str, task: Task) -> list[str]:
    """Return every column of the cohort that a run reads for a task: also masks, severity, who is clustered.

    A task that needs no labels reads none.
    """
    if task.type in UNSUPERVISED_TYPES:
        return []
    columns = list(task.label_columns)
    if task.label_column:
        columns.append(task.label_column)
    elif not task.num_clusters and (not columns or task.type == "segmentation"):
        columns.append(name)
    if task.severity_column:
        columns.append(task.severity_column)
    return list(dict.fromkeys(columns))


def class_names(name: str, task: Task) -> list[str]:
    """Return the names of the groups in which a task's labelled scans are counted.

    These are its classes, or one group for tasks without classes. Where counts travel, that of the unlabelled
    scans comes last.
    """
    if task.type == "binary":
        return [f"no {name}", name]
    if task.type == "multiclass":
        return task.classes
    return ["labelled"]


def needs_decoder(tasks: Mapping[str, Task]) -> bool:
    """Return whether any task uses the full-resolution feature map."""
    return any(uses_feature_map(task) for task in tasks.values())


def uses_feature_map(task: Task) -> bool:
    """Return whether a task's head reads the decoder's feature map instead of the encoder's features."""
    return task.type in DENSE_TYPES or task.head_input == "map"


def find_labelled_rows(task: Task, target: Tensor) -> Tensor:
    """Return which rows have the label, [B] bool."""
    if task.type == "segmentation":
        return (target != IGNORE_INDEX).flatten(1).any(1)
    if task.type in UNSUPERVISED_TYPES:
        return torch.ones(len(target), dtype=torch.bool, device=target.device)
    is_known = torch.isfinite(target)
    return is_known.flatten(1).all(1) if target.ndim > 1 else is_known


def compute_loss_sum(
    task: Task, output: Tensor, target: Tensor, adjustment: Tensor | None = None
) -> tuple[Tensor, int]:
    """Return the summed loss of the labelled rows and their number.

    A row's loss is a mean over its pixels or columns.

    Args:
        task: the task.
        output: the head's output, shaped as in the module's table.
        target: the labels, shaped as in the module's table.
        adjustment: [K], added to the logits. A binary task's single logit gets the difference of its two.
    """
    labelled = find_labelled_rows(task, target)
    num_labelled = int(labelled.sum())
    logits = output[labelled].float()
    labels = target[labelled]
    if not num_labelled:
        return logits.sum(), 0
    return _sum_labelled_losses(task, logits, labels, adjustment), num_labelled


def _sum_labelled_losses(task: Task, logits: Tensor, labels: Tensor, adjustment: Tensor | None) -> Tensor:
    """Return the summed loss of rows that all have the label."""
    if task.type == "binary":
        logits = logits.squeeze(1)
        if adjustment is not None:
            logits = logits + (adjustment[1] - adjustment[0])
        return F.binary_cross_entropy_with_logits(logits, labels.float(), reduction="sum")
    if task.type == "multiclass":
        if adjustment is not None:
            logits = logits + adjustment
        return F.cross_entropy(logits, labels.long(), reduction="sum")
    if task.type == "regression":
        losses = F.smooth_l1_loss(logits, labels.float().reshape(logits.shape), reduction="none")
        return losses.mean(1).sum()
    if task.type == "inpainting":
        return _compute_inpainting_losses(logits, labels).sum()
    return compute_dense_loss(logits, labels, task.dice_weight).sum()


def _compute_inpainting_losses(logits: Tensor, target: Tensor) -> Tensor:
    """Return each scan's mean absolute error [B] over the masked pixels, which are those with a target."""
    losses = []
    for scan_logits, scan_target in zip(logits, target, strict=True):
        masked = torch.isfinite(scan_target)
        losses.append(F.l1_loss(scan_logits[masked].sigmoid(), scan_target[masked].float()))
    return torch.stack(losses)


def compute_dense_loss(logits: Tensor, mask: Tensor, dice_weight: float) -> Tensor:
    """Return each scan's loss [B]: cross-entropy over its known pixels + `dice_weight` * (1 - soft Dice).

    Dice (Milletari et al., V-Net, 3DV 2016) with one pixel added to numerator and denominator, so that a
    correctly predicted empty mask has no loss.

    Args:
        logits: [B, S, H, W].
        mask: [B, S, H, W], 0, 1 or IGNORE_INDEX.
        dice_weight: the weight of the Dice loss beside the cross-entropy's 1.
    """
    is_known = (mask != IGNORE_INDEX).flatten(1).float()
    truth = (mask == 1).flatten(1).float()
    flat_logits = logits.flatten(1)
    pixel_losses = F.binary_cross_entropy_with_logits(flat_logits, truth, reduction="none")
    cross_entropy = (pixel_losses * is_known).sum(1) / is_known.sum(1).clamp(min=1)
    if not dice_weight:
        return cross_entropy
    probability = flat_logits.sigmoid() * is_known
    intersection = (probability * truth).sum(1)
    dice = (2 * intersection + 1) / (probability.sum(1) + truth.sum(1) + 1)
    return cross_entropy + dice_weight * (1 - dice)


@dataclass
class BatchLoss:
    """The loss of a batch, and the sums from which it was computed."""

    total: Tensor  # to differentiate
    sums_by_task: dict[str, tuple[float, int]]  # {task: (summed loss, labelled rows)}


def compute_stage_loss(
    tasks: Mapping[str, Task],
    outputs: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    adjustments: Mapping[str, Tensor],
    labelled_counts: Mapping[str, int] | None = None,
) -> BatchLoss:
    """Return the loss of a stage on one batch for the tasks that have an output.

    A batch without any label has loss 0 and gradient 0.

    Args:
        tasks: the stage's tasks.
        outputs: {task: output}, shaped as in the module's table.
        targets: {task: labels}, shaped as in the module's table.
        adjustments: {task: what is added to its logits [K]}.
        labelled_counts: {task: n_t of the whole batch}, when this is only a part of it (gradient
            accumulation). The parts' losses then add up to the batch's.
    """
    total = next(iter(outputs.values())).new_zeros((), dtype=torch.float32)
    sums_by_task: dict[str, tuple[float, int]] = {}
    for name, task in tasks.items():
        if name not in outputs:
            sums_by_task[name] = (0.0, 0)
            continue
        loss_sum, num_labelled = compute_loss_sum(task, outputs[name], targets[name], adjustments.get(name))
        sums_by_task[name] = (float(loss_sum.detach()), num_labelled)
        if num_labelled:
            divisor = labelled_counts[name] if labelled_counts else num_labelled
            total = total + task.loss_weight * loss_sum / divisor
    return BatchLoss(total, sums_by_task)
