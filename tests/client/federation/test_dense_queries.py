"""Additive queries of masks, numbers and tasks without labels, against a direct computation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from client.data.dataset import ScanDataset
from client.federation.query_handlers import QUERY_HANDLERS, QueryContext
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

DENSE = Config(
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
def dense_model() -> Model:
    model = make_model(BackboneConfig(decoder=DecoderConfig([16, 8, 8, 8, 4])), DENSE.tasks, 3).eval()
    pictures = torch.rand(4, 2, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for name in (
            "lesion",
            "spot",
        ):  # that pixels be rare, as a head says at first, would leave nothing to overlap
            head = model.heads[name][-1]  # type: ignore[index]
            head.weight.div_(model(pictures, [name])[name].std())
            head.bias.sub_(model(pictures, [name])[name].median() + 0.2)
    return model


@pytest.fixture(scope="module")
def dense() -> ScanDataset:
    """Of centre a some have masks, all severity but one; of centre b no `spot`, severity without a mask, and lungs that were not found."""
    rng = np.random.default_rng(1)
    n = 11
    own = ["a"] * 6 + ["b"] * 5
    shape = (2, 32, 32)

    def masks(there: list[int], low: int, high: int) -> list[np.ndarray | None]:
        return [rng.integers(low, high, shape).astype(np.uint8) if i in there else None for i in range(n)]

    lesion, spot, lungs = (
        masks([0, 1, 3, 6, 7], 0, 2),
        masks([2, 4], 0, 2),
        masks([0, 1, 2, 3, 4, 5, 6, 8, 9], 0, 3),
    )
    score = rng.normal(size=(n, 2))
    score[[1, 8], [0, 1]] = np.nan
    severity = rng.uniform(0, 60, n)
    severity[2] = np.nan
    has = {
        t: np.array([np.nan if m is None else 1.0 for m in of])
        for t, of in (("lesion", lesion), ("spot", spot))
    }
    return ScanDataset(
        [rng.integers(0, 256, shape, dtype=np.uint8) for _ in range(n)],
        {"score": score, **has, "fill": np.zeros(n), "moco": np.zeros(n)},
        own,
        [str(i) for i in range(n)],
        {"lesion": lesion, "spot": spot},
        lungs,
        {"lesion": severity},
    )


def dense_question(scans: ScanDataset, model: Model | None, stage: Stage | None = None) -> QueryContext:
    return QueryContext(
        {"test": scans}, "test", DENSE, stage or DENSE.stages["main"], model, "", 1, torch.device("cpu")
    )


def test_dense_scores_equal_a_direct_computation(dense: ScanDataset, dense_model: Model) -> None:
    """Overlap, severity's histogram and regression sums, scan by scan, whatever the batch and whoever pools them."""
    found = QUERY_HANDLERS["scores"](dense_question(dense, dense_model))
    with torch.no_grad():
        out = dense_model(torch.from_numpy(np.stack(dense.slices)) / 255, ["score", "lesion", "spot"])
    own = np.array(dense.centres)
    shares = [
        float((out[name].sigmoid() >= cut).double().mean())
        for name, cut in (("lesion", 0.4), ("lesion", 0.5), ("spot", 0.5))
    ]
    assert 0.05 < min(shares) < max(shares) < 0.95  # of the pixels are called affected
    assert shares[0] > shares[1] + 0.05  # the cut matters
    for centre in "ab":
        rows = np.flatnonzero(own == centre)
        for name in ("lesion", "spot"):
            overlap, joint, loss, n = np.zeros(7), np.zeros((64, 128)), 0.0, 0
            for i in rows:
                p = out[name][i].double().sigmoid().numpy()
                called, mask, lungs = (
                    p >= DENSE.tasks[name].threshold,
                    dense.masks[name][i],
                    dense.lung_masks[i],
                )
                if mask is not None:
                    tp, fp, fn = ((called == a) & (mask == b) for a, b in ((1, 1), (1, 0), (0, 1)))
                    dice = 2 * tp.sum() / (2 * tp.sum() + fp.sum() + fn.sum())
                    overlap += [1, dice, tp.sum(), fp.sum(), fn.sum(), 1, dice]
                    soft = 1 - (2 * (p * mask).sum() + 1) / (p.sum() + mask.sum() + 1)
                    loss += -np.log(np.where(mask, p, 1 - p)).mean() + DENSE.tasks[name].dice_weight * soft
                    n += 1
                if name == "lesion" and lungs is not None and not np.isnan(dense.extra_targets[name][i]):
                    share = max(called[lungs == side].mean() for side in (1, 2))
                    at = (
                        np.searchsorted(AFFECTED_FRACTION_EDGES[1:-1], share, "right"),
                        np.searchsorted(SEVERITY_EDGES[1:-1], dense.extra_targets[name][i], "right"),
                    )
                    joint[at] += 1
            if (centre, name) == ("b", "spot"):
                assert not [key for key in found if key.startswith("b/spot")]
                continue
            np.testing.assert_allclose(found[f"{centre}/{name}/overlap"], overlap)
            np.testing.assert_allclose(found[f"{centre}/{name}/loss"], [loss, n], rtol=1e-4)
            if name == "lesion":
                np.testing.assert_array_equal(found[f"{centre}/lesion/joint"], joint)
                assert joint.sum() == {"a": 5, "b": 3}[centre]
        y, z = dense.targets["score"][rows], out["score"][rows].double().numpy()
        np.testing.assert_allclose(
            found[f"{centre}/score/regression"], compute_regression_sums(z, y), rtol=1e-4
        )
    assert "a/spot/joint" not in found


def test_tasks_without_labels_have_a_loss_that_only_the_model_changes(
    dense: ScanDataset, dense_model: Model
) -> None:
    found = QUERY_HANDLERS["scores"](dense_question(dense, dense_model))
    again = QUERY_HANDLERS["scores"](dense_question(dense, dense_model))
    other = QUERY_HANDLERS["scores"](
        dense_question(
            dense, make_model(BackboneConfig(decoder=DecoderConfig([16, 8, 8, 8, 4])), DENSE.tasks, 4)
        )
    )
    for name in ("fill", "moco"):
        for centre, n in (("a", 6), ("b", 5)):
            key = f"{centre}/{name}/loss"
            assert found[key][1] == n
            assert found[key][0] > 0
            assert found[key].tolist() == again[key].tolist() != other[key].tolist()
    # The contrast, by hand: batches of 4 and 2 (centre a), each scan against its mirror image and the batch's other mirror images.
    x = torch.from_numpy(np.stack(dense.slices[:6])) / 255
    with torch.no_grad():
        one, two = (dense_model(view, ["moco"])["moco"].double() for view in (x, x.flip(-1)))
    logits = one @ two.T / DENSE.tasks["moco"].contrastive.temperature
    expected = sum(
        float(logits[i, b].exp().sum().log() - logits[i, i])
        for b in (slice(0, 4), slice(4, 6))
        for i in range(b.start, b.stop)
    )
    assert found["a/moco/loss"][0] == pytest.approx(expected, rel=1e-4)


def test_inpaintings_score_is_of_painted_pictures(dense: ScanDataset, dense_model: Model) -> None:
    """What the model is shown there is the painted picture, and only what lies under the paint is asked for."""
    seen: list[torch.Tensor] = []
    hook = dense_model.register_forward_pre_hook(lambda _, x: seen.append(x[0].detach().clone()))
    found = QUERY_HANDLERS["scores"](
        dense_question(dense.subset(np.array([2])), dense_model, Stage(batch_size=4, tasks=["fill"]))
    )
    hook.remove()
    shown = seen[-1][0]  # [S, H, W]
    whole = torch.from_numpy(dense.slices[2]) / 255
    painted = (shown - whole).abs() > 1e-3
    grid = painted.view(2, 8, 4, 8, 4).float().mean((2, 4))
    assert (grid > 0.5).sum((1, 2)).tolist() == [round(0.3 * 64)] * 2
    with torch.no_grad():
        answer = dense_model(shown[None], ["fill"])["fill"][0].sigmoid()
    inside = (grid > 0.5).repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert found["a/fill/loss"].tolist() == [
        pytest.approx(float((answer - whole)[inside].abs().mean()), rel=1e-4),
        1,
    ]


def test_dense_counts(dense: ScanDataset) -> None:
    found = QUERY_HANDLERS["counts"](dense_question(dense, None))
    of = {key: n.tolist() for key, n in found.items()}
    assert (of["a/test/lesion"], of["b/test/lesion"]) == ([3, 3], [2, 3])
    assert (of["a/test/spot"], of["b/test/spot"]) == ([2, 4], [0, 5])
    assert (of["a/test/score"], of["b/test/score"]) == ([5, 1], [4, 1])
    assert (of["a/test/fill"], of["b/test/moco"]) == ([6, 0], [5, 0])
