"""Queries about masks, regressions and self-supervised tasks equal a direct computation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from client.data.dataset import ScanDataset
from client.federation.query_context import QueryContext
from client.federation.query_handlers import QUERY_HANDLERS
from common.config.schema import (
    BackboneConfig,
    Config,
    ContrastiveConfig,
    DecoderConfig,
    FederationConfig,
    Stage,
    Task,
)
from common.learning.metrics import compute_regression_sums
from common.learning.segmentation_metrics import AFFECTED_FRACTION_EDGES, SEVERITY_EDGES
from common.modeling.model import Model, make_model
from common.protocol.messages import Sums

NUM_SCANS = 11
CONFIG = Config(
    tasks={
        "score": Task(type="regression", label_columns=["x", "y"]),
        "lesion": Task(type="segmentation", threshold=0.4, severity_column="severity", dice_weight=0.5),
        "spot": Task(type="segmentation"),
        "fill": Task(type="inpainting", mask_ratio=0.3),
        "moco": Task(type="contrastive", contrastive=ContrastiveConfig(projection_dim=8)),
    },
    stages={"main": Stage(batch_size=4)},
    federation=FederationConfig(centres=["a", "b"]),
)


@pytest.fixture(scope="module")
def model() -> Model:
    """A model whose masks cover about half of the pixels, since those of a new head cover hardly any."""
    model = make_dense_model(seed=3).eval()
    images = torch.rand(4, 2, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name in ("lesion", "spot"):
            head = model.heads[name][-1]  # type: ignore[index]
            head.weight.div_(model(images, [name])[name].std())
            head.bias.sub_(model(images, [name])[name].median() + 0.2)
    return model


def make_dense_model(seed: int) -> Model:
    return make_model(BackboneConfig(decoder=DecoderConfig([16, 8, 8, 8, 4])), CONFIG.tasks, seed)


@pytest.fixture(scope="module")
def scans() -> ScanDataset:
    """6 scans of centre a and 5 of centre b, with labels missing.

    At a, one scan has no severity. At b, no scan has a `spot` mask, some have a severity without a mask, and
    one has no lung mask.
    """
    rng = np.random.default_rng(1)
    shape = (2, 32, 32)

    def random_masks(rows: list[int], num_labels: int) -> list[np.ndarray | None]:
        masks: list[np.ndarray | None] = [None] * NUM_SCANS
        for row in rows:
            masks[row] = rng.integers(0, num_labels, shape).astype(np.uint8)
        return masks

    lesions = random_masks([0, 1, 3, 6, 7], 2)
    spots = random_masks([2, 4], 2)
    lungs = random_masks([0, 1, 2, 3, 4, 5, 6, 8, 9], 3)
    scores = rng.normal(size=(NUM_SCANS, 2))
    scores[[1, 8], [0, 1]] = np.nan
    severities = rng.uniform(0, 60, NUM_SCANS)
    severities[2] = np.nan
    targets = {"score": scores, "fill": np.zeros(NUM_SCANS), "moco": np.zeros(NUM_SCANS)}
    for name, masks in (("lesion", lesions), ("spot", spots)):
        targets[name] = np.array([np.nan if mask is None else 1.0 for mask in masks])
    return ScanDataset(
        [rng.integers(0, 256, shape, dtype=np.uint8) for _ in range(NUM_SCANS)],
        targets,
        ["a"] * 6 + ["b"] * 5,
        [str(row) for row in range(NUM_SCANS)],
        {"lesion": lesions, "spot": spots},
        lungs,
        {"lesion": severities},
    )


def query(name: str, scans: ScanDataset, model: Model | None, stage: Stage | None = None) -> Sums:
    context = QueryContext(
        datasets={"test": scans},
        split="test",
        config=CONFIG,
        stage=stage or CONFIG.stages["main"],
        model=model,
        device=torch.device("cpu"),
    )
    return QUERY_HANDLERS[name](context)


def predict(model: Model, scans: ScanDataset, tasks: list[str]) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        return model(torch.from_numpy(np.stack(scans.slices)) / 255, tasks)  # type: ignore[no-any-return]


def test_masks_cover_a_fair_part_of_the_pixels_and_the_threshold_matters(
    scans: ScanDataset, model: Model
) -> None:
    """Otherwise the tests below would compare little."""
    outputs = predict(model, scans, ["lesion", "spot"])

    def affected_fraction(task: str, threshold: float) -> float:
        return float((outputs[task].sigmoid() >= threshold).double().mean())

    fractions = [
        affected_fraction("lesion", 0.4),
        affected_fraction("lesion", 0.5),
        affected_fraction("spot", 0.5),
    ]
    assert 0.05 < min(fractions) < max(fractions) < 0.95
    assert fractions[0] > fractions[1] + 0.05


@pytest.mark.parametrize(("centre", "task"), [("a", "lesion"), ("a", "spot"), ("b", "lesion")])
def test_overlap_and_loss_of_masks_equal_a_direct_computation(
    scans: ScanDataset, model: Model, centre: str, task: str
) -> None:
    sums = query("scores", scans, model)
    probabilities = predict(model, scans, [task])[task].double().sigmoid().numpy()
    settings = CONFIG.tasks[task]
    overlap = np.zeros(7)
    loss = 0.0
    num_masks = 0
    for name, p, mask in zip(scans.centres, probabilities, scans.masks[task], strict=True):
        if name != centre or mask is None:
            continue
        predicted = p >= settings.threshold
        true_positives = (predicted & (mask == 1)).sum()
        false_positives = (predicted & (mask == 0)).sum()
        false_negatives = (~predicted & (mask == 1)).sum()
        dice = 2 * true_positives / (2 * true_positives + false_positives + false_negatives)
        overlap += [1, dice, true_positives, false_positives, false_negatives, 1, dice]
        soft_dice_loss = 1 - (2 * (p * mask).sum() + 1) / (p.sum() + mask.sum() + 1)
        cross_entropy = -np.log(np.where(mask, p, 1 - p)).mean()
        loss += cross_entropy + settings.dice_weight * soft_dice_loss
        num_masks += 1
    np.testing.assert_allclose(sums[f"{centre}/{task}/overlap"], overlap)
    np.testing.assert_allclose(sums[f"{centre}/{task}/loss"], [loss, num_masks], rtol=1e-4)


def test_task_without_labels_at_a_centre_is_not_scored(scans: ScanDataset, model: Model) -> None:
    sums = query("scores", scans, model)
    assert not [key for key in sums if key.startswith("b/spot")]
    assert "a/spot/joint" not in sums  # the task has no severity column


@pytest.mark.parametrize(("centre", "num_scans"), [("a", 5), ("b", 3)])
def test_joint_histogram_of_severity_equals_a_direct_computation(
    scans: ScanDataset, model: Model, centre: str, num_scans: int
) -> None:
    predicted = predict(model, scans, ["lesion"])["lesion"].double().sigmoid().numpy() >= 0.4
    joint = np.zeros((64, 128))
    for row, name in enumerate(scans.centres):
        lungs = scans.lung_masks[row]
        severity = scans.extra_targets["lesion"][row]
        if name != centre or lungs is None or np.isnan(severity):
            continue
        worse_lung = max(predicted[row][lungs == side].mean() for side in (1, 2))
        fraction_bin = np.searchsorted(AFFECTED_FRACTION_EDGES[1:-1], worse_lung, "right")
        severity_bin = np.searchsorted(SEVERITY_EDGES[1:-1], severity, "right")
        joint[fraction_bin, severity_bin] += 1
    assert joint.sum() == num_scans
    np.testing.assert_array_equal(query("scores", scans, model)[f"{centre}/lesion/joint"], joint)


@pytest.mark.parametrize("centre", ["a", "b"])
def test_regression_sums_equal_a_direct_computation(scans: ScanDataset, model: Model, centre: str) -> None:
    rows = np.flatnonzero(np.array(scans.centres) == centre)
    outputs = predict(model, scans, ["score"])["score"][rows].double().numpy()
    expected = compute_regression_sums(outputs, scans.targets["score"][rows])
    sums = query("scores", scans, model)
    np.testing.assert_allclose(sums[f"{centre}/score/regression"], expected, rtol=1e-4)


@pytest.mark.parametrize("task", ["fill", "moco"])
def test_loss_of_self_supervised_tasks_depends_on_the_model_only(
    scans: ScanDataset, model: Model, task: str
) -> None:
    sums = query("scores", scans, model)
    repeated = query("scores", scans, model)
    of_another_model = query("scores", scans, make_dense_model(seed=4))
    for centre, num_scans in (("a", 6), ("b", 5)):
        key = f"{centre}/{task}/loss"
        assert sums[key][1] == num_scans
        assert sums[key][0] > 0
        assert sums[key].tolist() == repeated[key].tolist() != of_another_model[key].tolist()


def test_contrastive_loss_equals_a_direct_computation(scans: ScanDataset, model: Model) -> None:
    """Each scan is told from the mirror images of its batch: of 4 and of 2 scans at centre a."""
    images = torch.from_numpy(np.stack(scans.slices[:6])) / 255
    with torch.no_grad():
        queries, keys = (model(view, ["moco"])["moco"].double() for view in (images, images.flip(-1)))
    logits = queries @ keys.T / CONFIG.tasks["moco"].contrastive.temperature
    loss = 0.0
    for batch in (slice(0, 4), slice(4, 6)):
        for row in range(batch.start, batch.stop):
            loss += float(logits[row, batch].exp().sum().log() - logits[row, row])
    assert query("scores", scans, model)["a/moco/loss"][0] == pytest.approx(loss, rel=1e-4)


def test_inpainting_is_scored_on_the_masked_patches_of_masked_images(
    scans: ScanDataset, model: Model
) -> None:
    inputs: list[torch.Tensor] = []
    hook = model.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach().clone()))
    stage = Stage(batch_size=4, tasks=["fill"])
    sums = query("scores", scans.subset(np.array([2])), model, stage)
    hook.remove()
    masked_image = inputs[-1][0]  # [S, H, W]
    image = torch.from_numpy(scans.slices[2]) / 255
    is_changed = (masked_image - image).abs() > 1e-3
    is_masked_patch = is_changed.view(2, 8, 4, 8, 4).float().mean((2, 4)) > 0.5
    assert is_masked_patch.sum((1, 2)).tolist() == [round(0.3 * 64)] * 2
    with torch.no_grad():
        painted = model(masked_image[None], ["fill"])["fill"][0].sigmoid()
    is_masked = is_masked_patch.repeat_interleave(4, 1).repeat_interleave(4, 2)
    error = float((painted - image)[is_masked].abs().mean())
    assert sums["a/fill/loss"].tolist() == [pytest.approx(error, rel=1e-4), 1]


def test_counts_of_dense_tasks_are_of_scans_with_labels(scans: ScanDataset) -> None:
    sums = query("counts", scans, None)
    counts = {key: values.tolist() for key, values in sums.items()}
    assert (counts["a/test/lesion"], counts["b/test/lesion"]) == ([3, 3], [2, 3])
    assert (counts["a/test/spot"], counts["b/test/spot"]) == ([2, 4], [0, 5])
    assert (counts["a/test/score"], counts["b/test/score"]) == ([5, 1], [4, 1])
    assert (counts["a/test/fill"], counts["b/test/moco"]) == ([6, 0], [5, 0])
