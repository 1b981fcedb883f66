"""What a batch is trained for: the losses of its tasks on augmented slices.

Momentum contrast (client/training/moco.py) is the only subclass.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import torch
from torch import Tensor

from client.data.batch import Batch
from client.training.augment import augment_slices
from common.config.schema import Stage, Task
from common.learning.losses import BatchLoss, compute_stage_loss, find_labelled_rows
from common.modeling.model import Model


class Objective:
    """The losses of a stage's tasks (common/learning/losses.py) on augmented slices.

    `generator` lives on the CPU and decides every augmentation, so that a seed gives the same training on
    every device.
    """

    def __init__(
        self,
        stage: Stage,
        tasks: Mapping[str, Task],
        logit_adjustments: Mapping[str, Tensor],
        device: torch.device,
        seed: int,
    ) -> None:
        """Prepare the losses of `tasks`; `logit_adjustments` {task: [K]} are added to their logits."""
        self.stage = stage
        self.tasks = tasks
        self.device = device
        self.logit_adjustments = {task: values.to(device) for task, values in logit_adjustments.items()}
        self.generator = torch.Generator().manual_seed(seed)

    def count_labelled(self, batch: Batch) -> dict[str, int]:
        """Count the scans of a batch that are labelled for each task."""
        counts = {}
        for name, task in self.tasks.items():
            counts[name] = int(find_labelled_rows(task, batch.targets[name]).sum())
        return counts

    def compute_loss(self, model: Model, part: Batch, num_labelled: Mapping[str, int]) -> BatchLoss:
        """Compute the loss of a part of a batch.

        `num_labelled` counts the whole batch's labelled scans by task. A task without any is not computed at
        all: its head may hold infinite weights, and its normalisation statistics must not move.
        """
        labelled_tasks = {
            name: task
            for name, task in self.tasks.items()
            if num_labelled[name] and task.type != "contrastive"
        }
        if not labelled_tasks:
            no_loss = torch.zeros((), device=self.device)
            return BatchLoss(no_loss, dict.fromkeys(self.tasks, (0.0, 0)))
        slices, targets = self.augment_batch(part)
        inpainting = {name: task for name, task in labelled_tasks.items() if task.type == "inpainting"}
        if inpainting:
            mask_ratio = next(iter(inpainting.values())).mask_ratio
            painted, is_masked = mask_patches(slices, mask_ratio, self.generator)
            targets |= dict.fromkeys(inpainting, torch.where(is_masked, slices, torch.nan))
            slices = painted
        with autocast_context(self.device, self.stage.precision):
            outputs = model(slices, list(labelled_tasks))
        return compute_stage_loss(self.tasks, outputs, targets, self.logit_adjustments, num_labelled)

    def augment_batch(self, part: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Augment a part's slices, and its masks by the same movements.

        Returns:
            The slices, float [B, S, H, W] in [0, 1], and the targets, both on the objective's device.
        """
        settings = self.stage.augment
        batch_shape = part.slices.shape
        image_shape = (-1, *batch_shape[2:])  # every slice is an image of its own
        original = part.slices.to(self.device, non_blocking=True).float().div_(255).view(image_shape)
        targets = {task: target.to(self.device, non_blocking=True) for task, target in part.targets.items()}
        mask_tasks = [task for task, target in targets.items() if target.ndim == 4]
        if not mask_tasks:
            return augment_slices(original, settings, self.generator).view(batch_shape), targets
        state = self.generator.get_state()
        augmented = original
        for task in mask_tasks:
            self.generator.set_state(state)  # every mask moves as its slice does
            masks = targets[task].view(image_shape)
            augmented, moved_masks = augment_slices(original, settings, self.generator, masks)
            targets[task] = moved_masks.view(batch_shape)
        return augmented.view(batch_shape), targets

    def after_step(self, model: Model) -> None:
        """React to an optimiser step; nothing to do unless a subclass keeps a state of its own."""


def autocast_context(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """Return a forward pass's mixed-precision context; fp16 exists on GPUs only and is bf16 elsewhere."""
    if precision == "fp32":
        return contextlib.nullcontext()
    if precision == "fp16" and device.type == "cuda":
        return torch.autocast(device.type, dtype=torch.float16)
    return torch.autocast(device.type, dtype=torch.bfloat16)


def mask_patches(
    slices: Tensor, mask_ratio: float, generator: torch.Generator, grid_size: int = 8
) -> tuple[Tensor, Tensor]:
    """Paint random patches of every slice with the slice's mean.

    Pathak et al., "Context encoders", CVPR 2016.

    Args:
        slices: [B, S, H, W].
        mask_ratio: The share of the grid's patches to paint; at least one is painted.
        generator: CPU generator that chooses the patches.
        grid_size: Patches along each side.

    Returns:
        The painted slices and a boolean tensor of the painted pixels, both [B, S, H, W].
    """
    batch_size, num_slices, height, width = slices.shape
    num_patches = grid_size * grid_size
    num_masked = max(1, round(mask_ratio * num_patches))
    ranks = torch.rand(batch_size, num_slices, num_patches, generator=generator).argsort(-1)
    grid = (ranks < num_masked).view(batch_size * num_slices, 1, grid_size, grid_size)
    grid = grid.float().to(slices.device)
    masks = torch.nn.functional.interpolate(grid, size=(height, width), mode="nearest")
    is_masked = masks.view(batch_size, num_slices, height, width) > 0.5
    slice_means = slices.mean((2, 3), keepdim=True)
    return torch.where(is_masked, slice_means, slices), is_masked
