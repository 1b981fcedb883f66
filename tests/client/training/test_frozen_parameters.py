"""Parameters that local training does not move freely: frozen ones, other tasks' heads, anchored heads."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from client.data.batch import Batch
from client.training.trainer import TrainSpec, train
from common.config.schema import OptimiserConfig
from common.learning.losses import compute_stage_loss
from tests.client.training.test_trainer import (
    BOTH,
    COVID,
    STAGE,
    equal,
    model_of,
    some_batches,
    state,
    trained,
)


def test_an_anchored_head_moves_once_by_the_sum_of_its_gradients() -> None:
    tasks = {**BOTH, "source": replace(BOTH["source"], head_update="anchored", server_head_lr=0.3)}
    batches = some_batches(3)
    model = model_of(tasks)
    expected = copy.deepcopy(model)
    heads: list[dict[str, Tensor]] = []

    def recorded() -> Iterator[Batch]:
        for batch in batches:
            heads.append(state(model, "heads.source"))
            yield batch

    start = state(model, "heads.source")
    train(model, recorded(), TrainSpec(STAGE, tasks, num_steps=3))
    assert all(equal(start, head) for head in heads)  # never during the local steps

    head = list(expected.heads["source"].parameters())
    rest = [p for p in expected.parameters() if not any(p is h for h in head)]
    total = [torch.zeros_like(h) for h in head]
    for batch in batches:
        loss = compute_stage_loss(tasks, expected(batch.slices / 255), batch.targets, {}).total
        grads = torch.autograd.grad(loss, [*rest, *head])
        with torch.no_grad():
            for p, g in zip(rest, grads, strict=False):
                p.sub_(0.1 * g)
            for t, g in zip(total, grads[len(rest) :], strict=True):
                t.add_(g)
    with torch.no_grad():
        for h, t in zip(head, total, strict=True):
            h.sub_(0.3 * t)
    assert float(torch.cat([t.flatten() for t in total]).norm()) > 1e-3
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd"])
def test_a_head_fitted_by_the_server_does_not_move_in_local_training(name: str) -> None:
    tasks = {**BOTH, "source": replace(BOTH["source"], head_update="moments")}
    model = model_of(tasks)
    before = state(model)
    head_before = state(model, "heads.source")
    stage = replace(STAGE, optimiser=OptimiserConfig(name=name), fedprox_mu=0.1)  # type: ignore[arg-type]
    train(model, some_batches(2), TrainSpec(stage, tasks, num_steps=2))
    after = state(model)
    assert equal(state(model, "heads.source"), head_before)
    assert not torch.equal(after["encoder.conv1.0.weight"], before["encoder.conv1.0.weight"])


def test_a_stage_can_train_an_anchored_head_alone() -> None:
    tasks = {"source": replace(BOTH["source"], head_update="anchored")}
    model = model_of(tasks, "batch")
    before = state(model)
    stage = replace(STAGE, freeze=["encoder.*"])
    train(model, some_batches(2), TrainSpec(stage, tasks, num_steps=2))
    moved = {name for name, t in state(model).items() if not torch.equal(t, before[name])}
    assert moved == {"heads.source.1.weight", "heads.source.1.bias"}


def test_frozen_parameters_and_their_statistics_do_not_move() -> None:
    model = model_of(BOTH, "batch")
    before = state(model)
    stage = replace(STAGE, optimiser=OptimiserConfig(), freeze=["encoder.layer*", "heads.source.*"])
    train(model, some_batches(2), TrainSpec(stage, BOTH, num_steps=2))
    moved = {name for name, t in state(model).items() if not torch.equal(t, before[name])}
    assert not [name for name in moved if name.startswith(("encoder.layer", "heads.source"))]
    assert {"encoder.conv1.0.weight", "encoder.conv1.1.running_mean", "heads.covid.1.weight"} <= moved


def test_the_head_of_a_task_outside_the_stage_does_not_move() -> None:
    model = model_of(BOTH)
    before = state(model, "heads.source")
    stage = replace(STAGE, optimiser=OptimiserConfig(weight_decay=0.5))
    train(model, some_batches(2), TrainSpec(stage, COVID, num_steps=2))
    assert equal(before, state(model, "heads.source"))


def test_a_later_stage_unfreezes_what_an_earlier_one_froze() -> None:
    model = model_of(COVID)
    train(model, some_batches(1), TrainSpec(replace(STAGE, freeze=["encoder.*"]), COVID))
    before = state(model)
    train(model, some_batches(1), TrainSpec(STAGE, COVID))
    assert not torch.equal(before["encoder.conv1.0.weight"], model.state_dict()["encoder.conv1.0.weight"])


def test_a_negative_grad_scale_reverses_the_backbones_gradient_and_not_the_heads() -> None:
    moves = {}
    for scale in (1.0, -1.0):
        tasks = {"source": replace(BOTH["source"], grad_scale=scale)}
        start = state(model_of(tasks))
        after = state(trained(tasks, some_batches(1)))
        moves[scale] = {name: after[name] - start[name] for name in after}
    for name, move in moves[1.0].items():
        sign = 1 if name.startswith("heads.") else -1
        torch.testing.assert_close(moves[-1.0][name], sign * move, rtol=1e-3, atol=1e-6)
    assert float(moves[1.0]["encoder.conv1.0.weight"].abs().max()) > 1e-5
