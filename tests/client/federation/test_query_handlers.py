"""Additive queries: sums over scans that equal a direct computation, add up over any partition, and hold nothing of a single scan."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from client.data.dataset import ScanDataset
from client.federation.query_handlers import QUERY_HANDLERS, QueryContext, count_classes
from common.config.schema import BackboneConfig, Config, EvaluationConfig, FederationConfig, Stage, Task
from common.learning.metrics import compute_binary_metrics
from common.modeling.model import Model, make_model
from common.protocol.messages import Sums, add_sums
from common.utils.errors import Refused

SPLITS = ("train", "val", "test")
CONFIG = Config(
    tasks={"covid": Task(), "source": Task(type="multiclass", classes=["a", "b", "c"])},
    stages={"main": Stage(batch_size=4)},
    federation=FederationConfig(centres=["a", "b"]),
    evaluation=EvaluationConfig(histogram_bins=64),
)
N = 23


@pytest.fixture(scope="module")
def model() -> Model:
    return make_model(BackboneConfig(), CONFIG.tasks, 3)


@pytest.fixture(scope="module")
def scans() -> ScanDataset:
    rng = np.random.default_rng(0)
    covid, source = rng.integers(0, 2, N).astype(float), rng.integers(0, 3, N).astype(float)
    covid[[3, 11]] = source[[5]] = np.nan
    return ScanDataset(
        [rng.integers(0, 256, (2, 32, 32), dtype=np.uint8) for _ in range(N)],
        {"covid": covid, "source": source},
        ["a"] * 9 + ["b"] * 14,
    )


def part(scans: ScanDataset, rows: np.ndarray) -> ScanDataset:
    return ScanDataset(
        [scans.slices[i] for i in rows],
        {t: y[rows] for t, y in scans.targets.items()},
        [scans.centres[i] for i in rows],
    )


def question(
    scans: ScanDataset,
    model: Model | None = None,
    task: str = "",
    smallest_cell: int = 1,
    stage: Stage | None = None,
) -> QueryContext:
    held = {
        "train": scans,
        "val": part(scans, np.arange(min(5, len(scans)))),
        "test": part(scans, np.arange(0)),
    }
    return QueryContext(
        held, "train", CONFIG, stage or CONFIG.stages["main"], model, task, smallest_cell, torch.device("cpu")
    )


@given(st.lists(st.sampled_from([0.0, 1.0, math.nan]), max_size=40), st.integers(1, 12))
def test_counts_and_cells_too_small_to_report(targets: list[float], smallest: int) -> None:
    true = [targets.count(0.0), targets.count(1.0), sum(map(math.isnan, targets))]
    assert count_classes(np.array(targets), 2).tolist() == true
    reported = count_classes(np.array(targets), 2, smallest).tolist()
    assert reported == [0 if n == 0 else max(n, smallest) for n in true]


def test_counts_are_by_cohort_split_and_task(scans: ScanDataset) -> None:
    found = QUERY_HANDLERS["counts"](question(scans))
    assert set(found) == {f"{c}/train/{t}" for c in "ab" for t in CONFIG.tasks} | {
        f"a/val/{t}" for t in CONFIG.tasks
    }
    for centre in "ab":
        y = scans.targets["source"][[c == centre for c in scans.centres]]
        assert found[f"{centre}/train/source"].tolist() == [
            *(int((y == k).sum()) for k in range(3)),
            int(np.isnan(y).sum()),
        ]
    hidden = QUERY_HANDLERS["counts"](question(scans, smallest_cell=5))
    assert all(((n == 0) | (n >= 5)).all() for n in hidden.values())


def test_before_the_sources_are_known_every_scan_is_unlabelled(scans: ScanDataset) -> None:
    assert count_classes(np.full(4, np.nan), 0).tolist() == [4]


def test_scores_equal_a_direct_computation(scans: ScanDataset, model: Model) -> None:
    found = QUERY_HANDLERS["scores"](question(scans, model))
    with torch.no_grad():
        out = model.eval()(torch.from_numpy(np.stack(scans.slices)) / 255)
    z, y = out["covid"][:, 0].double().numpy(), scans.targets["covid"]
    own = np.array(scans.centres)
    width = 16 / 64  # of a bin, from -8 to 8
    for centre in "ab":
        hist = np.zeros((2, 64))
        loss = n = 0.0
        for score, label in zip(z[own == centre], y[own == centre], strict=True):
            if not math.isnan(label):
                hist[int(label), min(max(math.floor((score + 8) / width), 0), 63)] += 1
                loss, n = loss + math.log1p(math.exp(-score if label else score)), n + 1
        np.testing.assert_array_equal(found[f"{centre}/covid/hist"], hist)
        assert found[f"{centre}/covid/loss"].tolist() == [pytest.approx(loss, rel=1e-4), n]
        confusion = np.zeros((3, 3))
        for row, label in zip(
            out["source"].numpy()[own == centre], scans.targets["source"][own == centre], strict=True
        ):
            if not math.isnan(label):
                confusion[int(label), int(np.argmax(row))] += 1
        np.testing.assert_array_equal(found[f"{centre}/source/confusion"], confusion)
    assert set(found) == {
        f"{c}/{what}"
        for c in "ab"
        for what in ("covid/hist", "covid/loss", "source/confusion", "source/loss")
    }


def test_the_auc_of_the_histogram_is_near_that_of_the_scores(scans: ScanDataset, model: Model) -> None:
    found = QUERY_HANDLERS["scores"](question(scans, model))
    with torch.no_grad():
        z = model.eval()(torch.from_numpy(np.stack(scans.slices)) / 255)["covid"][:, 0].numpy()
    y = scans.targets["covid"]
    pairs = [
        (z[i] > z[j]) + 0.5 * (z[i] == z[j]) for i in np.flatnonzero(y == 1) for j in np.flatnonzero(y == 0)
    ]
    hist = found["a/covid/hist"] + found["b/covid/hist"]
    shared = (hist[0] * hist[1]).sum() / 2 / len(pairs)
    assert compute_binary_metrics(hist)["auc"] == pytest.approx(np.mean(pairs), abs=shared + 1e-9)


def test_no_scans_score_leaves(scans: ScanDataset, model: Model) -> None:
    """What leaves is counts, whole numbers, and one summed loss a task; its size does not grow with the scans."""
    small, large = (
        QUERY_HANDLERS["scores"](question(part(scans, rows), model))
        for rows in (np.arange(2, 6), np.arange(9))
    )
    assert {k: v.shape for k, v in small.items()} == {k: v.shape for k, v in large.items()}
    with torch.no_grad():
        z = model.eval()(torch.from_numpy(np.stack(scans.slices)) / 255)["covid"][:, 0].double().numpy()
    for key, sums in large.items():
        assert "loss" in key or np.array_equal(sums, np.round(sums))
        assert not np.isclose(sums.reshape(-1, 1), z[None, :9], rtol=1e-4, atol=0).any()


@pytest.mark.parametrize(("query", "task"), [("counts", ""), ("scores", ""), ("moments", "source")])
def test_sums_add_up_over_any_partition_of_the_scans(
    scans: ScanDataset, model: Model, query: str, task: str
) -> None:
    """Centres, or one that pools them: the same total."""
    whole = QUERY_HANDLERS[query](question(scans, model, task))
    order = np.random.default_rng(4).permutation(N)
    total: Sums = {}
    for rows in (order[:1], order[1:9], order[9:]):
        add_sums(
            total,
            {
                k: v
                for k, v in QUERY_HANDLERS[query](question(part(scans, rows), model, task)).items()
                if "/val/" not in k
            },
        )
    whole = {k: v for k, v in whole.items() if "/val/" not in k}
    assert total.keys() == whole.keys()
    for key in whole:
        np.testing.assert_allclose(total[key], whole[key], rtol=1e-4, atol=1e-4)


def test_moments_equal_a_direct_computation_and_leave_out_the_unlabelled(
    scans: ScanDataset, model: Model
) -> None:
    found = QUERY_HANDLERS["moments"](question(scans, model, "source"))
    with torch.no_grad():
        f = model.eval().extract_features(torch.from_numpy(np.stack(scans.slices)) / 255).double().numpy()
    y = scans.targets["source"]
    for k in range(3):
        np.testing.assert_allclose(found["sum"][k], f[y == k].sum(0), rtol=1e-4, atol=1e-4)
    assert found["n"].tolist() == [(y == k).sum() for k in range(3)]
    known = f[~np.isnan(y)]
    np.testing.assert_allclose(
        found["square"], sum(np.outer(row, row) for row in known), rtol=1e-3, atol=1e-3
    )
    np.testing.assert_allclose(found["square"], found["square"].T, rtol=1e-12)


def test_a_split_without_scans_adds_nothing(scans: ScanDataset, model: Model) -> None:
    for query in ("scores", "moments"):
        q = question(scans, model, "source")
        q.split = "test"
        assert QUERY_HANDLERS[query](q) == {}
        assert QUERY_HANDLERS[query](question(scans, None, "source")) == {}


def test_only_the_stages_tasks_are_scored(scans: ScanDataset, model: Model) -> None:
    found = QUERY_HANDLERS["scores"](question(scans, model, stage=Stage(batch_size=4, tasks=["covid"])))
    assert {key.split("/")[1] for key in found} == {"covid"}


# --- clusters ---------------------------------------------------------------------------------------------------------------------------


def clustered(
    scans: ScanDataset,
    features: Path | None,
    model: Model | None,
    centroids: np.ndarray,
    split: str = "train",
) -> QueryContext:
    config = replace(CONFIG, tasks={**CONFIG.tasks, "soft": Task(type="multiclass", num_clusters=[2, 3])})
    return QueryContext(
        {split: scans},
        split,
        config,
        Stage(batch_size=4),
        model,
        "soft",
        1,
        torch.device("cpu"),
        centroids,
        features,
    )


def with_part(scans: ScanDataset, rows: np.ndarray) -> ScanDataset:
    """Some scans, all of which take part in the clustering but every fifth."""
    some = part(scans, rows)
    some.store_keys = [f"k{i}" for i in rows]
    some.extra_targets["soft"] = np.array([np.nan if i % 5 == 4 else 1.0 for i in rows])
    return some


def test_a_step_of_k_means_is_the_sum_over_centres_of_a_direct_computation(
    scans: ScanDataset, model: Model, tmp_path: Path
) -> None:
    whole = with_part(scans, np.arange(N))
    with torch.no_grad():
        f = model.eval().extract_features(torch.from_numpy(np.stack(scans.slices)) / 255).double().numpy()
    centroids = f[[0, 11, 21]]
    f = f[[i % 5 != 4 for i in range(N)]]
    nearest = np.array([np.argmin([((x - c) ** 2).sum() for c in centroids]) for x in f])
    assert len(set(nearest)) > 1
    total: Sums = {}
    for centre in ("a", "b"):
        rows = np.flatnonzero(np.array(scans.centres) == centre)
        add_sums(
            total,
            QUERY_HANDLERS["clusters"](
                clustered(with_part(scans, rows), tmp_path / centre, model, centroids)
            ),
        )
    pooled = QUERY_HANDLERS["clusters"](clustered(whole, None, model, centroids))
    for sums in (total, pooled):
        for k in range(3):
            assert sums["n"][k] == (nearest == k).sum()
            np.testing.assert_allclose(sums["sum"][k], f[nearest == k].sum(0), rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(sums["square"][k], (f[nearest == k] ** 2).sum(), rtol=1e-4, atol=1e-4)


def test_features_are_kept_for_the_next_steps_and_missed_when_they_are_gone(
    scans: ScanDataset, model: Model, tmp_path: Path
) -> None:
    whole = with_part(scans, np.arange(N))
    centroids = np.random.default_rng(2).normal(size=(2, int(model.encoder.num_features)))  # type: ignore[call-overload]
    first = QUERY_HANDLERS["clusters"](clustered(whole, tmp_path, model, centroids))
    moved = QUERY_HANDLERS["clusters"](clustered(whole, tmp_path, None, centroids + 0.1))
    assert moved["n"].sum() == first["n"].sum() == N - N // 5
    expected = QUERY_HANDLERS["clusters"](clustered(whole, None, model, centroids + 0.1))
    for key in expected:
        np.testing.assert_allclose(moved[key], expected[key], rtol=1e-5, atol=1e-6)
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(Refused, match="the features of this run are gone from its state folder"):
        QUERY_HANDLERS["clusters"](clustered(whole, tmp_path, None, centroids))
    nobody = with_part(scans, np.array([4, 9]))  # neither takes part
    assert QUERY_HANDLERS["clusters"](clustered(nobody, tmp_path, None, centroids)) == {}
