"""A batch of scans: what the trainer sees of a data set."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Batch:
    """Slices and targets of some scans.

    Attributes:
        slices: uint8 [B, S, H, W].
        targets: {task: target}, shaped as common/learning/losses.py describes.
        rows: [B] the scans' row numbers in their data set, where somebody needs them.
    """

    slices: Tensor
    targets: dict[str, Tensor]
    rows: Tensor | None = None

    def split_into(self, num_parts: int) -> Iterator[Batch]:
        """Cut the batch into at most `num_parts` parts of nearly equal size."""
        num_scans = len(self.slices)
        for indices in torch.arange(num_scans).tensor_split(min(num_parts, num_scans)):
            targets = {task: target[indices] for task, target in self.targets.items()}
            rows = None if self.rows is None else self.rows[indices]
            yield Batch(self.slices[indices], targets, rows)
