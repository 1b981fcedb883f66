"""What a batch is trained for: the losses of its tasks on randomly changed slices. Its one subclass is momentum contrast (client/training/moco.py)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from client.training.augment import augment_slices
from common.config.schema import Stage, Task
from common.learning.losses import BatchLoss, compute_stage_loss
from common.modeling.model import Model


@dataclass
class Batch:
    """`slices` uint8 [B, S, H, W]; `targets` {task: as in common/learning/losses.py}; `rows` [B] which scans of the cohort they are."""

    slices: Tensor
    targets: dict[str, Tensor]
    rows: Tensor | None = None

    def split_into(self, num_parts: int) -> Iterator[Batch]:
        """The batch cut into at most `count` parts of nearly equal size."""
        for some in torch.arange(len(self.slices)).tensor_split(min(num_parts, len(self.slices))):
            rows = None if self.rows is None else self.rows[some]
            yield Batch(self.slices[some], {t: y[some] for t, y in self.targets.items()}, rows)


class Objective:
    """The tasks' losses (common/learning/losses.py). `draws` decides every random change, so that a seed gives the same training on every device."""

    def __init__(
        self,
        stage: Stage,
        tasks: Mapping[str, Task],
        logit_adjustments: Mapping[str, Tensor],
        device: torch.device,
        seed: int,
    ) -> None:
        self.stage, self.tasks, self.device = stage, tasks, device
        self.logit_adjustments = {t: a.to(device) for t, a in logit_adjustments.items()}
        self.generator = torch.Generator().manual_seed(seed)

    def compute_loss(self, model: Model, part: Batch, num_labelled: Mapping[str, int]) -> BatchLoss:
        """The loss of a part of a batch in which `labelled` rows of each task have a label; a task without any is not computed."""
        tasks = {t: task for t, task in self.tasks.items() if num_labelled[t] and task.type != "contrastive"}
        if not tasks:
            return BatchLoss(torch.zeros((), device=self.device), dict.fromkeys(self.tasks, (0.0, 0)))
        x, targets = self.augment_batch(part)
        painted = next((task for task in tasks.values() if task.type == "inpainting"), None)
        if painted:
            whole, (x, hidden) = x, mask_patches(x, painted.mask_ratio, self.generator)
            targets |= {
                t: torch.where(hidden, whole, torch.nan)
                for t, task in tasks.items()
                if task.type == "inpainting"
            }
        with autocast_context(self.device, self.stage.precision):
            outputs = model(x, list(tasks))
        return compute_stage_loss(self.tasks, outputs, targets, self.logit_adjustments, num_labelled)

    def augment_batch(self, part: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Slices [B, S, H, W] in [0, 1], changed at random, and the targets; masks are changed alike."""
        b, s, h, w = part.slices.shape
        x = part.slices.to(self.device, non_blocking=True).float().div_(255).view(b * s, h, w)
        targets = {t: y.to(self.device, non_blocking=True) for t, y in part.targets.items()}
        maps = [t for t, y in targets.items() if y.ndim == 4]
        if not maps:
            return augment_slices(x, self.stage.augment, self.generator).view(b, s, h, w), targets
        before, changed = self.generator.get_state(), x
        for t in maps:
            self.generator.set_state(before)  # every mask moves as its slice does
            changed, mask = augment_slices(
                x, self.stage.augment, self.generator, targets[t].view(b * s, h, w)
            )
            targets[t] = mask.view(b, s, h, w)
        return changed.view(b, s, h, w), targets

    def after_step(self, model: Model) -> None:
        """Called after each optimiser step."""


def autocast_context(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """Mixed precision of the forward pass; fp16 exists on GPUs only and is bf16 elsewhere."""
    if precision == "fp32":
        return contextlib.nullcontext()
    half = torch.float16 if precision == "fp16" and device.type == "cuda" else torch.bfloat16
    return torch.autocast(device.type, dtype=half)


def mask_patches(
    x: Tensor, mask_ratio: float, generator: torch.Generator, grid_size: int = 8
) -> tuple[Tensor, Tensor]:
    """Slices [B, S, H, W] with `share` of a grid of cells painted in the slice's mean, and where (Pathak et al., "Context encoders", CVPR 2016)."""
    b, s, h, w = x.shape
    hidden = torch.rand(b, s, grid_size * grid_size, generator=generator).argsort(-1) < max(
        1, round(mask_ratio * grid_size * grid_size)
    )
    grid = hidden.view(b * s, 1, grid_size, grid_size).float().to(x.device)
    where = torch.nn.functional.interpolate(grid, size=(h, w), mode="nearest").view(b, s, h, w) > 0.5
    return torch.where(where, x.mean((2, 3), keepdim=True), x), where
