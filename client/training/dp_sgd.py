"""DP-SGD with the patient as the unit.

Abadi et al., "Deep learning with differential privacy", CCS 2016, algorithm 1.

In a step every patient is drawn with the same probability, independently of the others. The gradient of the
mean loss over all scans of one patient is clipped to the norm C. The sum over the patients drawn, with
Gaussian noise of standard deviation sigma C on every weight, is divided by the *expected* number of
patients, which nobody's presence changes. A patient's gradient depends on the weights and on that patient
alone: no batch norm, no counts over the batch, and augmentation seeded by the patient. One patient more or
less therefore changes the sum by C at most, which is what the accountant (client/site/privacy_budget.py)
assumes.

The gradients come from plain autograd, one patient at a time, which no other way beats on a CPU. Randomness
comes from the operating system, not from the run's seed: the coordinator knows that seed, and could draw the
same patients and subtract the same noise. Nor does it come from `torch.Generator`, on which Opacus's noise
and sampler are built: on a CPU that uses 32 bits of its seed, few enough to try them all.
"""

from __future__ import annotations

import math
import secrets
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from client.data.batch import Batch
from client.data.dataset import ScanDataset, count_round_steps, make_batch
from client.training.objective import Objective
from common.config.schema import Stage, Task
from common.learning.seeds import derive_seed
from common.modeling.model import Model
from common.privacy.gaussian_noise import secure_gaussian

PatientBatches = Mapping[str, Batch]  # patients drawn in a step, with all their scans; may be empty


@dataclass(frozen=True)
class DPParams:
    """What protects a round of training.

    Attributes:
        clip_norm: C, the largest norm of a patient's gradient.
        noise_multiplier: sigma, the noise's standard deviation in units of C.
        expected_patients: Patients that a step draws on average.
        draw_normals: Returns n standard normal numbers; replaced in tests.
    """

    clip_norm: float
    noise_multiplier: float
    expected_patients: float
    draw_normals: Callable[[int], Tensor] = secure_gaussian


class SamplingPlan(NamedTuple):
    """How a round draws patients."""

    num_patients: int
    sample_rate: float  # a patient's probability to be drawn in a step
    steps: int  # in the round


def rows_by_patient(scans: ScanDataset) -> dict[str, NDArray[np.int64]]:
    """Return each patient's row numbers, patients in order of their first scan."""
    rows: defaultdict[str, list[int]] = defaultdict(list)
    for row, patient in enumerate(scans.patient_ids):
        rows[patient].append(row)
    return {patient: np.array(patient_rows) for patient, patient_rows in rows.items()}


def sampling_plan(scans: ScanDataset, stage: Stage, mean_centre_scans: float = 0.0) -> SamplingPlan:
    """Plan a round in which `stage.batch_size` and `stage.local_epochs` count patients instead of scans."""
    first_rows = [rows[0] for rows in rows_by_patient(scans).values()]
    num_patients = len(first_rows)
    if not num_patients:
        return SamplingPlan(0, 0.0, 0)
    one_scan_each = scans.subset(np.array(first_rows))
    sample_rate = min(1.0, stage.batch_size / num_patients)
    return SamplingPlan(num_patients, sample_rate, count_round_steps(one_scan_each, stage, mean_centre_scans))


def poisson_batches(
    scans: ScanDataset, tasks: Mapping[str, Task], sample_rate: float, steps: int, seed: int
) -> Iterator[PatientBatches]:
    """Yield a Poisson sample of the patients for each step.

    Who is drawn is secret; the seed only decides which view of a scan's slices is taken.
    """
    rows = rows_by_patient(scans)
    secret_random = secrets.SystemRandom()
    for step in range(steps):
        sample = {}
        for patient, patient_rows in rows.items():
            if secret_random.random() < sample_rate:
                view_generator = np.random.default_rng(derive_seed(seed, "slices", step, patient))
                sample[patient] = make_batch(scans, tasks, patient_rows, view_generator)
        yield sample


def privatise_gradient(
    model: Model,
    objective: Objective,
    patients: PatientBatches,
    parameters: Sequence[nn.Parameter],
    dp_params: DPParams,
    seed: int,
) -> None:
    """Set every parameter's gradient to the noisy mean, also where no patient drawn has a label."""
    sums = sum_clipped_gradients(model, objective, patients, parameters, dp_params.clip_norm, seed)
    model.zero_grad(set_to_none=True)  # removes the last patient's own gradient
    sizes = [parameter.numel() for parameter in parameters]
    noise = torch.split(dp_params.draw_normals(sum(sizes)), sizes)
    noise_std = dp_params.noise_multiplier * dp_params.clip_norm
    for parameter, gradient_sum, normals in zip(parameters, sums, noise, strict=True):
        normals = normals.view(parameter.shape).to(parameter)
        parameter.grad = gradient_sum.add_(normals, alpha=noise_std).div_(dp_params.expected_patients)


def sum_clipped_gradients(
    model: Model,
    objective: Objective,
    patients: PatientBatches,
    parameters: Sequence[nn.Parameter],
    clip_norm: float,
    seed: int,
) -> list[Tensor]:
    """Sum the patients' gradients, each scaled down to the norm `clip_norm` where it is longer.

    A patient's loss is `sum_t w_t * mean of l_t over their scans labelled for t`
    (common/learning/losses.py), computed in parts no larger than a plain step's. A gradient that is not
    finite counts as 0: stopping because of it would reveal something about the patient.

    Returns:
        Tensors shaped like the parameters.
    """
    sums = [torch.zeros_like(parameter) for parameter in parameters]
    for patient, batch in patients.items():
        patient_seed = derive_seed(seed, patient)
        objective.generator.manual_seed(patient_seed)  # augmentation
        torch.manual_seed(patient_seed)  # dropout
        _compute_patient_gradient(model, objective, batch)
        _add_clipped(sums, parameters, clip_norm)
    return sums


def _compute_patient_gradient(model: Model, objective: Objective, batch: Batch) -> None:
    """Leave the gradient of one patient's loss in the parameters."""
    part_size = math.ceil(objective.stage.batch_size / objective.stage.grad_accum_steps)
    num_parts = math.ceil(len(batch.slices) / part_size)
    num_labelled = objective.count_labelled(batch)
    model.zero_grad(set_to_none=True)
    for part in batch.split_into(num_parts):
        losses = objective.compute_loss(model, part, num_labelled)
        if losses.total.requires_grad:
            losses.total.backward()  # type: ignore[no-untyped-call]


def _add_clipped(sums: Sequence[Tensor], parameters: Sequence[nn.Parameter], clip_norm: float) -> None:
    """Add the parameters' gradients, clipped together, to their sums."""
    sums_to_change: list[Tensor] = []
    gradients: list[Tensor] = []
    for gradient_sum, parameter in zip(sums, parameters, strict=True):
        if parameter.grad is not None:
            sums_to_change.append(gradient_sum)
            gradients.append(parameter.grad)
    if not gradients:
        return  # the patient has no label
    norm = float(nn.utils.get_total_norm(gradients))
    if math.isfinite(norm):
        torch._foreach_add_(sums_to_change, gradients, alpha=min(1.0, clip_norm / (norm + 1e-6)))
