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

from client.objective import Batch, Objective, autocast
from common.model import Model
from common.schema import Stage, Task
from common.tasks import Losses


def contrast(query: Tensor, key: Tensor, rows: Tensor, queue: Tensor, queued: Tensor, temperature: float) -> Tensor:
    """InfoNCE [B] (He et al., eq. 1) of normalised `query` and `key` [B, D] of the scans `rows` [B], against `queue` [Q, D] of scans `queued` [Q]."""
    keys, owners = torch.cat([key, queue]), torch.cat([rows, queued])
    logits = query @ keys.T / temperature
    own = owners[None, :] == rows[:, None]
    own[torch.arange(len(rows)), torch.arange(len(rows))] = False  # the positive stays
    target = torch.arange(len(rows), device=query.device)
    return F.cross_entropy(logits.masked_fill(own, -torch.inf), target, reduction="none")


class Moco(Objective):
    """The contrast task's loss besides those of the stage's other tasks."""

    def __init__(
        self, stage: Stage, tasks: Mapping[str, Task], adjustments: Mapping[str, Tensor], device: torch.device, seed: int, model: Model
    ) -> None:
        super().__init__(stage, tasks, adjustments, device, seed)
        self.task, self.settings = next((t, task.contrast) for t, task in tasks.items() if task.kind == "contrast")
        self.keys = copy.deepcopy(model).requires_grad_(False)
        self.queue = torch.empty(0, self.settings.width, device=device)
        self.queued = torch.empty(0, dtype=torch.long, device=device)

    def loss(self, model: Model, part: Batch, labelled: Mapping[str, int]) -> Losses:
        """As of an Objective, with the contrast between two views of each scan."""
        others = super().loss(model, part, labelled)
        rows = (torch.arange(len(part.slices)) if part.rows is None else part.rows).to(self.device)
        one, two = self.view(part)[0], self.view(part)[0]
        with autocast(self.device, self.stage.precision):
            query = model(one, [self.task])[self.task].float()
            with torch.no_grad():
                key = self.keys(two, [self.task])[self.task].float()
        each = contrast(query, key, rows, self.queue, self.queued, self.settings.temperature)
        other = ~torch.isin(self.queued, rows)  # a scan's newest key takes the place of its older one
        self.queue = torch.cat([key, self.queue[other]])[: self.settings.queue]
        self.queued = torch.cat([rows, self.queued[other]])[: self.settings.queue]
        total = others.total + self.tasks[self.task].weight * each.sum() / labelled[self.task]
        return Losses(total, others.sums | {self.task: (float(each.detach().sum()), len(rows))})

    @torch.no_grad()
    def stepped(self, model: Model) -> None:
        """The key encoder follows (He et al., eq. 2); its batch-norm statistics are its own."""
        for key, query in zip(self.keys.parameters(), model.parameters(), strict=True):
            key.lerp_(query, 1 - self.settings.momentum)
