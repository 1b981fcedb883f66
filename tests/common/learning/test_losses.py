"""Losses: missing labels, priors, and the published formula."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config.schema import ContrastiveConfig, Task
from common.learning.losses import (
    IGNORE_INDEX,
    class_names,
    compute_loss_sum,
    compute_stage_loss,
    output_dim,
    task_label_columns,
)

TASKS = {"covid": Task(), "source": Task(type="multiclass", classes=["a", "b", "c"], loss_weight=0.5)}
NAN = float("nan")


def batch(seed: int, n: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    g = torch.Generator().manual_seed(seed)
    outputs = {"covid": torch.randn(n, 1, generator=g), "source": torch.randn(n, 3, generator=g)}
    targets = {
        "covid": torch.randint(0, 2, (n,), generator=g).double(),
        "source": torch.randint(0, 3, (n,), generator=g).double(),
    }
    return outputs, targets


@given(st.integers(0, 1000), st.integers(1, 8), st.integers(0, 8))
def test_missing_labels_change_nothing(seed: int, n: int, extra: int) -> None:
    outputs, targets = batch(seed, n)
    more = {t: torch.cat([z, torch.full((extra, z.shape[1]), float("inf"))]) for t, z in outputs.items()}
    none = {t: torch.cat([y, torch.full((extra,), NAN, dtype=torch.float64)]) for t, y in targets.items()}
    alone, padded = compute_stage_loss(TASKS, outputs, targets, {}), compute_stage_loss(TASKS, more, none, {})
    assert torch.equal(alone.total, padded.total)
    assert alone.sums_by_task == padded.sums_by_task


def test_infinite_output_of_an_unlabelled_row_has_no_gradient() -> None:
    z = torch.tensor([[0.3], [float("inf")]], requires_grad=True)
    loss = compute_stage_loss({"covid": Task()}, {"covid": z}, {"covid": torch.tensor([1.0, NAN])}, {})
    loss.total.backward()  # type: ignore[no-untyped-call]
    assert z.grad is not None
    assert z.grad[1].item() == 0.0
    assert torch.isfinite(z.grad).all()


def test_formula_with_priors() -> None:
    """BCE + gamma CE(z + tau log pi): arXiv 2604.03320, eq. of the total loss; the binary prior is the difference of its two classes'."""
    outputs, targets = batch(3, 6)
    targets["source"][2] = NAN
    pi = torch.tensor([0.7, 0.2, 0.1]).log()
    pb = torch.tensor([0.8, 0.2]).log()
    loss = compute_stage_loss(TASKS, outputs, targets, {"source": pi, "covid": pb})
    rows = [0, 1, 3, 4, 5]
    expected = F.binary_cross_entropy_with_logits(
        outputs["covid"][:, 0] + pb[1] - pb[0], targets["covid"].float()
    )
    expected = expected + 0.5 * F.cross_entropy(outputs["source"][rows] + pi, targets["source"][rows].long())
    torch.testing.assert_close(loss.total, expected)


def test_binary_equals_two_class_softmax() -> None:
    """A sigmoid on z with the priors' difference is a softmax on (0, z) with the priors themselves."""
    z, y, prior = torch.tensor([[0.4], [-1.2]]), torch.tensor([1.0, 0.0]), torch.tensor([0.9, 0.1]).log()
    one = compute_stage_loss({"t": Task()}, {"t": z}, {"t": y}, {"t": prior}).total
    two = F.cross_entropy(torch.cat([torch.zeros(2, 1), z], 1) + prior, y.long())
    torch.testing.assert_close(one, two)


@given(st.integers(0, 100), st.integers(2, 9), st.integers(2, 4))
def test_parts_of_a_batch_add_up(seed: int, n: int, parts: int) -> None:
    outputs, targets = batch(seed, n)
    targets["source"][0] = NAN
    labelled = {t: int(torch.isfinite(y).sum()) for t, y in targets.items()}
    whole = compute_stage_loss(TASKS, outputs, targets, {}).total
    pieces = [torch.arange(n)[i::parts] for i in range(parts)]
    split = [
        compute_stage_loss(
            TASKS, {t: z[i] for t, z in outputs.items()}, {t: y[i] for t, y in targets.items()}, {}, labelled
        ).total
        for i in pieces
    ]
    np.testing.assert_allclose(sum(float(s) for s in split), float(whole), rtol=1e-5)


def test_a_batch_without_labels_has_no_loss() -> None:
    outputs, _ = batch(1, 2)
    nothing = {t: torch.tensor([NAN, NAN]) for t in outputs}
    assert float(compute_stage_loss(TASKS, outputs, nothing, {}).total) == 0.0


# --- every kind of task against a loop over its definition -----------------------------------------------------------------------------

KINDS = {
    "binary": Task(),
    "multiclass": Task(type="multiclass", classes=["a", "b", "c"]),
    "regression": Task(type="regression", label_columns=["x", "y"]),
    "segmentation": Task(type="segmentation", dice_weight=0.6),
    "inpainting": Task(type="inpainting"),
}
PIXELS = (2, 3, 4)


def sample(kind: str, seed: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs and targets of `n` labelled rows."""
    g = torch.Generator().manual_seed(seed)
    if kind == "regression":
        return 2 * torch.randn(n, 2, generator=g), 3 * torch.rand(n, 2, generator=g, dtype=torch.float64)
    if kind in ("segmentation", "inpainting"):
        z = 2 * torch.randn(n, *PIXELS, generator=g)
        if kind == "inpainting":
            y = torch.rand(n, *PIXELS, generator=g)
            y.view(n, -1)[:, 1:][torch.rand(n, 23, generator=g) < 0.5] = NAN  # not painted over
            return z, y
        mask = torch.randint(0, 2, (n, *PIXELS), generator=g).to(torch.uint8)
        mask.view(n, -1)[:, 1:][torch.rand(n, 23, generator=g) < 0.2] = IGNORE_INDEX
        mask[: n // 3][mask[: n // 3] == 1] = 0  # some scans are healthy
        return z, mask
    outputs, targets = batch(seed, n)
    return (
        (outputs["covid"], targets["covid"]) if kind == "binary" else (outputs["source"], targets["source"])
    )


def sigmoid(z: float) -> float:
    return 1 / (1 + math.exp(-z))


def of_one(kind: str, task: Task, z: list[float], y: list[float]) -> float:
    """The loss of one row, from its numbers."""
    if kind == "binary":
        return -math.log(sigmoid(z[0]) if y[0] else 1 - sigmoid(z[0]))
    if kind == "multiclass":
        return math.log(sum(map(math.exp, z))) - z[int(y[0])]
    if kind == "regression":
        return sum(
            0.5 * (a - b) ** 2 if abs(a - b) < 1 else abs(a - b) - 0.5 for a, b in zip(z, y, strict=True)
        ) / len(z)
    if kind == "inpainting":
        pairs = [(a, b) for a, b in zip(z, y, strict=True) if not math.isnan(b)]
        return sum(abs(sigmoid(a) - b) for a, b in pairs) / len(pairs)
    pairs = [(sigmoid(a), b) for a, b in zip(z, y, strict=True) if b != IGNORE_INDEX]
    cross = -sum(math.log(p if b else 1 - p) for p, b in pairs) / len(pairs)
    both, predicted, true = sum(p * b for p, b in pairs), sum(p for p, _ in pairs), sum(b for _, b in pairs)
    return cross + task.dice_weight * (1 - (2 * both + 1) / (predicted + true + 1))


@pytest.mark.parametrize("kind", list(KINDS))
@settings(max_examples=50)
@given(
    seed=st.integers(0, 500),
    n=st.integers(1, 7),
    extra=st.integers(0, 4),
    order=st.randoms(use_true_random=False),
)
def test_the_loss_is_its_definition_and_missing_rows_change_nothing(
    kind: str, seed: int, n: int, extra: int, order: random.Random
) -> None:
    task = KINDS[kind]
    z, y = sample(kind, seed, n)
    rows = list(range(n))
    if kind != "inpainting":  # every scan is its own label
        none = torch.full(
            (extra, *y.shape[1:]), IGNORE_INDEX if kind == "segmentation" else NAN, dtype=y.dtype
        )
        if kind == "regression" and extra:
            none[:, 0] = 1.0  # one of its numbers is missing
        z, y = torch.cat([z, torch.full((extra, *z.shape[1:]), float("inf"))]), torch.cat([y, none])
        rows += range(n, n + extra)
        order.shuffle(rows)
    z, y = z[rows].requires_grad_(), y[rows]
    summed, count = compute_loss_sum(task, z, y)
    summed.backward()  # type: ignore[no-untyped-call]
    expected = [
        of_one(kind, task, *(a.detach().double().reshape(-1).tolist() for a in (z[i], y[i])))
        for i, r in enumerate(rows)
        if r < n
    ]
    assert count == n
    assert float(summed.detach()) == pytest.approx(sum(expected), rel=1e-4, abs=1e-5)
    assert z.grad is not None
    assert torch.isfinite(z.grad).all()
    for i, r in enumerate(rows):
        assert bool((z.grad[i] != 0).any()) == (r < n)


def test_a_regression_of_one_column_takes_either_shape() -> None:
    z, y = torch.tensor([[0.5], [3.0], [9.0]]), torch.tensor([0.0, 1.0, NAN])
    task = Task(type="regression")
    assert [float(compute_loss_sum(task, z, target)[0]) for target in (y, y[:, None])] == [
        pytest.approx(0.125 + 1.5)
    ] * 2


def test_an_empty_mask_well_met_costs_nothing_and_without_dice_it_is_cross_entropy() -> None:
    healthy = torch.zeros(1, *PIXELS, dtype=torch.uint8)
    assert float(
        compute_loss_sum(KINDS["segmentation"], torch.full((1, *PIXELS), -30.0), healthy)[0]
    ) == pytest.approx(0, abs=1e-6)
    z, mask = sample("segmentation", 3, 4)
    mask[mask == IGNORE_INDEX] = 0
    plain = sum(F.binary_cross_entropy_with_logits(a, b.float()) for a, b in zip(z, mask, strict=True))
    torch.testing.assert_close(
        compute_loss_sum(Task(type="segmentation", dice_weight=0.0), z, mask)[0], plain
    )


@pytest.mark.parametrize(
    ("task", "outputs", "cells", "columns"),
    [
        (Task(), 1, ["no t", "t"], ["t"]),
        (Task(label_column="l"), 1, ["no t", "t"], ["l"]),
        (KINDS["multiclass"], 3, ["a", "b", "c"], ["t"]),
        (
            Task(type="multiclass", label_columns=["x", "y"], bin_edges=[1, 2], classes=["a", "b", "c"]),
            3,
            ["a", "b", "c"],
            ["x", "y"],
        ),
        (Task(type="multiclass", label_column="l", num_clusters=[2], classes=["0", "1"]), 2, ["0", "1"], []),
        (KINDS["regression"], 2, ["labelled"], ["x", "y"]),
        (Task(type="regression"), 1, ["labelled"], ["t"]),
        (KINDS["segmentation"], 1, ["labelled"], ["t"]),
        (KINDS["inpainting"], 1, ["labelled"], []),
        (Task(type="contrastive", contrastive=ContrastiveConfig(projection_dim=7)), 7, ["labelled"], []),
    ],
)
def test_widths_cells_and_columns(task: Task, outputs: int, cells: list[str], columns: list[str]) -> None:
    assert (output_dim(task), class_names("t", task), task_label_columns("t", task)) == (
        outputs,
        cells,
        columns,
    )
