"""Losses: missing labels, priors, and the published formulas."""

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


def make_batch(seed: int, size: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Return outputs and targets of TASKS."""
    generator = torch.Generator().manual_seed(seed)
    outputs = {
        "covid": torch.randn(size, 1, generator=generator),
        "source": torch.randn(size, 3, generator=generator),
    }
    targets = {
        "covid": torch.randint(0, 2, (size,), generator=generator).double(),
        "source": torch.randint(0, 3, (size,), generator=generator).double(),
    }
    return outputs, targets


@given(st.integers(0, 1000), st.integers(1, 8), st.integers(0, 8))
def test_rows_without_labels_do_not_change_the_loss(seed: int, size: int, num_extra: int) -> None:
    outputs, targets = make_batch(seed, size)
    padded_outputs = {}
    padded_targets = {}
    for name in TASKS:
        infinite = torch.full((num_extra, outputs[name].shape[1]), float("inf"))
        missing = torch.full((num_extra,), NAN, dtype=torch.float64)
        padded_outputs[name] = torch.cat([outputs[name], infinite])
        padded_targets[name] = torch.cat([targets[name], missing])
    expected = compute_stage_loss(TASKS, outputs, targets, {})
    padded = compute_stage_loss(TASKS, padded_outputs, padded_targets, {})
    assert torch.equal(expected.total, padded.total)
    assert expected.sums_by_task == padded.sums_by_task


def test_infinite_output_of_an_unlabelled_row_has_no_gradient() -> None:
    logits = torch.tensor([[0.3], [float("inf")]], requires_grad=True)
    loss = compute_stage_loss({"covid": Task()}, {"covid": logits}, {"covid": torch.tensor([1.0, NAN])}, {})
    loss.total.backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert logits.grad[1].item() == 0.0
    assert torch.isfinite(logits.grad).all()


def test_loss_with_priors_equals_the_formula() -> None:
    """BCE + gamma CE(z + tau log pi): the total loss of arXiv 2604.03320, with a binary prior as well."""
    outputs, targets = make_batch(3, 6)
    targets["source"][2] = NAN
    source_prior = torch.tensor([0.7, 0.2, 0.1]).log()
    covid_prior = torch.tensor([0.8, 0.2]).log()
    loss = compute_stage_loss(TASKS, outputs, targets, {"source": source_prior, "covid": covid_prior})
    labelled = [0, 1, 3, 4, 5]
    covid_logits = outputs["covid"][:, 0] + covid_prior[1] - covid_prior[0]
    covid_loss = F.binary_cross_entropy_with_logits(covid_logits, targets["covid"].float())
    source_logits = outputs["source"][labelled] + source_prior
    source_loss = F.cross_entropy(source_logits, targets["source"][labelled].long())
    torch.testing.assert_close(loss.total, covid_loss + 0.5 * source_loss)


def test_binary_loss_equals_a_softmax_over_two_classes() -> None:
    """A sigmoid of z plus the priors' difference is a softmax of (0, z) plus the priors."""
    logits = torch.tensor([[0.4], [-1.2]])
    labels = torch.tensor([1.0, 0.0])
    prior = torch.tensor([0.9, 0.1]).log()
    binary = compute_stage_loss({"t": Task()}, {"t": logits}, {"t": labels}, {"t": prior}).total
    softmax = F.cross_entropy(torch.cat([torch.zeros(2, 1), logits], 1) + prior, labels.long())
    torch.testing.assert_close(binary, softmax)


@given(st.integers(0, 100), st.integers(2, 9), st.integers(2, 4))
def test_losses_of_the_parts_of_a_batch_add_up(seed: int, size: int, num_parts: int) -> None:
    outputs, targets = make_batch(seed, size)
    targets["source"][0] = NAN
    labelled_counts = {name: int(torch.isfinite(target).sum()) for name, target in targets.items()}
    expected = compute_stage_loss(TASKS, outputs, targets, {}).total
    total = 0.0
    for part in range(num_parts):
        rows = torch.arange(size)[part::num_parts]
        part_outputs = {name: output[rows] for name, output in outputs.items()}
        part_targets = {name: target[rows] for name, target in targets.items()}
        total += float(compute_stage_loss(TASKS, part_outputs, part_targets, {}, labelled_counts).total)
    np.testing.assert_allclose(total, float(expected), rtol=1e-5)


def test_batch_without_labels_has_no_loss() -> None:
    outputs, _ = make_batch(1, 2)
    missing = {name: torch.tensor([NAN, NAN]) for name in outputs}
    assert float(compute_stage_loss(TASKS, outputs, missing, {}).total) == 0.0


# --- every type of task against a loop over its definition ------------------------------------------------

TASK_BY_TYPE = {
    "binary": Task(),
    "multiclass": Task(type="multiclass", classes=["a", "b", "c"]),
    "regression": Task(type="regression", label_columns=["x", "y"]),
    "segmentation": Task(type="segmentation", dice_weight=0.6),
    "inpainting": Task(type="inpainting"),
}
PIXELS = (2, 3, 4)


def make_labelled_rows(task_type: str, seed: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return outputs and targets of rows that all have labels."""
    generator = torch.Generator().manual_seed(seed)
    if task_type == "regression":
        predicted = 2 * torch.randn(size, 2, generator=generator)
        return predicted, 3 * torch.rand(size, 2, generator=generator, dtype=torch.float64)
    if task_type == "inpainting":
        logits = 2 * torch.randn(size, *PIXELS, generator=generator)
        intensity = torch.rand(size, *PIXELS, generator=generator)
        not_masked = torch.rand(size, 23, generator=generator) < 0.5
        intensity.view(size, -1)[:, 1:][not_masked] = NAN
        return logits, intensity
    if task_type == "segmentation":
        logits = 2 * torch.randn(size, *PIXELS, generator=generator)
        mask = torch.randint(0, 2, (size, *PIXELS), generator=generator).to(torch.uint8)
        unknown = torch.rand(size, 23, generator=generator) < 0.2
        mask.view(size, -1)[:, 1:][unknown] = IGNORE_INDEX
        healthy_scans = mask[: size // 3]
        healthy_scans[healthy_scans == 1] = 0
        return logits, mask
    outputs, targets = make_batch(seed, size)
    name = "covid" if task_type == "binary" else "source"
    return outputs[name], targets[name]


def sigmoid(logit: float) -> float:
    return 1 / (1 + math.exp(-logit))


def smooth_l1(error: float) -> float:
    return 0.5 * error**2 if abs(error) < 1 else abs(error) - 0.5


def compute_row_loss(task_type: str, task: Task, output: list[float], target: list[float]) -> float:
    """Return the loss of one row, computed with plain numbers."""
    if task_type == "binary":
        probability = sigmoid(output[0])
        return -math.log(probability if target[0] else 1 - probability)
    if task_type == "multiclass":
        return math.log(sum(map(math.exp, output))) - output[int(target[0])]
    if task_type == "regression":
        return sum(smooth_l1(p - y) for p, y in zip(output, target, strict=True)) / len(output)
    if task_type == "inpainting":
        errors = [abs(sigmoid(z) - y) for z, y in zip(output, target, strict=True) if not math.isnan(y)]
        return sum(errors) / len(errors)
    pixels = [(sigmoid(z), y) for z, y in zip(output, target, strict=True) if y != IGNORE_INDEX]
    cross_entropy = -sum(math.log(p if y else 1 - p) for p, y in pixels) / len(pixels)
    intersection = sum(p * y for p, y in pixels)
    total = sum(p for p, _ in pixels) + sum(y for _, y in pixels)
    return cross_entropy + task.dice_weight * (1 - (2 * intersection + 1) / (total + 1))


def make_missing_labels(task_type: str, num_rows: int, labels: torch.Tensor) -> torch.Tensor:
    """Return labels of rows whose label is missing."""
    missing_value = IGNORE_INDEX if task_type == "segmentation" else NAN
    missing = torch.full((num_rows, *labels.shape[1:]), missing_value, dtype=labels.dtype)
    if task_type == "regression":
        missing[:, 0] = 1.0  # a label is missing when one of its numbers is
    return missing


@pytest.mark.parametrize("task_type", list(TASK_BY_TYPE))
@settings(max_examples=50)
@given(
    seed=st.integers(0, 500),
    size=st.integers(1, 7),
    num_extra=st.integers(0, 4),
    order=st.randoms(use_true_random=False),
)
def test_loss_equals_its_definition_without_the_unlabelled_rows(
    task_type: str, seed: int, size: int, num_extra: int, order: random.Random
) -> None:
    task = TASK_BY_TYPE[task_type]
    outputs, targets = make_labelled_rows(task_type, seed, size)
    rows = list(range(size))
    if task_type != "inpainting":  # whose labels are never missing
        infinite = torch.full((num_extra, *outputs.shape[1:]), float("inf"))
        outputs = torch.cat([outputs, infinite])
        targets = torch.cat([targets, make_missing_labels(task_type, num_extra, targets)])
        rows += range(size, size + num_extra)
        order.shuffle(rows)
    outputs = outputs[rows].requires_grad_()
    targets = targets[rows]
    loss_sum, num_labelled = compute_loss_sum(task, outputs, targets)
    loss_sum.backward()  # type: ignore[no-untyped-call]

    expected = 0.0
    for position, row in enumerate(rows):
        if row < size:
            output = outputs[position].detach().double().reshape(-1).tolist()
            target = targets[position].double().reshape(-1).tolist()
            expected += compute_row_loss(task_type, task, output, target)
    assert num_labelled == size
    assert float(loss_sum.detach()) == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert outputs.grad is not None
    assert torch.isfinite(outputs.grad).all()
    for position, row in enumerate(rows):
        assert bool((outputs.grad[position] != 0).any()) == (row < size)


def test_regression_labels_of_one_column_may_have_one_or_two_dimensions() -> None:
    predicted = torch.tensor([[0.5], [3.0], [9.0]])
    labels = torch.tensor([0.0, 1.0, NAN])
    for target in (labels, labels[:, None]):
        loss_sum, _ = compute_loss_sum(Task(type="regression"), predicted, target)
        assert float(loss_sum) == pytest.approx(0.125 + 1.5)


def test_correctly_predicted_empty_mask_has_no_loss() -> None:
    empty_mask = torch.zeros(1, *PIXELS, dtype=torch.uint8)
    loss_sum, _ = compute_loss_sum(TASK_BY_TYPE["segmentation"], torch.full((1, *PIXELS), -30.0), empty_mask)
    assert float(loss_sum) == pytest.approx(0, abs=1e-6)


def test_segmentation_loss_without_dice_is_cross_entropy() -> None:
    logits, mask = make_labelled_rows("segmentation", 3, 4)
    mask[mask == IGNORE_INDEX] = 0
    expected = sum(
        F.binary_cross_entropy_with_logits(z, y.float()) for z, y in zip(logits, mask, strict=True)
    )
    loss_sum, _ = compute_loss_sum(Task(type="segmentation", dice_weight=0.0), logits, mask)
    torch.testing.assert_close(loss_sum, expected)


@pytest.mark.parametrize(
    ("task", "width", "names", "columns"),
    [
        (Task(), 1, ["no t", "t"], ["t"]),
        (Task(label_column="l"), 1, ["no t", "t"], ["l"]),
        (TASK_BY_TYPE["multiclass"], 3, ["a", "b", "c"], ["t"]),
        (
            Task(type="multiclass", label_columns=["x", "y"], bin_edges=[1, 2], classes=["a", "b", "c"]),
            3,
            ["a", "b", "c"],
            ["x", "y"],
        ),
        (Task(type="multiclass", label_column="l", num_clusters=[2], classes=["0", "1"]), 2, ["0", "1"], []),
        (TASK_BY_TYPE["regression"], 2, ["labelled"], ["x", "y"]),
        (Task(type="regression"), 1, ["labelled"], ["t"]),
        (TASK_BY_TYPE["segmentation"], 1, ["labelled"], ["t"]),
        (TASK_BY_TYPE["inpainting"], 1, ["labelled"], []),
        (Task(type="contrastive", contrastive=ContrastiveConfig(projection_dim=7)), 7, ["labelled"], []),
    ],
)
def test_output_width_class_names_and_label_columns(
    task: Task, width: int, names: list[str], columns: list[str]
) -> None:
    assert output_dim(task) == width
    assert class_names("t", task) == names
    assert task_label_columns("t", task) == columns
