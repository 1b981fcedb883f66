"""A gradient that hides each patient: DP-SGD (Abadi et al., "Deep learning with differential privacy", CCS 2016, algorithm 1), unit: the patient.

In a step every patient is drawn with the same odds, on their own. The gradient of the mean loss over all scans of one patient is clipped to the norm
C; the sum over those drawn, with Gaussian noise of standard deviation sigma C on every weight, is divided by the number of patients *expected*,
which nobody's presence changes. A patient's gradient depends on the weights and on that patient alone: no batch norm, no counts of the batch, and
random changes seeded by the patient. So one patient more or less changes the sum by C at most: what the accountant (client/budget.py) assumes.

Plain autograd, one patient at a time, as fast as any way there is on CPUs (SPEED.md section 5). Chance comes from the operating system, not from the
run's seed: the coordinator knows that seed, and could draw the same patients and take the same noise off. Nor is it `torch.Generator`, on which
Opacus's noise and sampler are built: on CPUs it takes 32 bits of its seed, few enough to try them all.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from client.dataset import Scans, batch_of, steps_in_round
from client.objective import Batch, Objective
from common.model import Model
from common.noise import normals
from common.schema import Stage, Task
from common.seeds import derive
from common.tasks import labelled_rows

Patients = Mapping[str, Batch]  # those drawn in a step, each with all of their scans; may be empty


@dataclass(frozen=True)
class Protection:
    """`clip` is C, `noise` sigma, `expected` patients in a step; `normals` gives standard normal numbers, and tests give their own."""

    clip: float
    noise: float
    expected: float
    normals: Callable[[int], Tensor] = normals


def rows_of(scans: Scans) -> dict[str, NDArray[np.int64]]:
    """Each patient's rows."""
    rows: dict[str, list[int]] = {}
    for i, patient in enumerate(scans.patients):
        rows.setdefault(patient, []).append(i)
    return {patient: np.array(some) for patient, some in rows.items()}


def pace(scans: Scans, stage: Stage, average: float = 0.0) -> tuple[int, float, int]:
    """(patients, each one's odds in a step, steps in a round): `stage.batch` and `stage.epochs` count patients here, not scans."""
    firsts = np.array([rows[0] for rows in rows_of(scans).values()])
    if not len(firsts):
        return 0, 0.0, 0
    return len(firsts), min(1.0, stage.batch / len(firsts)), steps_in_round(scans.take(firsts), stage, average)


def drawn(scans: Scans, tasks: Mapping[str, Task], odds: float, steps: int, seed: int) -> Iterator[Patients]:
    """`steps` Poisson samples of the patients. Who is drawn is secret; the seed decides which of a scan's choices of slices is taken."""
    rows, chance = rows_of(scans), secrets.SystemRandom()
    for step in range(steps):
        yield {
            patient: batch_of(scans, tasks, some, np.random.default_rng(derive(seed, "slices", step, patient)))
            for patient, some in rows.items()
            if chance.random() < odds
        }


def hide(
    model: Model, objective: Objective, patients: Patients, parameters: Sequence[nn.Parameter], protection: Protection, seed: int
) -> None:
    """Give every parameter its noisy gradient, those too for which nobody drawn has a label."""
    total = clipped_sum(model, objective, patients, parameters, protection.clip, seed)
    model.zero_grad(set_to_none=True)  # the last patient's own gradient stands nowhere
    noise = torch.split(protection.normals(sum(p.numel() for p in parameters)), [p.numel() for p in parameters])
    for p, summed, z in zip(parameters, total, noise, strict=True):
        p.grad = summed.add_(z.view(p.shape).to(p), alpha=protection.noise * protection.clip).div_(protection.expected)


def clipped_sum(
    model: Model, objective: Objective, patients: Patients, parameters: Sequence[nn.Parameter], clip: float, seed: int
) -> list[Tensor]:
    """The sum over patients of each one's gradient, scaled down to the norm `clip` where it is longer; shaped like the parameters.

    A patient's loss is `sum_t w_t * mean of l_t over their scans labelled for t` (common/tasks.py), computed in parts no larger than a plain step's.
    A gradient that is not finite counts as 0: to stop because of it would tell.
    """
    total = [torch.zeros_like(p) for p in parameters]
    largest = -(-objective.stage.batch // objective.stage.accumulate)
    for patient, batch in patients.items():
        own = derive(seed, patient)
        objective.draws.manual_seed(own)  # random changes ...
        torch.manual_seed(own)  # ... and dropout
        labelled = {t: int(labelled_rows(task, batch.targets[t]).sum()) for t, task in objective.tasks.items()}
        model.zero_grad(set_to_none=True)
        for part in batch.parts(-(-len(batch.slices) // largest)):
            losses = objective.loss(model, part, labelled)
            if losses.total.requires_grad:
                losses.total.backward()  # type: ignore[no-untyped-call]
        moved = [(summed, p.grad) for summed, p in zip(total, parameters, strict=True) if p.grad is not None]
        gradients = [gradient for _, gradient in moved]
        norm = float(nn.utils.get_total_norm(gradients))
        if moved and math.isfinite(norm):
            torch._foreach_add_([summed for summed, _ in moved], gradients, alpha=min(1.0, clip / (norm + 1e-6)))
    return total
