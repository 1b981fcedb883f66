"""DP-SGD, compared with loops by hand in float64: one patient moves the sum by the clip norm at most."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from client.data.batch import Batch
from client.data.dataset import ScanDataset
from client.training.dp_sgd import (
    DPParams,
    PatientBatches,
    poisson_batches,
    privatise_gradient,
    sampling_plan,
    sum_clipped_gradients,
)
from client.training.objective import Objective
from client.training.trainer import TrainSpec, train
from common.config.schema import AugmentConfig, BackboneConfig, OptimiserConfig, Stage, Task
from common.learning.losses import BatchLoss
from common.modeling.model import Model, make_model
from common.privacy.gaussian_noise import secure_gaussian

NO_AUGMENTATION = AugmentConfig(p_flip=0, p_affine=0, p_brightness=0, p_hsv_value=0, p_cutout=0)
SGD = OptimiserConfig(name="sgd", lr=0.1, momentum=0, weight_decay=0, schedule="constant")
STAGE = Stage(augment=NO_AUGMENTATION, optimiser=SGD, batch_size=2)
TASKS = {"covid": Task(), "source": Task(type="multiclass", classes=["a", "b", "c"], loss_weight=0.5)}
LOGIT_ADJUSTMENTS = {"source": torch.tensor([-0.3, -1.0, -2.0])}
NAN = math.nan
CPU = torch.device("cpu")


def model_of(tasks: dict[str, Task] = TASKS, channels_last: bool = False) -> Model:
    return make_model(BackboneConfig(norm="group"), tasks, 1, channels_last).train()


def patient(seed: int, covid: list[float], source: list[float]) -> Batch:
    slices = torch.from_numpy(
        np.random.default_rng(seed).integers(0, 256, (len(covid), 2, 32, 32), dtype=np.uint8)
    )
    return Batch(
        slices,
        {
            "covid": torch.tensor(covid, dtype=torch.float64),
            "source": torch.tensor(source, dtype=torch.float64),
        },
    )


def four_patients() -> dict[str, Batch]:
    """Make patients with one scan and with several; labels missing for one task, some scans, or both."""
    return {
        "ann": patient(1, [1], [2]),
        "ben": patient(2, [0, NAN, 1], [0, 1, NAN]),
        "cat": patient(3, [NAN, NAN], [1, 1]),
        "dan": patient(4, [NAN], [NAN]),
    }


def objective(stage: Stage = STAGE, tasks: dict[str, Task] = TASKS) -> Objective:
    return Objective(stage, tasks, LOGIT_ADJUSTMENTS if "source" in tasks else {}, CPU, 0)


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors])


def sum_by_hand(model: Model, patients: PatientBatches, clip: float) -> Tensor:
    """Compute the same sum in float64, scan by scan, without any of the code under test."""
    wide = copy.deepcopy(model).double()
    total = torch.zeros(sum(p.numel() for p in wide.parameters()), dtype=torch.float64)
    for batch in patients.values():
        losses: list[Tensor] = []
        known = {t: y.isfinite() for t, y in batch.targets.items()}
        for i, scan in enumerate(batch.slices):
            x = (scan.double() / 255)[:, None].expand(-1, 3, -1, -1)
            f = wide.encoder((x - wide.mean) / wide.std).mean(0)
            if known["covid"][i]:
                z = wide.heads["covid"](f)
                losses.append(
                    F.binary_cross_entropy_with_logits(z[0], batch.targets["covid"][i]) / known["covid"].sum()
                )
            if known["source"][i]:
                z = wide.heads["source"](f) + LOGIT_ADJUSTMENTS["source"]
                losses.append(
                    0.5 * F.cross_entropy(z, batch.targets["source"][i].long()) / known["source"].sum()
                )
        if losses:
            parameters = list(wide.parameters())
            gradients = torch.autograd.grad(torch.stack(losses).sum(), parameters, allow_unused=True)
            pairs = zip(gradients, parameters, strict=True)
            gradient = flat([torch.zeros_like(p) if g is None else g for g, p in pairs])
            total += gradient * min(1.0, clip / float(gradient.norm()))
    return total


@pytest.mark.parametrize("clip", [0.05, 1e3])
@pytest.mark.parametrize("how", ["plain", "channels_last", "in_place"])
def test_the_sum_matches_a_loop_by_hand(how: str, clip: float) -> None:
    model = model_of(channels_last=how == "channels_last")
    activations = [m for m in model.modules() if isinstance(m, nn.ReLU)]
    assert activations
    for activation in activations:
        activation.inplace = how == "in_place"
    expected = sum_by_hand(model, four_patients(), clip)
    parameters = list(model.parameters())
    gradient_sum = flat(sum_clipped_gradients(model, objective(), four_patients(), parameters, clip, 7))
    assert float((gradient_sum - expected).norm() / expected.norm()) < 2e-4
    assert float(expected.norm()) > 0.5 * clip or clip > 1


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32), clip=st.floats(1e-3, 10), scans=st.integers(1, 4), loud=st.floats(0, 1e4))
def test_one_patient_moves_the_sum_by_the_clip_norm_at_most(
    seed: int, clip: float, scans: int, loud: float
) -> None:
    """Also with augmentation and dropout: the others' random numbers do not depend on who else is there."""
    tasks = {t: replace(task, dropout=0.5) for t, task in TASKS.items()}
    model = model_of(tasks)
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        model.heads["covid"][-1].weight.mul_(loud)  # gradients of any size

    def anyone() -> Batch:
        labels = [[float(v) if rng.random() < 0.8 else NAN for v in rng.integers(0, 2, scans)] for _ in TASKS]
        return patient(int(rng.integers(2**31)), *labels)

    others = {"ben": anyone(), "cat": anyone()}

    def gradient_sum(patients: PatientBatches) -> Tensor:
        augmented = objective(replace(STAGE, augment=AugmentConfig()), tasks)
        parameters = list(model.parameters())
        return flat(sum_clipped_gradients(model, augmented, patients, parameters, clip, seed))

    without = gradient_sum(others)
    with_one = gradient_sum({"ann": anyone(), **others})
    with_another = gradient_sum({"ann": anyone(), **others})
    # one patient more is what the accountant's epsilon refers to
    assert float((with_one - without).norm()) <= clip * (1 + 1e-4)
    assert float((with_one - with_another).norm()) <= 2 * clip * (1 + 1e-4)  # one replaced by another
    reordered = gradient_sum(dict(reversed(others.items())))
    assert float((without - reordered).norm()) <= 1e-4 * clip


@pytest.mark.parametrize("is_infinite", [False, True])  # False: it is not a number
def test_a_gradient_that_is_not_finite_counts_as_zero(is_infinite: bool) -> None:
    model = model_of()
    parameters = list(model.parameters())
    patients = four_patients()
    finite = {name: patients[name] for name in ("ann", "cat")}
    expected = flat(sum_clipped_gradients(model, objective(), finite, parameters, 1.0, 7))
    bad_slice = patients["ben"].slices[0]
    overflowing = objective()
    compute_loss = overflowing.compute_loss

    def overflow(model: Model, part: Batch, num_labelled: dict[str, int]) -> BatchLoss:
        losses = compute_loss(model, part, num_labelled)
        if len(part.slices) < 3 and torch.equal(part.slices[0], bad_slice):
            infinite_loss = parameters[0].sum() * math.inf
            losses.total = infinite_loss if is_infinite else losses.total * math.inf
        return losses

    overflowing.compute_loss = overflow  # type: ignore[method-assign, assignment]
    with_bad = {name: patients[name] for name in ("ann", "ben", "cat")}
    gradient_sum = flat(sum_clipped_gradients(model, overflowing, with_bad, parameters, 1.0, 7))
    assert torch.equal(gradient_sum, expected)


# --- the noise --------------------------------------------------------------------------------------------


def test_noise_is_normal_and_does_not_follow_a_seed() -> None:
    torch.manual_seed(1)
    z = secure_gaussian(400_001)
    torch.manual_seed(1)
    assert not torch.equal(z, secure_gaussian(400_001))
    assert z.shape == (400_001,)
    moments = [float((z.double() ** k).mean()) for k in (1, 2, 3, 4)]
    # Each bound is at least 6.4 standard errors wide: the test fails by chance once in 10^9 times.
    np.testing.assert_array_less(np.abs(np.array(moments) - [0, 1, 0, 3]), [0.02, 0.02, 0.05, 0.1])
    assert float((z.abs() > 1.96).float().mean()) == pytest.approx(0.05, abs=0.0025)
    product = z[:200_000] * z[200_000:400_000]  # both halves come from the same radius
    assert abs(float(product.mean())) < 0.016


def test_every_weight_gets_noise_of_the_right_scale_even_when_nobody_is_drawn() -> None:
    model = model_of()
    parameters = list(model.parameters())
    dp_params = DPParams(clip_norm=0.5, noise_multiplier=3.0, expected_patients=8.0)
    seen = []
    for step in range(20):
        privatise_gradient(model, objective(), {}, parameters, dp_params, step)
        seen.append(flat([p.grad for p in parameters if p.grad is not None]))
    z = torch.stack(seen) / (3.0 * 0.5 / 8.0)
    assert z.shape[1] == sum(p.numel() for p in parameters)
    assert float(z.std()) == pytest.approx(1, abs=0.01)
    assert float(z.mean()) == pytest.approx(0, abs=0.01)
    assert float(z.std(0).min()) > 0.1
    assert abs(float((z[0] * z[1]).mean())) < 7 / z.shape[1] ** 0.5  # steps are independent
    noiseless = replace(dp_params, draw_normals=torch.zeros)
    privatise_gradient(model, objective(), four_patients(), parameters, noiseless, 3)
    gradient = flat([p.grad for p in parameters if p.grad is not None])
    gradient_sum = flat(sum_clipped_gradients(model, objective(), four_patients(), parameters, 0.5, 3))
    torch.testing.assert_close(gradient, gradient_sum / 8.0)


# --- sampling ---------------------------------------------------------------------------------------------


def cohort(patients: list[str]) -> ScanDataset:
    n = len(patients)
    slices = [np.full((1, 8, 8), i, np.uint8) for i in range(n)]
    return ScanDataset(slices, {"covid": np.arange(n, dtype=float) % 2}, ["north"] * n, patient_ids=patients)


def test_patients_are_drawn_independently_with_all_their_scans() -> None:
    scans = cohort(["a", "b", "a", "c", "a", "d"])
    assert sampling_plan(scans, Stage(batch_size=2)) == (4, 0.5, 2)
    assert sampling_plan(scans, Stage(batch_size=9)) == (4, 1.0, 1)
    steps = list(poisson_batches(scans, {"covid": Task()}, 0.5, 4000, 1))
    of_a = [step["a"] for step in steps if "a" in step]
    assert all(batch.slices[:, 0, 0, 0].tolist() == [0, 2, 4] for batch in of_a)
    sizes = np.bincount([len(step) for step in steps], minlength=5) / 4000
    # binomial: some steps draw nobody
    np.testing.assert_allclose(sizes, np.array([1, 4, 6, 4, 1]) / 16, atol=0.055)
    first, second = (
        [list(step) for step in poisson_batches(scans, {"covid": Task()}, 0.5, 40, 1)] for _ in range(2)
    )
    assert first != second


# --- in the trainer ---------------------------------------------------------------------------------------


def test_without_clipping_and_noise_it_equals_plain_training() -> None:
    """Every patient has one scan and all are drawn: the expected number is the batch's size."""
    batch = patient(5, [0, 1, 1, 0], [0, 1, 2, 1])
    patients = {str(i): part for i, part in enumerate(batch.split_into(4))}
    noiseless = DPParams(clip_norm=1e6, noise_multiplier=1.0, expected_patients=4.0, draw_normals=torch.zeros)
    plain_model = model_of()
    private_model = model_of()
    spec = TrainSpec(STAGE, TASKS, LOGIT_ADJUSTMENTS, num_steps=3)
    train(plain_model, [batch] * 3, spec)
    result = train(private_model, [patients] * 3, replace(spec, dp_params=noiseless))
    for name, weight in plain_model.state_dict().items():
        torch.testing.assert_close(private_model.state_dict()[name], weight, rtol=1e-4, atol=1e-5)
    assert result.steps == 3
    assert result.scans_seen == 0  # scans and losses would reveal who was drawn
    assert result.losses == {"covid": [0.0, 0.0], "source": [0.0, 0.0]}


def test_only_trained_parameters_get_noise() -> None:
    tasks = {**TASKS, "source": replace(TASKS["source"], head_update="anchored"), "idle": Task()}
    model = model_of(tasks)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    active = {t: tasks[t] for t in TASKS}
    dp_params = DPParams(1.0, 1.0, 2.0)
    stage = replace(STAGE, freeze=["encoder.*"])
    train(model, [{}, {}], TrainSpec(stage, active, LOGIT_ADJUSTMENTS, num_steps=2, dp_params=dp_params))
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {k for k in before if k.startswith(("heads.covid", "heads.source"))}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    stage = replace(STAGE, freeze=["heads.source.*"])
    train(model, [{}], TrainSpec(stage, active, LOGIT_ADJUSTMENTS, num_steps=1, dp_params=dp_params))
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {k for k in before if not k.startswith(("heads.idle", "heads.source"))}
