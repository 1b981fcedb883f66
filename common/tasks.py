"""Losses of tasks whose labels may be missing, with priors.

`L = sum_t w_t * sum_{i labelled for t} l_t(i) / n_t`: rows without the label are selected away, never multiplied by zero, so that a NaN or
an infinite output of an unlabelled row cannot reach the gradient (the indicator function of arXiv 2405.13771, eq. 1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from common.schema import Task


def outputs_of(task: Task) -> int:
    """Width of the head: one logit for a binary task, K for a multiclass one."""
    return 1 if task.kind == "binary" else len(task.classes)


def loss_sum(task: Task, output: Tensor, target: Tensor, adjustment: Tensor | None) -> tuple[Tensor, int]:
    """Summed loss over the labelled rows, and their number.

    `output` [B, 1 or K] logits; `target` [B] float, class index, NaN = missing; `adjustment` [K] is added to the logits (a binary task's
    single logit takes the difference of its two).
    """
    rows = torch.isfinite(target)
    z, y = output[rows].float(), target[rows]
    if task.kind == "binary":
        z = z.squeeze(1)
        if adjustment is not None:
            z = z + (adjustment[1] - adjustment[0])
        return F.binary_cross_entropy_with_logits(z, y.float(), reduction="sum"), int(rows.sum())
    if adjustment is not None:
        z = z + adjustment
    return F.cross_entropy(z, y.long(), reduction="sum"), int(rows.sum())


@dataclass
class Losses:
    """A batch's loss to differentiate, and the sums behind it: {task: (summed loss, labelled rows)}."""

    total: Tensor
    sums: dict[str, tuple[float, int]]


def stage_loss(
    tasks: Mapping[str, Task],
    outputs: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    adjustments: Mapping[str, Tensor],
    labelled: Mapping[str, int] | None = None,
) -> Losses:
    """The loss of a stage on one batch (module docstring).

    `labelled` gives n_t of the whole batch when this is only a part of it (gradient accumulation); the parts' losses then add up to the
    batch's. A batch without any label has loss 0 and gradient 0.
    """
    total = next(iter(outputs.values())).new_zeros((), dtype=torch.float32)
    sums: dict[str, tuple[float, int]] = {}
    for name, task in tasks.items():
        summed, n = loss_sum(task, outputs[name], targets[name], adjustments.get(name))
        sums[name] = (float(summed.detach()), n)
        if n:
            total = total + task.weight * summed / (labelled[name] if labelled else n)
    return Losses(total, sums)
