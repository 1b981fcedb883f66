"""A gradient that hides each patient: DP-SGD (Abadi et al., "Deep learning with differential privacy", CCS 2016, algorithm 1), unit: the patient.

In a step every patient is drawn with the same odds, on their own. The gradient of the mean loss over all scans of one patient is clipped to the norm
C; the sum over those drawn, with Gaussian noise of standard deviation sigma C on every weight, is divided by the number of patients *expected*,
which nobody's presence changes. A patient's gradient depends on the weights and on that patient alone: no batch norm, no counts of the batch, and
random changes seeded by the patient. So one patient more or less changes the sum by C at most: what the accountant (client/site/privacy_budget.py) assumes.

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

from client.data.dataset import ScanDataset, count_round_steps, make_batch
from client.training.objective import Batch, Objective
from common.config.schema import Stage, Task
from common.learning.losses import find_labelled_rows
from common.learning.seeds import derive_seed
from common.modeling.model import Model
from common.privacy.gaussian_noise import secure_gaussian

PatientBatches = Mapping[str, Batch]  # those drawn in a step, each with all of their scans; may be empty


@dataclass(frozen=True)
class DPParams:
    """`clip` is C, `noise` sigma, `expected` patients in a step; `normals` gives standard normal numbers, and tests give their own."""

    clip_norm: float
    noise_multiplier: float
    expected_patients: float
    draw_normals: Callable[[int], Tensor] = secure_gaussian


def rows_by_patient(scans: ScanDataset) -> dict[str, NDArray[np.int64]]:
    """Each patient's rows."""
    rows: dict[str, list[int]] = {}
    for i, patient in enumerate(scans.patient_ids):
        rows.setdefault(patient, []).append(i)
    return {patient: np.array(some) for patient, some in rows.items()}


def sampling_plan(scans: ScanDataset, stage: Stage, mean_centre_scans: float = 0.0) -> tuple[int, float, int]:
    """(patients, each one's odds in a step, steps in a round): `stage.batch_size` and `stage.local_epochs` count patients here, not scans."""
    firsts = np.array([rows[0] for rows in rows_by_patient(scans).values()])
    if not len(firsts):
        return 0, 0.0, 0
    return (
        len(firsts),
        min(1.0, stage.batch_size / len(firsts)),
        count_round_steps(scans.subset(firsts), stage, mean_centre_scans),
    )


def poisson_batches(
    scans: ScanDataset, tasks: Mapping[str, Task], sample_rate: float, steps: int, seed: int
) -> Iterator[PatientBatches]:
    """`steps` Poisson samples of the patients. Who is drawn is secret; the seed decides which of a scan's choices of slices is taken."""
    rows, chance = rows_by_patient(scans), secrets.SystemRandom()
    for step in range(steps):
        yield {
            patient: make_batch(
                scans, tasks, some, np.random.default_rng(derive_seed(seed, "slices", step, patient))
            )
            for patient, some in rows.items()
            if chance.random() < sample_rate
        }


def privatise_gradient(
    model: Model,
    objective: Objective,
    patients: PatientBatches,
    parameters: Sequence[nn.Parameter],
    dp_params: DPParams,
    seed: int,
) -> None:
    """Give every parameter its noisy gradient, those too for which nobody drawn has a label."""
    total = sum_clipped_gradients(model, objective, patients, parameters, dp_params.clip_norm, seed)
    model.zero_grad(set_to_none=True)  # the last patient's own gradient stands nowhere
    noise = torch.split(
        dp_params.draw_normals(sum(p.numel() for p in parameters)), [p.numel() for p in parameters]
    )
    for p, summed, z in zip(parameters, total, noise, strict=True):
        p.grad = summed.add_(
            z.view(p.shape).to(p), alpha=dp_params.noise_multiplier * dp_params.clip_norm
        ).div_(dp_params.expected_patients)


def sum_clipped_gradients(
    model: Model,
    objective: Objective,
    patients: PatientBatches,
    parameters: Sequence[nn.Parameter],
    clip_norm: float,
    seed: int,
) -> list[Tensor]:
    """The sum over patients of each one's gradient, scaled down to the norm `clip` where it is longer; shaped like the parameters.

    A patient's loss is `sum_t w_t * mean of l_t over their scans labelled for t` (common/learning/losses.py), computed in parts no larger than a plain step's.
    A gradient that is not finite counts as 0: to stop because of it would tell.
    """
    total = [torch.zeros_like(p) for p in parameters]
    largest = -(-objective.stage.batch_size // objective.stage.grad_accum_steps)
    for patient, batch in patients.items():
        own = derive_seed(seed, patient)
        objective.generator.manual_seed(own)  # random changes ...
        torch.manual_seed(own)  # ... and dropout
        labelled = {
            t: int(find_labelled_rows(task, batch.targets[t]).sum()) for t, task in objective.tasks.items()
        }
        model.zero_grad(set_to_none=True)
        for part in batch.split_into(-(-len(batch.slices) // largest)):
            losses = objective.compute_loss(model, part, labelled)
            if losses.total.requires_grad:
                losses.total.backward()  # type: ignore[no-untyped-call]
        moved = [(summed, p.grad) for summed, p in zip(total, parameters, strict=True) if p.grad is not None]
        gradients = [gradient for _, gradient in moved]
        norm = float(nn.utils.get_total_norm(gradients))
        if moved and math.isfinite(norm):
            torch._foreach_add_(
                [summed for summed, _ in moved], gradients, alpha=min(1.0, clip_norm / (norm + 1e-6))
            )
    return total
