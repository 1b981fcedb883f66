"""The objective: masks that move with slices, inpainting, missing labels, gradient accumulation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from client.data.batch import Batch
from client.training.objective import Objective, mask_patches
from common.config.schema import AugmentConfig, BackboneConfig, DecoderConfig, Stage, Task
from common.learning.losses import IGNORE_INDEX, BatchLoss, compute_stage_loss
from common.modeling.model import Model, make_model

CPU = torch.device("cpu")
SMALL = BackboneConfig(decoder=DecoderConfig([16, 8, 8, 8, 4]))
NO_AUGMENTATION = AugmentConfig(p_flip=0, p_affine=0, p_brightness=0, p_hsv_value=0, p_cutout=0)
GEOMETRY = AugmentConfig(p_flip=0.5, p_affine=1, p_elastic=1, p_brightness=0, p_hsv_value=0, p_cutout=0)
TASKS = {"covid": Task(), "lesion": Task(type="segmentation", loss_weight=0.7)}


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def objective(tasks: dict[str, Task], augment: AugmentConfig = NO_AUGMENTATION, seed: int = 3) -> Objective:
    return Objective(Stage(augment=augment), tasks, {}, CPU, seed)


def gradients_of(model: Model) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- masks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [["lesion"], ["lesion", "infection"]])
def test_masks_move_with_their_slices(names: list[str]) -> None:
    """A slice that is its own mask stays so, also when there are two masks, each of which could draw anew."""
    blob = torch.zeros(4, 2, 48, 48, dtype=torch.uint8)
    for b in range(4):
        for s in range(2):
            blob[b, s, 6 + 4 * b : 26 + 4 * b, 8 + 4 * s : 34] = 1
    tasks = {t: Task(type="segmentation") for t in names} | {"covid": Task()}
    masks = {t: blob.clone() if i == 0 else 1 - blob for i, t in enumerate(names)}
    x, targets = objective(tasks, GEOMETRY).augment_batch(
        Batch(blob * 255, masks | {"covid": torch.zeros(4)})
    )
    lesion = targets["lesion"]
    same = (lesion == blob).float().mean((2, 3))
    assert same.max() < 0.97  # every slice moved
    agreement = ((x > 0.5) == (lesion == 1)).float().mean((2, 3))
    assert (agreement > 0.98).all()  # except at the border, where only slices are interpolated
    if len(names) == 2:  # the complement moves too; what enters from outside is neither
        assert ((lesion + targets["infection"]) <= 1).all()
        assert ((lesion + targets["infection"] == 1).float().mean((2, 3)) > 0.5).all()
    assert torch.equal(targets["covid"], torch.zeros(4))


def test_masks_change_neither_the_slices_nor_later_random_draws() -> None:
    slices = draw(1, 3, 1, 32, 32)
    ways = [
        {},
        {"lesion": draw(2, 3, 1, 32, 32) % 2},
        {"lesion": draw(2, 3, 1, 32, 32) % 2, "infection": draw(3, 3, 1, 32, 32) % 2},
    ]
    seen = []
    for targets in ways:
        made = objective({}, AugmentConfig(p_elastic=0.5))
        seen.append([made.augment_batch(Batch(slices, dict(targets)))[0] for _ in range(2)])
    for other in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], other, strict=True))


# --- inpainting -------------------------------------------------------------------------------------------


class RecordingModel(nn.Module):
    """A model that remembers its input and returns a parameter, whose gradient shows which pixels count."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
        self.seen: Tensor | None = None

    def forward(self, x: Tensor, tasks: list[str]) -> dict[str, Tensor]:
        self.seen = x
        return {t: self.logits for t in tasks}


@pytest.mark.parametrize("share", [0.1, 0.25, 0.9])
def test_inpainting_shows_painted_slices_and_predicts_the_original(share: float) -> None:
    slices = draw(4, 3, 2, 32, 32)
    recorder: Any = RecordingModel((3, 2, 32, 32))
    losses = objective({"fill": Task(type="inpainting", mask_ratio=share)}).compute_loss(
        recorder, Batch(slices, {"fill": torch.zeros(3)}), {"fill": 3}
    )
    losses.total.backward()  # type: ignore[no-untyped-call]
    whole, seen = slices.float() / 255, recorder.seen
    painted = recorder.logits.grad != 0
    cells = painted.view(3, 2, 8, 4, 8, 4)
    assert torch.equal(cells.amax((3, 5)), cells.float().mean((3, 5)) > 0.5)  # whole cells of the grid
    assert torch.equal(cells.amax((3, 5)).sum((2, 3)), torch.full((3, 2), round(share * 64)))
    assert torch.equal(seen[~painted], whole[~painted])
    mean = whole.mean((2, 3), keepdim=True).expand_as(whole)
    torch.testing.assert_close(seen[painted], mean[painted])
    expected = sum((recorder.logits[i].sigmoid() - whole[i])[painted[i]].abs().mean() for i in range(3)) / 3
    torch.testing.assert_close(losses.total, expected)
    assert losses.sums_by_task["fill"] == (pytest.approx(3 * float(expected.detach()), rel=1e-5), 3)


def test_painted_patches_depend_on_slice_and_seed() -> None:
    x = draw(5, 2, 3, 16, 16).float() / 255
    masks = [mask_patches(x, 0.25, torch.Generator().manual_seed(seed))[1] for seed in (1, 1, 2)]
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    patterns = {tuple(mask.flatten().tolist()) for mask in masks[0].flatten(0, 1)}
    assert len(patterns) == 6  # every slice has another pattern


# --- missing labels ---------------------------------------------------------------------------------------


def batch_of(covid: list[float], masked: list[bool], seed: int = 0) -> Batch:
    n = len(covid)
    mask = draw(seed + 1, n, 2, 32, 32) % 2
    mask[~torch.tensor(masked)] = IGNORE_INDEX
    return Batch(
        draw(seed, n, 2, 32, 32), {"covid": torch.tensor(covid, dtype=torch.float64), "lesion": mask}
    )


def compute_loss(model: Model, batch: Batch) -> BatchLoss:
    made = objective(TASKS)
    return made.compute_loss(model, batch, made.count_labelled(batch))


NAN = float("nan")


def test_a_task_without_labels_is_not_computed() -> None:
    """Its head may be infinite: neither loss nor gradient nor the decoder's statistics depend on it."""
    model = make_model(SMALL, TASKS, 1).train()
    with torch.no_grad():
        for p in model.heads["lesion"].parameters():
            p.fill_(float("inf"))
    batch = batch_of([0, 1, NAN], [False] * 3)
    before = copy.deepcopy(model.state_dict())
    losses = compute_loss(model, batch)
    losses.total.backward()  # type: ignore[no-untyped-call]
    assert losses.sums_by_task["lesion"] == (0.0, 0)
    assert losses.sums_by_task["covid"][1] == 2
    gradients = gradients_of(model)
    assert all(torch.isfinite(g).all() for g in gradients.values())
    assert {name.split(".")[0] for name in gradients} == {"encoder", "heads"}
    assert not any(name.startswith("heads.lesion") for name in gradients)
    after = model.state_dict()
    for name, value in before.items():
        if name.startswith("decoder"):
            assert torch.equal(value, after[name]), name


def test_a_batch_without_labels_changes_neither_weights_nor_statistics() -> None:
    model = make_model(SMALL, TASKS, 1).train()
    before = copy.deepcopy(model.state_dict())
    batch = batch_of([NAN, NAN], [False, False])
    losses = compute_loss(model, batch)
    assert not losses.total.requires_grad
    assert losses.sums_by_task == {"covid": (0.0, 0), "lesion": (0.0, 0)}
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_gradients_of_a_batchs_parts_add_up() -> None:
    """One part has only masks, one only classes, one nothing.

    Batch norms are in evaluation mode, because their statistics differ between parts.
    """
    model = make_model(SMALL, TASKS, 1).eval()
    batch = batch_of([NAN, NAN, 1, 0, NAN, NAN, 1], [True, True, False, False, False, False, True])
    counts = objective(TASKS).count_labelled(batch)
    assert counts == {"covid": 3, "lesion": 3}
    gradients_by_division = []
    for count in (1, 2, 3, 7):
        model.zero_grad()
        made = objective(TASKS)
        for part in batch.split_into(count):
            losses = made.compute_loss(model, part, counts)
            if losses.total.requires_grad:  # else the part had no label
                losses.total.backward()  # type: ignore[no-untyped-call]
        gradients_by_division.append(gradients_of(model))
    model.zero_grad()
    undivided = compute_stage_loss(TASKS, model(batch.slices.float() / 255), batch.targets, {})
    undivided.total.backward()  # type: ignore[no-untyped-call]
    for gradients in gradients_by_division:
        for name, expected in gradients_of(model).items():
            torch.testing.assert_close(gradients[name], expected, rtol=1e-3, atol=1e-5)
