"""The protected gradient against loops written out by hand in float64, and the law it stands on: one patient moves the sum by the clip at most."""

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

from client.data.dataset import ScanDataset
from client.training.dp_sgd import (
    DPParams,
    PatientBatches,
    poisson_batches,
    privatise_gradient,
    sampling_plan,
    sum_clipped_gradients,
)
from client.training.objective import Batch, Objective
from client.training.trainer import train
from common.config.schema import AugmentConfig, BackboneConfig, OptimiserConfig, Stage, Task
from common.modeling.model import Model, make_model
from common.privacy.gaussian_noise import secure_gaussian

STILL = AugmentConfig(p_flip=0, p_affine=0, p_brightness=0, p_hsv_value=0, p_cutout=0)
SGD = OptimiserConfig(name="sgd", lr=0.1, momentum=0, weight_decay=0, schedule="constant")
STAGE = Stage(augment=STILL, optimiser=SGD, batch_size=2)
TASKS = {"covid": Task(), "source": Task(type="multiclass", classes=["a", "b", "c"], loss_weight=0.5)}
ADJUST = {"source": torch.tensor([-0.3, -1.0, -2.0])}
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


def some() -> dict[str, Batch]:
    """One scan; three scans, more than a batch; labels missing for one task, for some scans, for both tasks."""
    return {
        "ann": patient(1, [1], [2]),
        "ben": patient(2, [0, NAN, 1], [0, 1, NAN]),
        "cat": patient(3, [NAN, NAN], [1, 1]),
        "dan": patient(4, [NAN], [NAN]),
    }


def objective(stage: Stage = STAGE, tasks: dict[str, Task] = TASKS) -> Objective:
    return Objective(stage, tasks, ADJUST if "source" in tasks else {}, CPU, 0)


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().double().flatten() for t in tensors])


def naive(model: Model, patients: PatientBatches, clip: float) -> Tensor:
    """The same sum in float64, scan after scan, without a line of the code under test."""
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
                z = wide.heads["source"](f) + ADJUST["source"]
                losses.append(
                    0.5 * F.cross_entropy(z, batch.targets["source"][i].long()) / known["source"].sum()
                )
        if losses:
            found = torch.autograd.grad(torch.stack(losses).sum(), list(wide.parameters()), allow_unused=True)
            own = flat(
                [
                    torch.zeros_like(p) if g is None else g
                    for g, p in zip(found, wide.parameters(), strict=True)
                ]
            )
            total += own * min(1.0, clip / float(own.norm()))
    return total


@pytest.mark.parametrize("clip", [0.05, 1e3])
@pytest.mark.parametrize("how", ["plain", "channels_last", "in_place"])
def test_the_sum_is_the_naive_loops(how: str, clip: float) -> None:
    model = model_of(channels_last=how == "channels_last")
    places = [m for m in model.modules() if isinstance(m, nn.ReLU)]
    assert places
    for m in places:
        m.inplace = how == "in_place"
    expected = naive(model, some(), clip)
    found = flat(sum_clipped_gradients(model, objective(), some(), list(model.parameters()), clip, 7))
    assert float((found - expected).norm() / expected.norm()) < 2e-4
    assert float(expected.norm()) > 0.5 * clip or clip > 1


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32), clip=st.floats(1e-3, 10), scans=st.integers(1, 4), loud=st.floats(0, 1e4))
def test_one_patient_moves_the_sum_by_the_clip_at_most(
    seed: int, clip: float, scans: int, loud: float
) -> None:
    """With every random change and dropout: those of the others do not depend on who else is there."""
    tasks = {t: replace(task, dropout=0.5) for t, task in TASKS.items()}
    model, rng = model_of(tasks), np.random.default_rng(seed)
    with torch.no_grad():
        model.heads["covid"][-1].weight.mul_(loud)  # gradients of any size

    def anyone() -> Batch:
        labels = [[float(v) if rng.random() < 0.8 else NAN for v in rng.integers(0, 2, scans)] for _ in TASKS]
        return patient(int(rng.integers(2**31)), *labels)

    others = {"ben": anyone(), "cat": anyone()}

    def summed(patients: PatientBatches) -> Tensor:
        return flat(
            sum_clipped_gradients(
                model,
                objective(replace(STAGE, augment=AugmentConfig()), tasks),
                patients,
                list(model.parameters()),
                clip,
                seed,
            )
        )

    without, one, another = (
        summed(others),
        summed({"ann": anyone(), **others}),
        summed({"ann": anyone(), **others}),
    )
    assert float((one - without).norm()) <= clip * (
        1 + 1e-4
    )  # one more: what the accountant's epsilon is about
    assert float((one - another).norm()) <= 2 * clip * (1 + 1e-4)  # one in another's place
    assert (
        float((without - summed(dict(reversed(others.items())))).norm()) <= 1e-4 * clip
    )  # in whatever order they come


def test_a_gradient_that_is_not_finite_counts_as_none() -> None:
    model = model_of()
    patients = some()
    expected = flat(
        sum_clipped_gradients(
            model, objective(), {k: patients[k] for k in ("ann", "cat")}, list(model.parameters()), 1.0, 7
        )
    )
    bad = patients["ben"]
    spoilt = objective()
    usual = spoilt.compute_loss

    def loss(model: Model, part: Batch, labelled: dict[str, int]):  # type: ignore[no-untyped-def]
        found = usual(model, part, labelled)
        found.total = found.total * (
            math.inf if part.slices.shape[0] < 3 and torch.equal(part.slices[0], bad.slices[0]) else 1
        )
        return found

    spoilt.compute_loss = loss  # type: ignore[method-assign, assignment]
    found = flat(
        sum_clipped_gradients(
            model, spoilt, {k: patients[k] for k in ("ann", "ben", "cat")}, list(model.parameters()), 1.0, 7
        )
    )
    assert torch.equal(found, expected)


# --- the noise ------------------------------------------------------------------------------------------------------------------------


def test_normals_are_normal_and_follow_no_seed() -> None:
    torch.manual_seed(1)
    z = secure_gaussian(400_001)
    torch.manual_seed(1)
    assert not torch.equal(z, secure_gaussian(400_001))
    assert z.shape == (400_001,)
    moments = [float((z.double() ** k).mean()) for k in (1, 2, 3, 4)]
    assert np.allclose(moments, [0, 1, 0, 3], atol=0.05)
    assert float((z.abs() > 1.96).float().mean()) == pytest.approx(0.05, abs=0.002)
    assert (
        abs(float((z[:200_000] * z[200_000:400_000]).mean())) < 0.01
    )  # both halves come from the same radius


def test_the_noise_has_its_scale_on_every_weight_also_when_nobody_is_drawn() -> None:
    model = model_of()
    parameters = list(model.parameters())
    protection = DPParams(clip_norm=0.5, noise_multiplier=3.0, expected_patients=8.0)
    seen = []
    for step in range(20):
        privatise_gradient(model, objective(), {}, parameters, protection, step)
        seen.append(flat([p.grad for p in parameters if p.grad is not None]))
    z = torch.stack(seen) / (3.0 * 0.5 / 8.0)
    assert z.shape[1] == sum(p.numel() for p in parameters)
    assert float(z.std()) == pytest.approx(1, abs=0.01)
    assert float(z.mean()) == pytest.approx(0, abs=0.01)
    assert float(z.std(0).min()) > 0.1
    assert abs(float((z[0] * z[1]).mean())) < 0.02  # steps are independent
    privatise_gradient(
        model, objective(), some(), parameters, replace(protection, draw_normals=torch.zeros), 3
    )
    found = flat([p.grad for p in parameters if p.grad is not None])
    torch.testing.assert_close(
        found, flat(sum_clipped_gradients(model, objective(), some(), parameters, 0.5, 3)) / 8.0
    )


# --- who is drawn ---------------------------------------------------------------------------------------------------------------------


def cohort(patients: list[str]) -> ScanDataset:
    n = len(patients)
    slices = [np.full((1, 8, 8), i, np.uint8) for i in range(n)]
    return ScanDataset(slices, {"covid": np.arange(n, dtype=float) % 2}, ["north"] * n, patient_ids=patients)


def test_patients_are_drawn_on_their_own_with_all_their_scans() -> None:
    scans = cohort(["a", "b", "a", "c", "a", "d"])
    assert sampling_plan(scans, Stage(batch_size=2)) == (4, 0.5, 2)
    assert sampling_plan(scans, Stage(batch_size=9)) == (4, 1.0, 1)
    steps = list(poisson_batches(scans, {"covid": Task()}, 0.5, 4000, 1))
    of_a = [step["a"] for step in steps if "a" in step]
    assert all(batch.slices[:, 0, 0, 0].tolist() == [0, 2, 4] for batch in of_a)
    sizes = np.bincount([len(step) for step in steps], minlength=5) / 4000
    np.testing.assert_allclose(
        sizes, np.array([1, 4, 6, 4, 1]) / 16, atol=0.03
    )  # binomial: some steps have nobody
    assert [list(s) for s in poisson_batches(scans, {"covid": Task()}, 0.5, 40, 1)] != [
        list(s) for s in poisson_batches(scans, {"covid": Task()}, 0.5, 40, 1)
    ]


# --- in the trainer -------------------------------------------------------------------------------------------------------------------


def test_without_clip_and_noise_it_is_plain_training() -> None:
    """One patient a scan, all of them drawn: the expected number is the batch's own."""
    whole = patient(5, [0, 1, 1, 0], [0, 1, 2, 1])
    each = {str(i): part for i, part in enumerate(whole.split_into(4))}
    silent = DPParams(clip_norm=1e6, noise_multiplier=1.0, expected_patients=4.0, draw_normals=torch.zeros)
    models = [model_of(), model_of()]
    train(models[0], [whole] * 3, STAGE, TASKS, ADJUST, num_steps=3)
    report = train(models[1], [each] * 3, STAGE, TASKS, ADJUST, num_steps=3, dp_params=silent)
    for name, weight in models[0].state_dict().items():
        torch.testing.assert_close(models[1].state_dict()[name], weight, rtol=1e-4, atol=1e-5)
    assert (report.steps, report.scans_seen, report.losses) == (
        3,
        0,
        {"covid": [0.0, 0.0], "source": [0.0, 0.0]},
    )  # these would tell


def test_what_is_frozen_idle_or_absent_gets_no_noise_and_what_moves_all_of_it() -> None:
    tasks = {**TASKS, "source": replace(TASKS["source"], head_update="anchored"), "idle": Task()}
    model = model_of(tasks)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    active = {t: tasks[t] for t in TASKS}
    stage = replace(STAGE, freeze=["encoder.*"])
    train(model, [{}, {}], stage, active, ADJUST, num_steps=2, dp_params=DPParams(1.0, 1.0, 2.0))
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {k for k in before if k.startswith(("heads.covid", "heads.source"))}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    train(
        model,
        [{}],
        replace(STAGE, freeze=["heads.source.*"]),
        active,
        ADJUST,
        num_steps=1,
        dp_params=DPParams(1.0, 1.0, 2.0),
    )
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {k for k in before if not k.startswith(("heads.idle", "heads.source"))}
