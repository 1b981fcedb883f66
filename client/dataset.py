"""A cohort's scans ready to train on: memory-mapped slices, targets, and batches drawn from a seed."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from client.trainer import Batch
from common.errors import Refused
from common.schema import Stage


@dataclass
class Scans:
    """`slices` N arrays uint8 [S, H, W] (memory maps); `targets` {task: float [N], NaN = missing}; `cohort` [N] the centre of each scan."""

    slices: list[NDArray[np.uint8]]
    targets: dict[str, NDArray[np.float64]]
    cohort: list[str]

    def __len__(self) -> int:
        return len(self.slices)


def stacked(slices: Sequence[NDArray[np.uint8]]) -> Tensor:
    """uint8 [B, S, H, W]. Raises Refused when a CT and a radiograph would share a batch."""
    if len({s.shape for s in slices}) > 1:
        raise Refused("scans of different slice counts in one cohort (CT and radiographs?); give each kind a cohort of its own")
    return torch.from_numpy(np.stack(slices))


def steps_in_round(scans: Scans, stage: Stage, average: float = 0.0) -> int:
    """Optimiser steps of a round: `stage.steps`, or those of `stage.epochs` passes over the centre's scans, or with `stage.pace: equal` over
    as many as the `average` centre has.

    A centre of many steps moves the model further whatever its weight: by passes over its own scans FedAvg's weight is n_c squared in effect
    (Wang et al., "Tackling the objective inconsistency problem", NeurIPS 2020). Pooled cohorts take the sum of what each would take
    alone, so that central, federated and local runs spend equal numbers of steps.
    """
    total = 0
    for centre in sorted(set(scans.cohort)):
        n = average if stage.pace == "equal" and average else scans.cohort.count(centre)
        per_pass = n / stage.batch
        total += stage.steps or max(1, round((max(1, math.floor(per_pass)) if stage.drop_last else math.ceil(per_pass)) * stage.epochs))
    return total


def batches(scans: Scans, tasks: Sequence[str], stage: Stage, steps: int, seed: int) -> Iterator[Batch]:
    """`steps` batches, shuffled anew each pass; the order depends on the seed and the number of scans only."""
    generator = np.random.default_rng(seed)
    done = 0
    while done < steps:
        order = generator.permutation(len(scans))
        for start in range(0, len(order), stage.batch):
            rows = order[start : start + stage.batch]
            short = len(rows) < stage.batch
            if done == steps or (short and stage.drop_last and len(scans) >= stage.batch):
                break
            targets = {t: torch.from_numpy(scans.targets[t][rows]) for t in tasks}
            yield Batch(stacked([scans.slices[i] for i in rows]), targets)
            done += 1


def in_order(scans: Scans, batch: int) -> Iterator[Tensor]:
    """All scans in order, uint8 [B, S, H, W]."""
    for start in range(0, len(scans), batch):
        yield stacked(scans.slices[start : start + batch])
