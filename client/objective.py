"""What a batch is trained for: the losses of its tasks on randomly changed slices. Its one subclass is momentum contrast (client/moco.py)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from client.augment import augment
from common.model import Model
from common.schema import Stage, Task
from common.tasks import Losses, stage_loss


@dataclass
class Batch:
    """`slices` uint8 [B, S, H, W]; `targets` {task: as in common/tasks.py}; `rows` [B] which scans of the cohort they are."""

    slices: Tensor
    targets: dict[str, Tensor]
    rows: Tensor | None = None

    def parts(self, count: int) -> Iterator[Batch]:
        """The batch cut into at most `count` parts of nearly equal size."""
        for some in torch.arange(len(self.slices)).tensor_split(min(count, len(self.slices))):
            rows = None if self.rows is None else self.rows[some]
            yield Batch(self.slices[some], {t: y[some] for t, y in self.targets.items()}, rows)


class Objective:
    """The tasks' losses (common/tasks.py). `draws` decides every random change, so that a seed gives the same training on every device."""

    def __init__(self, stage: Stage, tasks: Mapping[str, Task], adjustments: Mapping[str, Tensor], device: torch.device, seed: int) -> None:
        self.stage, self.tasks, self.device = stage, tasks, device
        self.adjustments = {t: a.to(device) for t, a in adjustments.items()}
        self.draws = torch.Generator().manual_seed(seed)

    def loss(self, model: Model, part: Batch, labelled: Mapping[str, int]) -> Losses:
        """The loss of a part of a batch in which `labelled` rows of each task have a label; a task without any is not computed."""
        tasks = {t: task for t, task in self.tasks.items() if labelled[t] and task.kind != "contrast"}
        if not tasks:
            return Losses(torch.zeros((), device=self.device), dict.fromkeys(self.tasks, (0.0, 0)))
        x, targets = self.view(part)
        painted = next((task for task in tasks.values() if task.kind == "inpainting"), None)
        if painted:
            whole, (x, hidden) = x, paint(x, painted.share, self.draws)
            targets |= {t: torch.where(hidden, whole, torch.nan) for t, task in tasks.items() if task.kind == "inpainting"}
        with autocast(self.device, self.stage.precision):
            outputs = model(x, list(tasks))
        return stage_loss(self.tasks, outputs, targets, self.adjustments, labelled)

    def view(self, part: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Slices [B, S, H, W] in [0, 1], changed at random, and the targets; masks are changed alike."""
        b, s, h, w = part.slices.shape
        x = part.slices.to(self.device, non_blocking=True).float().div_(255).view(b * s, h, w)
        targets = {t: y.to(self.device, non_blocking=True) for t, y in part.targets.items()}
        maps = [t for t, y in targets.items() if y.ndim == 4]
        if not maps:
            return augment(x, self.stage.augment, self.draws).view(b, s, h, w), targets
        before, changed = self.draws.get_state(), x
        for t in maps:
            self.draws.set_state(before)  # every mask moves as its slice does
            changed, mask = augment(x, self.stage.augment, self.draws, targets[t].view(b * s, h, w))
            targets[t] = mask.view(b, s, h, w)
        return changed.view(b, s, h, w), targets

    def stepped(self, model: Model) -> None:
        """Called after each optimiser step."""


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """Mixed precision of the forward pass; fp16 exists on GPUs only and is bf16 elsewhere."""
    if precision == "fp32":
        return contextlib.nullcontext()
    half = torch.float16 if precision == "fp16" and device.type == "cuda" else torch.bfloat16
    return torch.autocast(device.type, dtype=half)


def paint(x: Tensor, share: float, draws: torch.Generator, cells: int = 8) -> tuple[Tensor, Tensor]:
    """Slices [B, S, H, W] with `share` of a grid of cells painted in the slice's mean, and where (Pathak et al., "Context encoders", CVPR 2016)."""
    b, s, h, w = x.shape
    hidden = torch.rand(b, s, cells * cells, generator=draws).argsort(-1) < max(1, round(share * cells * cells))
    grid = hidden.view(b * s, 1, cells, cells).float().to(x.device)
    where = torch.nn.functional.interpolate(grid, size=(h, w), mode="nearest").view(b, s, h, w) > 0.5
    return torch.where(where, x.mean((2, 3), keepdim=True), x), where
