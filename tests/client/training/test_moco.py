"""Momentum contrast, compared with the paper's equations written out, and its behaviour on a small cohort."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor

from client.data.batch import Batch
from client.data.dataset import ScanDataset, iterate_batches
from client.training.moco import MocoObjective, info_nce
from client.training.trainer import TrainSpec, train
from common.config.schema import (
    AugmentConfig,
    BackboneConfig,
    ContrastiveConfig,
    OptimiserConfig,
    Stage,
    Task,
)
from common.modeling.model import Model, make_model

BATCH, QUEUE = 6, 9


def task(**more: object) -> Task:
    settings = ContrastiveConfig(projection_dim=8, queue_size=QUEUE, **more)  # type: ignore[arg-type]
    return Task(type="contrastive", hidden_dims=[16], contrastive=settings)


def unit(rng: np.random.Generator, n: int, width: int = 8) -> np.ndarray:
    x = rng.normal(size=(n, width))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def reference(
    query: np.ndarray,
    key: np.ndarray,
    rows: np.ndarray,
    queue: np.ndarray,
    queue_rows: np.ndarray,
    temperature: float,
) -> list[float]:
    """Compute He et al., eq. 1, one scan at a time: the positive against the keys of every other scan."""
    losses = []
    for i, q in enumerate(query):
        positive = q @ key[i] / temperature
        logits = [positive]
        for k, row in zip([*key, *queue], [*rows, *queue_rows], strict=True):
            if row != rows[i]:
                logits.append(q @ k / temperature)
        losses.append(float(np.log(np.exp(logits).sum()) - positive))
    return losses


@pytest.mark.parametrize("seed", range(4))
def test_the_loss_matches_the_paper_and_a_scan_is_never_its_own_negative(seed: int) -> None:
    rng = np.random.default_rng(seed)
    query, key, queue = unit(rng, BATCH), unit(rng, BATCH), unit(rng, QUEUE)
    rows = rng.integers(0, 5, BATCH)  # scans occur twice, in the batch and in the queue
    queue_rows = rng.integers(0, 7, QUEUE)
    tensors = [torch.from_numpy(a) for a in (query, key, rows, queue, queue_rows)]
    expected = reference(query, key, rows, queue, queue_rows, 0.2)
    np.testing.assert_allclose(info_nce(*tensors, 0.2).numpy(), expected, rtol=1e-9)
    same_rows = torch.zeros(BATCH, dtype=torch.long)
    losses = info_nce(*tensors[:2], same_rows, tensors[3][:0], tensors[4][:0], 0.2)
    assert losses.tolist() == pytest.approx([0] * BATCH)  # a single scan has no negatives


def pictures(seed: int = 0, n: int = BATCH) -> Tensor:
    return torch.randint(
        0, 256, (n, 1, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )


def moco(model: Model, seed: int = 1, **more: object) -> MocoObjective:
    return MocoObjective(
        Stage(augment=AugmentConfig()), {"moco": task(**more)}, {}, torch.device("cpu"), seed, model
    )


@pytest.fixture
def model() -> Model:
    return make_model(BackboneConfig(), {"moco": task()}, 2).train()


def step(objective: MocoObjective, model: Model, rows: list[int], seed: int = 0) -> float:
    batch = Batch(pictures(seed, len(rows)), {"moco": torch.zeros(len(rows))}, torch.tensor(rows))
    return float(objective.compute_loss(model, batch, {"moco": len(rows)}).total.detach())


def test_the_key_encoder_follows_by_momentum_and_has_no_gradient(model: Model) -> None:
    objective = moco(model, momentum=0.9)
    before = copy.deepcopy(dict(objective.key_encoder.named_parameters()))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    loss = objective.compute_loss(
        model, Batch(pictures(), {"moco": torch.zeros(BATCH)}, torch.arange(BATCH)), {"moco": BATCH}
    ).total
    loss.backward()  # type: ignore[no-untyped-call]
    for name, key in objective.key_encoder.named_parameters():
        assert key.grad is None
        torch.testing.assert_close(key, before[name])  # only `after_step` moves them
    objective.after_step(model)
    for name, query in model.named_parameters():
        torch.testing.assert_close(
            dict(objective.key_encoder.named_parameters())[name], 0.9 * before[name] + 0.1 * query
        )


def test_the_queue_is_used_is_limited_and_holds_a_scan_once(model: Model) -> None:
    objective = moco(model)
    first = step(objective, model, [0, 1, 2, 3])
    assert objective.queue_rows.tolist() == [0, 1, 2, 3]
    with_queue = step(objective, model, [4, 5, 6, 7], 1)
    assert with_queue > step(moco(model), model, [4, 5, 6, 7], 1)  # more negatives
    assert first == pytest.approx(step(moco(model), model, [0, 1, 2, 3]))
    assert objective.queue_rows.tolist() == [4, 5, 6, 7, 0, 1, 2, 3]
    newest = objective.queue[0].clone()
    step(objective, model, [8, 4, 1], 2)
    assert objective.queue_rows.tolist() == [8, 4, 1, 5, 6, 7, 0, 2, 3]  # 4 and 1 have their newer keys
    assert not torch.equal(objective.queue[1], newest)
    step(objective, model, [20, 21, 22, 23], 3)
    assert objective.queue_rows.tolist() == [20, 21, 22, 23, 8, 4, 1, 5, 6]
    assert len(objective.queue) == QUEUE
    torch.testing.assert_close(objective.queue.norm(dim=1), torch.ones(QUEUE))


def test_the_seed_decides_the_views_and_two_views_of_a_scan_differ(model: Model) -> None:
    losses = [step(moco(copy.deepcopy(model), seed), model, list(range(BATCH))) for seed in (1, 1, 2)]
    assert losses[0] == losses[1] != losses[2]
    objective = moco(model)
    part = Batch(pictures(), {"moco": torch.zeros(BATCH)})
    assert not torch.equal(objective.augment_batch(part)[0], objective.augment_batch(part)[0])


def test_a_few_scans_are_learned_beside_another_task() -> None:
    """The loss falls well below that of a guess; a task beside it counts the rows that have its label."""
    tasks = {"moco": task(momentum=0.5), "covid": Task()}
    model = make_model(BackboneConfig(), tasks, 1)
    slices = [s.numpy() for s in pictures(5, 8)]
    scans = ScanDataset(
        slices, {"moco": np.zeros(8), "covid": np.array([0, 1, np.nan, np.nan, 0, 1, np.nan, 0])}, ["a"] * 8
    )
    gentle = AugmentConfig(
        p_affine=0, p_flip=0, p_cutout=0, brightness=0.05, contrast=0.05, hsv_value_shift=0.02
    )
    stage = Stage(
        batch_size=8,
        optimiser=OptimiserConfig(lr=3e-3, schedule="constant"),
        augment=gentle,
        channels_last=False,
    )
    results = []
    for seed in range(4):
        batches = iterate_batches(scans, tasks, stage, 8, seed)
        results.append(train(model, batches, TrainSpec(stage, tasks, num_steps=8, seed=seed)))
    losses = [r.losses["moco"][0] / r.losses["moco"][1] for r in results]
    assert losses[-1] < 0.6 * losses[0]
    assert [r.losses["covid"][1] for r in results] == [8 * 5] * 4
    assert [r.losses["moco"][1] for r in results] == [8 * 8] * 4
