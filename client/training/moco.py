"""Momentum contrast: learn to recognise a scan among others from two random views of it, without labels.

He et al., "Momentum contrast for unsupervised visual representation learning", CVPR 2020, with the
projection of MoCo v2 (Chen et al., arXiv 2003.04297). In the federation the centres average the query
encoder. The key encoder is derived from it: every round begins with a copy of the averaged query encoder,
which then follows the centre's own by momentum. Keys stay at the centre and last a round, because another
encoder made those of the last round. Negatives are the queue and the batch's other scans; a scan is never
its own negative, which would fill the queue of a small cohort.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from client.data.batch import Batch
from client.training.objective import Objective, autocast_context
from common.config.schema import Stage, Task
from common.learning.losses import BatchLoss
from common.modeling.model import Model


def info_nce(
    query: Tensor, key: Tensor, rows: Tensor, queue: Tensor, queue_rows: Tensor, temperature: float
) -> Tensor:
    """Compute InfoNCE (He et al., eq. 1).

    Args:
        query: [B, D], normalised, of the scans `rows`.
        key: [B, D], normalised, of the same scans.
        rows: [B] which scan each is; two of the same scan are no negatives of each other.
        queue: [Q, D] earlier keys.
        queue_rows: [Q] whose they are.
        temperature: Divides the similarities.

    Returns:
        The loss of each scan, [B].
    """
    batch_size = len(rows)
    keys = torch.cat([key, queue])
    key_rows = torch.cat([rows, queue_rows])
    logits = query @ keys.T / temperature
    is_excluded = key_rows[None, :] == rows[:, None]
    is_excluded[torch.arange(batch_size), torch.arange(batch_size)] = False  # the positives
    positives = torch.arange(batch_size, device=query.device)
    return F.cross_entropy(logits.masked_fill(is_excluded, -torch.inf), positives, reduction="none")


class MocoObjective(Objective):
    """The contrastive task's loss beside those of the stage's other tasks."""

    def __init__(
        self,
        stage: Stage,
        tasks: Mapping[str, Task],
        logit_adjustments: Mapping[str, Tensor],
        device: torch.device,
        seed: int,
        model: Model,
    ) -> None:
        """Copy the model as key encoder and start with an empty queue."""
        super().__init__(stage, tasks, logit_adjustments, device, seed)
        self.task_name = next(name for name, task in tasks.items() if task.type == "contrastive")
        self.settings = tasks[self.task_name].contrastive
        self.key_encoder = copy.deepcopy(model).requires_grad_(False)
        self.queue = torch.empty(0, self.settings.projection_dim, device=device)
        self.queue_rows = torch.empty(0, dtype=torch.long, device=device)

    def compute_loss(self, model: Model, part: Batch, num_labelled: Mapping[str, int]) -> BatchLoss:
        """Compute the other tasks' losses, and the contrast between two views of each scan."""
        others = super().compute_loss(model, part, num_labelled)
        rows = part.rows
        if rows is None:
            rows = torch.arange(len(part.slices))
        rows = rows.to(self.device)
        query_view, _ = self.augment_batch(part)
        key_view, _ = self.augment_batch(part)
        with autocast_context(self.device, self.stage.precision):
            query = model(query_view, [self.task_name])[self.task_name].float()
            with torch.no_grad():
                key = self.key_encoder(key_view, [self.task_name])[self.task_name].float()
        losses = info_nce(query, key, rows, self.queue, self.queue_rows, self.settings.temperature)
        self._enqueue(key, rows)
        loss_weight = self.tasks[self.task_name].loss_weight
        total = others.total + loss_weight * losses.sum() / num_labelled[self.task_name]
        contrast_sum = (float(losses.detach().sum()), len(rows))
        return BatchLoss(total, others.sums_by_task | {self.task_name: contrast_sum})

    def _enqueue(self, key: Tensor, rows: Tensor) -> None:
        """Put the newest keys first; a scan's newest key replaces its older one."""
        is_other = ~torch.isin(self.queue_rows, rows)
        self.queue = torch.cat([key, self.queue[is_other]])[: self.settings.queue_size]
        self.queue_rows = torch.cat([rows, self.queue_rows[is_other]])[: self.settings.queue_size]

    @torch.no_grad()
    def after_step(self, model: Model) -> None:
        """Let the key encoder follow (He et al., eq. 2); its batch-norm statistics are its own."""
        for key, query in zip(self.key_encoder.parameters(), model.parameters(), strict=True):
            key.lerp_(query, 1 - self.settings.momentum)
