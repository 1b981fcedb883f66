"""Additive queries: sums equal a direct computation, add up over any partition, and hold no single scan."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from client.data.dataset import ScanDataset
from client.federation.label_counts import count_classes
from client.federation.query_context import QueryContext
from client.federation.query_handlers import QUERY_HANDLERS
from common.config.schema import Stage
from common.learning.metrics import compute_binary_metrics
from common.modeling.model import Model
from common.protocol.messages import Sums, add_sums
from tests.client.federation.queried_scans import CONFIG, NUM_SCANS, compute_features, stack_images
from tests.client.federation.queried_scans import model as model
from tests.client.federation.queried_scans import scans as scans


def make_query(
    scans: ScanDataset,
    model: Model | None = None,
    task: str = "",
    stage: Stage | None = None,
) -> QueryContext:
    return QueryContext(
        datasets={
            "train": scans,
            "val": scans.subset(np.arange(min(5, len(scans)))),
            "test": scans.subset(np.arange(0)),
        },
        split="train",
        config=CONFIG,
        stage=stage or CONFIG.stages["main"],
        model=model,
        task_name=task,
        device=torch.device("cpu"),
    )


def predict(model: Model, scans: ScanDataset) -> dict[str, np.ndarray]:
    with torch.no_grad():
        return {task: output.numpy() for task, output in model.eval()(stack_images(scans)).items()}


# --- counts ---------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from([0.0, 1.0, math.nan]), max_size=40))
def test_counts_are_those_of_the_targets(targets: list[float]) -> None:
    true_counts = [targets.count(0.0), targets.count(1.0), sum(map(math.isnan, targets))]
    assert count_classes(np.array(targets), 2).tolist() == true_counts


def test_counts_are_by_cohort_split_and_task(scans: ScanDataset) -> None:
    sums = QUERY_HANDLERS["counts"](make_query(scans))
    assert set(sums) == {
        "a/train/covid",
        "a/train/source",
        "b/train/covid",
        "b/train/source",
        "a/val/covid",
        "a/val/source",
    }
    for centre in "ab":
        targets = scans.targets["source"][[name == centre for name in scans.centres]]
        by_class = [int((targets == index).sum()) for index in range(3)]
        assert sums[f"{centre}/train/source"].tolist() == [*by_class, int(np.isnan(targets).sum())]


def test_every_scan_is_unlabelled_before_the_sources_are_known() -> None:
    assert count_classes(np.full(4, np.nan), 0).tolist() == [4]


# --- scores ---------------------------------------------------------------------------------------


def test_binary_scores_equal_a_direct_computation(scans: ScanDataset, model: Model) -> None:
    sums = QUERY_HANDLERS["scores"](make_query(scans, model))
    logits = predict(model, scans)["covid"][:, 0].astype(float)
    bin_width = 16 / 64  # from -8 to 8
    for centre in "ab":
        histogram = np.zeros((2, 64))
        loss = 0.0
        num_labelled = 0
        for name, logit, label in zip(scans.centres, logits, scans.targets["covid"], strict=True):
            if name != centre or math.isnan(label):
                continue
            histogram[int(label), min(max(math.floor((logit + 8) / bin_width), 0), 63)] += 1
            loss += math.log1p(math.exp(-logit if label else logit))
            num_labelled += 1
        np.testing.assert_array_equal(sums[f"{centre}/covid/hist"], histogram)
        assert sums[f"{centre}/covid/loss"].tolist() == [pytest.approx(loss, rel=1e-4), num_labelled]


def test_multiclass_scores_equal_a_direct_computation(scans: ScanDataset, model: Model) -> None:
    sums = QUERY_HANDLERS["scores"](make_query(scans, model))
    outputs = predict(model, scans)["source"]
    for centre in "ab":
        confusion = np.zeros((3, 3))
        for name, output, label in zip(scans.centres, outputs, scans.targets["source"], strict=True):
            if name == centre and not math.isnan(label):
                confusion[int(label), int(np.argmax(output))] += 1
        np.testing.assert_array_equal(sums[f"{centre}/source/confusion"], confusion)
    statistics = ("covid/hist", "covid/loss", "source/confusion", "source/loss")
    assert set(sums) == {f"{centre}/{name}" for centre in "ab" for name in statistics}


def test_auc_of_the_histogram_is_near_that_of_the_scores(scans: ScanDataset, model: Model) -> None:
    sums = QUERY_HANDLERS["scores"](make_query(scans, model))
    logits = predict(model, scans)["covid"][:, 0]
    targets = scans.targets["covid"]
    pairs = []
    for positive in logits[targets == 1]:
        for negative in logits[targets == 0]:
            pairs.append((positive > negative) + 0.5 * (positive == negative))
    histogram = sums["a/covid/hist"] + sums["b/covid/hist"]
    pairs_in_one_bin = (histogram[0] * histogram[1]).sum()
    tolerance = pairs_in_one_bin / 2 / len(pairs) + 1e-9
    assert compute_binary_metrics(histogram)["auc"] == pytest.approx(np.mean(pairs), abs=tolerance)


def test_no_scans_score_leaves(scans: ScanDataset, model: Model) -> None:
    """What leaves are whole numbers and one summed loss a task; its size does not grow with the scans."""
    few = QUERY_HANDLERS["scores"](make_query(scans.subset(np.arange(2, 6)), model))
    more = QUERY_HANDLERS["scores"](make_query(scans.subset(np.arange(9)), model))
    assert {key: sum_.shape for key, sum_ in few.items()} == {key: sum_.shape for key, sum_ in more.items()}
    logits = predict(model, scans)["covid"][:, 0].astype(float)
    for key, sum_ in more.items():
        assert "loss" in key or np.array_equal(sum_, np.round(sum_))
        assert not np.isclose(sum_.reshape(-1, 1), logits[None, :9], rtol=1e-4, atol=0).any()


@pytest.mark.parametrize(("query", "task"), [("counts", ""), ("scores", ""), ("moments", "source")])
def test_sums_add_up_over_any_partition_of_the_scans(
    scans: ScanDataset, model: Model, query: str, task: str
) -> None:
    """Several centres give the same total as one that pools them."""

    def query_training_scans(rows: np.ndarray) -> Sums:
        sums = QUERY_HANDLERS[query](make_query(scans.subset(rows), model, task))
        return {key: sum_ for key, sum_ in sums.items() if "/val/" not in key}

    pooled = query_training_scans(np.arange(NUM_SCANS))
    order = np.random.default_rng(4).permutation(NUM_SCANS)
    total: Sums = {}
    for rows in (order[:1], order[1:9], order[9:]):
        add_sums(total, query_training_scans(rows))
    assert total.keys() == pooled.keys()
    for key in pooled:
        np.testing.assert_allclose(total[key], pooled[key], rtol=1e-4, atol=1e-4)


def test_only_the_stages_tasks_are_scored(scans: ScanDataset, model: Model) -> None:
    stage = Stage(batch_size=4, tasks=["covid"])
    sums = QUERY_HANDLERS["scores"](make_query(scans, model, stage=stage))
    assert {key.split("/")[1] for key in sums} == {"covid"}


# --- moments --------------------------------------------------------------------------------------


def test_moments_equal_a_direct_computation_over_labelled_scans(scans: ScanDataset, model: Model) -> None:
    sums = QUERY_HANDLERS["moments"](make_query(scans, model, "source"))
    features = compute_features(model, scans)
    targets = scans.targets["source"]
    for index in range(3):
        expected = features[targets == index].sum(0)
        np.testing.assert_allclose(sums["sum"][index], expected, rtol=1e-4, atol=1e-4)
    assert sums["n"].tolist() == [(targets == index).sum() for index in range(3)]
    labelled = features[~np.isnan(targets)]
    outer_products = sum(np.outer(row, row) for row in labelled)
    np.testing.assert_allclose(sums["square"], outer_products, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(sums["square"], sums["square"].T, rtol=1e-12)


@pytest.mark.parametrize("query", ["scores", "moments"])
def test_nothing_is_summed_without_scans_or_without_a_model(
    scans: ScanDataset, model: Model, query: str
) -> None:
    without_scans = make_query(scans, model, "source")
    without_scans.split = "test"
    assert QUERY_HANDLERS[query](without_scans) == {}
    assert QUERY_HANDLERS[query](make_query(scans, None, "source")) == {}
