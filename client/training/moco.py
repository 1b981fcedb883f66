"""Momentum contrast: a scan is told from other scans by what two random views of it have in common; no label is needed.

He et al., "Momentum contrast for unsupervised visual representation learning", CVPR 2020; with the projection of MoCo v2 (Chen et al., arXiv
2003.04297). In the federation the query encoder is what the centres average. The key encoder is derived from it: every round begins with a copy
of the averaged one, which follows the centre's own by momentum. Keys stay at the centre and last a round: those of the last round were made by
another encoder. Negatives are the queue and the batch's other scans; a scan is never its own negative, which a small cohort would else be
full of.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from client.training.objective import Batch, Objective, autocast_context
from common.config.schema import Stage, Task
from common.learning.losses import BatchLoss
from common.modeling.model import Model


def info_nce(
    query: Tensor, key: Tensor, rows: Tensor, queue: Tensor, queue_rows: Tensor, temperature: float
) -> Tensor:
    """InfoNCE [B] (He et al., eq. 1) of normalised `query` and `key` [B, D] of the scans `rows` [B], against `queue` [Q, D] of scans `queued` [Q]."""
    keys, owners = torch.cat([key, queue]), torch.cat([rows, queue_rows])
    logits = query @ keys.T / temperature
    own = owners[None, :] == rows[:, None]
    own[torch.arange(len(rows)), torch.arange(len(rows))] = False  # the positive stays
    target = torch.arange(len(rows), device=query.device)
    return F.cross_entropy(logits.masked_fill(own, -torch.inf), target, reduction="none")


class MocoObjective(Objective):
    """The contrast task's loss besides those of the stage's other tasks."""

    def __init__(
        self,
        stage: Stage,
        tasks: Mapping[str, Task],
        logit_adjustments: Mapping[str, Tensor],
        device: torch.device,
        seed: int,
        model: Model,
    ) -> None:
        super().__init__(stage, tasks, logit_adjustments, device, seed)
        self.task_name, self.settings = next(
            (t, task.contrastive) for t, task in tasks.items() if task.type == "contrastive"
        )
        self.key_encoder = copy.deepcopy(model).requires_grad_(False)
        self.queue = torch.empty(0, self.settings.projection_dim, device=device)
        self.queue_rows = torch.empty(0, dtype=torch.long, device=device)

    def compute_loss(self, model: Model, part: Batch, num_labelled: Mapping[str, int]) -> BatchLoss:
        """As of an Objective, with the contrast between two views of each scan."""
        others = super().compute_loss(model, part, num_labelled)
        rows = (torch.arange(len(part.slices)) if part.rows is None else part.rows).to(self.device)
        one, two = self.augment_batch(part)[0], self.augment_batch(part)[0]
        with autocast_context(self.device, self.stage.precision):
            query = model(one, [self.task_name])[self.task_name].float()
            with torch.no_grad():
                key = self.key_encoder(two, [self.task_name])[self.task_name].float()
        each = info_nce(query, key, rows, self.queue, self.queue_rows, self.settings.temperature)
        other = ~torch.isin(self.queue_rows, rows)  # a scan's newest key takes the place of its older one
        self.queue = torch.cat([key, self.queue[other]])[: self.settings.queue_size]
        self.queue_rows = torch.cat([rows, self.queue_rows[other]])[: self.settings.queue_size]
        total = (
            others.total + self.tasks[self.task_name].loss_weight * each.sum() / num_labelled[self.task_name]
        )
        return BatchLoss(
            total, others.sums_by_task | {self.task_name: (float(each.detach().sum()), len(rows))}
        )

    @torch.no_grad()
    def after_step(self, model: Model) -> None:
        """The key encoder follows (He et al., eq. 2); its batch-norm statistics are its own."""
        for key, query in zip(self.key_encoder.parameters(), model.parameters(), strict=True):
            key.lerp_(query, 1 - self.settings.momentum)
