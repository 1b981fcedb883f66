"""Additive queries: sums over scans that equal a direct computation, add up over any partition, and hold nothing of a single scan."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from client.dataset import Scans
from client.queries import QUERIES, Question, class_counts
from common.messages import Sums, add
from common.metrics import binary_metrics
from common.model import Model, make_model
from common.schema import Backbone, Config, Evaluation, Federation, Stage, Task

SPLITS = ("train", "val", "test")
CONFIG = Config(
    tasks={"covid": Task(), "source": Task(kind="multiclass", classes=["a", "b", "c"])},
    stages={"main": Stage(batch=4)},
    federation=Federation(centres=["a", "b"]),
    evaluation=Evaluation(bins=64),
)
N = 23


@pytest.fixture(scope="module")
def model() -> Model:
    return make_model(Backbone(), CONFIG.tasks, 3)


@pytest.fixture(scope="module")
def scans() -> Scans:
    rng = np.random.default_rng(0)
    covid, source = rng.integers(0, 2, N).astype(float), rng.integers(0, 3, N).astype(float)
    covid[[3, 11]] = source[[5]] = np.nan
    return Scans(
        [rng.integers(0, 256, (2, 32, 32), dtype=np.uint8) for _ in range(N)], {"covid": covid, "source": source}, ["a"] * 9 + ["b"] * 14
    )


def part(scans: Scans, rows: np.ndarray) -> Scans:
    return Scans([scans.slices[i] for i in rows], {t: y[rows] for t, y in scans.targets.items()}, [scans.cohort[i] for i in rows])


def question(scans: Scans, model: Model | None = None, task: str = "", smallest_cell: int = 1, stage: Stage | None = None) -> Question:
    held = {"train": scans, "val": part(scans, np.arange(min(5, len(scans)))), "test": part(scans, np.arange(0))}
    return Question(held, "train", CONFIG, stage or CONFIG.stages["main"], model, task, smallest_cell, torch.device("cpu"))


@given(st.lists(st.sampled_from([0.0, 1.0, math.nan]), max_size=40), st.integers(1, 12))
def test_counts_and_cells_too_small_to_report(targets: list[float], smallest: int) -> None:
    true = [targets.count(0.0), targets.count(1.0), sum(map(math.isnan, targets))]
    assert class_counts(np.array(targets), 2).tolist() == true
    reported = class_counts(np.array(targets), 2, smallest).tolist()
    assert reported == [0 if n == 0 else max(n, smallest) for n in true]


def test_counts_are_by_cohort_split_and_task(scans: Scans) -> None:
    found = QUERIES["counts"](question(scans))
    assert set(found) == {f"{c}/train/{t}" for c in "ab" for t in CONFIG.tasks} | {f"a/val/{t}" for t in CONFIG.tasks}
    for centre in "ab":
        y = scans.targets["source"][[c == centre for c in scans.cohort]]
        assert found[f"{centre}/train/source"].tolist() == [*(int((y == k).sum()) for k in range(3)), int(np.isnan(y).sum())]
    hidden = QUERIES["counts"](question(scans, smallest_cell=5))
    assert all(((n == 0) | (n >= 5)).all() for n in hidden.values())


def test_before_the_sources_are_known_every_scan_is_unlabelled(scans: Scans) -> None:
    assert class_counts(np.full(4, np.nan), 0).tolist() == [4]


def test_scores_equal_a_direct_computation(scans: Scans, model: Model) -> None:
    found = QUERIES["scores"](question(scans, model))
    with torch.no_grad():
        out = model.eval()(torch.from_numpy(np.stack(scans.slices)) / 255)
    z, y = out["covid"][:, 0].double().numpy(), scans.targets["covid"]
    own = np.array(scans.cohort)
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
        for row, label in zip(out["source"].numpy()[own == centre], scans.targets["source"][own == centre], strict=True):
            if not math.isnan(label):
                confusion[int(label), int(np.argmax(row))] += 1
        np.testing.assert_array_equal(found[f"{centre}/source/confusion"], confusion)
    assert set(found) == {f"{c}/{what}" for c in "ab" for what in ("covid/hist", "covid/loss", "source/confusion", "source/loss")}


def test_the_auc_of_the_histogram_is_near_that_of_the_scores(scans: Scans, model: Model) -> None:
    found = QUERIES["scores"](question(scans, model))
    with torch.no_grad():
        z = model.eval()(torch.from_numpy(np.stack(scans.slices)) / 255)["covid"][:, 0].numpy()
    y = scans.targets["covid"]
    pairs = [(z[i] > z[j]) + 0.5 * (z[i] == z[j]) for i in np.flatnonzero(y == 1) for j in np.flatnonzero(y == 0)]
    hist = found["a/covid/hist"] + found["b/covid/hist"]
    shared = (hist[0] * hist[1]).sum() / 2 / len(pairs)
    assert binary_metrics(hist)["auc"] == pytest.approx(np.mean(pairs), abs=shared + 1e-9)


def test_no_scans_score_leaves(scans: Scans, model: Model) -> None:
    """What leaves is counts, whole numbers, and one summed loss a task; its size does not grow with the scans."""
    small, large = (QUERIES["scores"](question(part(scans, rows), model)) for rows in (np.arange(2, 6), np.arange(9)))
    assert {k: v.shape for k, v in small.items()} == {k: v.shape for k, v in large.items()}
    with torch.no_grad():
        z = model.eval()(torch.from_numpy(np.stack(scans.slices)) / 255)["covid"][:, 0].double().numpy()
    for key, sums in large.items():
        assert "loss" in key or np.array_equal(sums, np.round(sums))
        assert not np.isclose(sums.reshape(-1, 1), z[None, :9], rtol=1e-4, atol=0).any()


@pytest.mark.parametrize(("query", "task"), [("counts", ""), ("scores", ""), ("moments", "source")])
def test_sums_add_up_over_any_partition_of_the_scans(scans: Scans, model: Model, query: str, task: str) -> None:
    """Centres, or one that pools them: the same total."""
    whole = QUERIES[query](question(scans, model, task))
    order = np.random.default_rng(4).permutation(N)
    total: Sums = {}
    for rows in (order[:1], order[1:9], order[9:]):
        add(total, {k: v for k, v in QUERIES[query](question(part(scans, rows), model, task)).items() if "/val/" not in k})
    whole = {k: v for k, v in whole.items() if "/val/" not in k}
    assert total.keys() == whole.keys()
    for key in whole:
        np.testing.assert_allclose(total[key], whole[key], rtol=1e-4, atol=1e-4)


def test_moments_equal_a_direct_computation_and_leave_out_the_unlabelled(scans: Scans, model: Model) -> None:
    found = QUERIES["moments"](question(scans, model, "source"))
    with torch.no_grad():
        f = model.eval().features(torch.from_numpy(np.stack(scans.slices)) / 255).double().numpy()
    y = scans.targets["source"]
    for k in range(3):
        np.testing.assert_allclose(found["sum"][k], f[y == k].sum(0), rtol=1e-4, atol=1e-4)
    assert found["n"].tolist() == [(y == k).sum() for k in range(3)]
    known = f[~np.isnan(y)]
    np.testing.assert_allclose(found["square"], sum(np.outer(row, row) for row in known), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found["square"], found["square"].T, rtol=1e-12)


def test_a_split_without_scans_adds_nothing(scans: Scans, model: Model) -> None:
    for query in ("scores", "moments"):
        q = question(scans, model, "source")
        q.split = "test"
        assert QUERIES[query](q) == {}
        assert QUERIES[query](question(scans, None, "source")) == {}


def test_only_the_stages_tasks_are_scored(scans: Scans, model: Model) -> None:
    found = QUERIES["scores"](question(scans, model, stage=Stage(batch=4, tasks=["covid"])))
    assert {key.split("/")[1] for key in found} == {"covid"}
