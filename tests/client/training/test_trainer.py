"""Local training, compared with loops written out by hand; what has no label does not move."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from client.data.batch import Batch
from client.training.optimiser import make_optimiser, scheduled_learning_rate
from client.training.trainer import TrainSpec, run_inference, train
from common.config.schema import AugmentConfig, BackboneConfig, OptimiserConfig, Stage, Task
from common.modeling.model import Model, make_model
from common.utils.errors import ConsiliumError

NO_AUGMENTATION = AugmentConfig(p_flip=0, p_affine=0, p_brightness=0, p_hsv_value=0, p_cutout=0)
SGD = OptimiserConfig(name="sgd", lr=0.1, momentum=0, weight_decay=0, schedule="constant")
STAGE = Stage(augment=NO_AUGMENTATION, optimiser=SGD, channels_last=False, batch_size=4)
COVID = {"covid": Task()}
BOTH = {"covid": Task(), "source": Task(type="multiclass", classes=["a", "b", "c"], loss_weight=0.5)}
NAN = math.nan


def model_of(tasks: dict[str, Task], norm: str = "group", seed: int = 1) -> Model:
    """Group norm: a scan's output then depends on that scan alone."""
    return make_model(BackboneConfig(norm=norm), tasks, seed)  # type: ignore[arg-type]


def batch_of(targets: dict[str, list[float]], seed: int = 0) -> Batch:
    n = len(next(iter(targets.values())))
    slices = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, 2, 32, 32), dtype=np.uint8))
    return Batch(slices, {t: torch.tensor(y, dtype=torch.float64) for t, y in targets.items()})


def some_batches(count: int) -> list[Batch]:
    return [batch_of({"covid": [0, 1, NAN, 1], "source": [2, 0, 1, NAN]}, seed) for seed in range(count)]


def state(model: nn.Module, start: str = "") -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items() if name.startswith(start)}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def trained(
    tasks: dict[str, Task], batches: list[Batch], stage: Stage = STAGE, norm: str = "group", **more: Any
) -> Model:
    model = model_of(tasks, norm)
    train(model, batches, TrainSpec(stage, tasks, num_steps=len(batches), **more))
    return model


def test_the_same_seed_gives_the_same_bits_whatever_the_global_random_state() -> None:
    tasks = {"covid": Task(dropout=0.5)}
    stage = replace(STAGE, augment=AugmentConfig(), optimiser=OptimiserConfig())
    first = state(trained(tasks, some_batches(3), stage, "batch", seed=5))
    torch.rand(11)
    before = torch.random.get_rng_state()
    assert equal(first, state(trained(tasks, some_batches(3), stage, "batch", seed=5)))
    assert torch.equal(before, torch.random.get_rng_state())
    assert not equal(first, state(trained(tasks, some_batches(3), stage, "batch", seed=6)))
    unaugmented = replace(stage, augment=NO_AUGMENTATION)
    weights = [state(trained(tasks, some_batches(3), unaugmented, seed=seed)) for seed in (5, 6)]
    assert not equal(weights[0], weights[1])  # dropout draws from the seed too


@pytest.mark.parametrize("parts", [2, 3, 4])
def test_accumulation_gives_the_weights_of_the_whole_batch(parts: int) -> None:
    undivided = state(trained(BOTH, some_batches(3)))
    accumulated = state(trained(BOTH, some_batches(3), replace(STAGE, grad_accum_steps=parts)))
    for name in undivided:
        torch.testing.assert_close(accumulated[name], undivided[name], rtol=1e-4, atol=1e-6)


def test_an_unlabelled_row_changes_nothing() -> None:
    labelled = batch_of({"covid": [0, 1, 1]})
    with_unlabelled = batch_of({"covid": [0, 1, 1, NAN]})
    with_unlabelled.slices[:3] = labelled.slices
    expected = state(trained(COVID, [labelled]))
    weights = state(trained(COVID, [with_unlabelled]))
    for name in expected:
        torch.testing.assert_close(weights[name], expected[name], rtol=1e-4, atol=1e-6)


def test_another_tasks_label_does_not_change_a_head() -> None:
    heads = []
    for source in ([0.0, 1, 2, NAN], [0.0, 1, 2, 2], [NAN] * 4):
        model = trained(BOTH, [batch_of({"covid": [0, 1, 1, NAN], "source": source})])
        heads.append(state(model, "heads.covid"))
    assert equal(heads[0], heads[1])
    assert equal(heads[0], heads[2])


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
def test_an_unlabelled_rows_output_never_reaches_the_gradient(value: float) -> None:
    batch = batch_of({"covid": [0, NAN, 1, NAN]})
    expected = state(trained(COVID, [batch]))

    def spoil(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        return torch.where(torch.tensor([[False], [True], [False], [True]]), value, out)

    model = model_of(COVID)
    model.heads["covid"].register_forward_hook(spoil)
    result = train(model, [batch], TrainSpec(STAGE, COVID))
    assert equal(state(model), expected)
    assert math.isfinite(result.losses["covid"][0])


def test_a_batch_without_labels_moves_nothing() -> None:
    model = model_of(COVID)
    before = state(model)
    stage = replace(STAGE, optimiser=OptimiserConfig(), fedprox_mu=0.1)
    result = train(model, [batch_of({"covid": [NAN, NAN]})], TrainSpec(stage, COVID))
    assert equal(before, state(model))
    assert (result.steps, result.scans_seen, result.losses) == (1, 2, {"covid": [0.0, 0.0]})


def test_fedprox_and_prior_match_steps_by_hand() -> None:
    mu = 0.7
    lr = 0.1
    batches = some_batches(3)
    adjustment = torch.tensor([-0.2, -1.5])
    model = model_of(COVID)
    expected = copy.deepcopy(model)
    spec = TrainSpec(replace(STAGE, fedprox_mu=mu), COVID, {"covid": adjustment}, num_steps=3)
    result = train(model, batches, spec)
    received = [p.detach().clone() for p in expected.parameters()]
    loss_sum = 0.0
    for batch in batches:
        y = batch.targets["covid"]
        z = expected(batch.slices / 255)["covid"][:, 0]
        z, y = z[~y.isnan()] + adjustment[1] - adjustment[0], y[~y.isnan()]
        losses = F.softplus(z) - y * z  # binary cross-entropy with logits
        loss_sum += float(losses.sum().detach())
        grads = torch.autograd.grad(losses.mean(), list(expected.parameters()))
        with torch.no_grad():
            for p, g, origin in zip(expected.parameters(), grads, received, strict=True):
                p.sub_(lr * (g + mu * (p - origin)))
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6, msg=name)
    assert result.losses["covid"] == [pytest.approx(loss_sum, rel=1e-4), 9]
    assert (result.steps, result.scans_seen) == (3, 12)


def test_the_learning_rate_follows_the_stage() -> None:
    cosine, constant = OptimiserConfig(lr=0.2), OptimiserConfig(lr=0.2, schedule="constant")
    assert [scheduled_learning_rate(cosine, x) for x in (0, 0.5, 1)] == pytest.approx([0.2, 0.1, 0.0])
    assert scheduled_learning_rate(cosine, 0.25) == pytest.approx(0.1 * (1 + math.sqrt(0.5)))
    assert {scheduled_learning_rate(constant, x) for x in (0, 0.3, 1)} == {0.2}


def test_step_length_follows_schedule_and_gradient_clipping() -> None:
    """A clipped step of SGD is lr * max_grad_norm long; heads step `head_lr_scale` times as far."""
    model = model_of(COVID)
    seen: list[dict[str, Tensor]] = []

    def recorded() -> Iterator[Batch]:
        for batch in some_batches(4):
            seen.append(state(model))
            yield batch

    stage = replace(STAGE, optimiser=replace(SGD, lr=10.0, schedule="cosine", max_grad_norm=1e-3))
    train(model, recorded(), TrainSpec(stage, COVID, stage_progress=(0.25, 0.75), num_steps=4))
    seen.append(state(model))
    pairs = pairwise(seen)
    lengths = [
        math.sqrt(sum(float((b[k].double() - a[k].double()).square().sum()) for k in a)) for a, b in pairs
    ]
    expected = [10.0 * 1e-3 * 0.5 * (1 + math.cos(math.pi * (0.25 + 0.5 * step / 4))) for step in range(4)]
    assert lengths == pytest.approx(expected, rel=1e-3)

    moves = {}
    for head_lr in (1.0, 3.0):
        stage = replace(STAGE, optimiser=replace(SGD, head_lr_scale=head_lr))
        start, after = state(model_of(COVID)), state(trained(COVID, some_batches(1), stage))
        moves[head_lr] = {k: after[k] - start[k] for k in after}
    torch.testing.assert_close(
        moves[3.0]["heads.covid.1.weight"], 3 * moves[1.0]["heads.covid.1.weight"], rtol=1e-3, atol=1e-7
    )
    assert torch.equal(moves[3.0]["encoder.conv1.0.weight"], moves[1.0]["encoder.conv1.0.weight"])


def test_a_loss_that_is_not_finite_is_refused() -> None:
    model = model_of(COVID)
    with torch.no_grad():
        model.heads["covid"][1].bias.fill_(NAN)  # type: ignore[index, union-attr]
    with pytest.raises(
        ConsiliumError,
        match=r"^the loss became nan at step 0; lower stage\.optimiser\.lr or set stage\.precision=fp32$",
    ):
        train(model, some_batches(1), TrainSpec(STAGE, COVID))


def test_inference_keeps_the_order_and_does_not_change_the_model() -> None:
    model = model_of({"covid": Task(dropout=0.5)}, "batch")
    before = state(model)
    scans = batch_of({"covid": [0] * 5}).slices
    outputs = run_inference(model, scans.split(2), lambda m, x: m(x))["covid"]
    with torch.no_grad():
        torch.testing.assert_close(outputs, model.eval()(scans / 255)["covid"], rtol=1e-4, atol=1e-5)
    assert equal(before, state(model))


def test_the_decoder_learns_at_the_heads_learning_rate() -> None:
    """Both are random where the encoder may come from ImageNet."""
    model = make_model(BackboneConfig(), {"lesion": Task(type="segmentation")}, 1)
    optimiser = make_optimiser(list(model.named_parameters()), OptimiserConfig(lr=0.1, head_lr_scale=10.0))
    rates = {id(p): group["lr"] for group in optimiser.param_groups for p in group["params"]}
    assert {name.partition(".")[0]: rates[id(p)] for name, p in model.named_parameters()} == pytest.approx(
        {"encoder": 0.1, "decoder": 1.0, "heads": 1.0}
    )
