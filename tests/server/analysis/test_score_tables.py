"""Scores from the sums of centres that hold different labels, for every type of task."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from common.config.schema import Config, EvaluationConfig, Task
from common.learning.metrics import compute_regression_sums, compute_score_histogram
from common.learning.segmentation_metrics import (
    AFFECTED_FRACTION_EDGES,
    SEVERITY_EDGES,
    compute_joint_histogram,
    compute_overlap_sums,
)
from common.protocol.messages import JoinReply, Sums
from server.analysis import score_tables
from server.run.records import WorstCentre

TASKS = {
    "covid": Task(),
    "finding": Task(type="multiclass", classes=["none", "typical", "other"]),
    "brixia": Task(type="regression", label_columns=["a", "b"]),
    "lesion": Task(type="segmentation", severity_column="severity"),
    "infection": Task(type="segmentation"),
    "moco": Task(type="contrastive"),
    "paint": Task(type="inpainting"),
}
CONFIG = Config(tasks=TASKS, evaluation=EvaluationConfig(task="lesion", metric="dice"))


def make_sums() -> Sums:
    """Return the sums of two labelled centres and of `west`, which knows only severities."""
    random = np.random.default_rng(0)
    sums: Sums = {}
    for k, centre in enumerate(("north", "south", "west")):
        rows = [20, 30, 0][k]
        truth = random.integers(0, 2, rows).astype(float)
        score = random.normal(size=rows)
        target = random.normal(size=(rows, 2))
        mask = random.integers(0, 2, (rows, 1, 4, 4)).astype(np.uint8)
        fraction = random.uniform(size=25)
        predicted_mask = mask == 1 if k == 0 else np.zeros(mask.shape)
        sums |= {
            f"{centre}/covid/hist": compute_score_histogram(score, truth, 16),
            f"{centre}/finding/confusion": np.diag([rows / 2, rows / 2, 0]),
            f"{centre}/brixia/regression": compute_regression_sums(target + (k + 1) / 10, target),
            f"{centre}/lesion/overlap": compute_overlap_sums(predicted_mask, mask),
            f"{centre}/infection/overlap": compute_overlap_sums(np.ones(mask.shape), mask),
        }
        if centre != "south":
            severity = 4 * fraction if centre == "north" else 1 - fraction
            sums[f"{centre}/lesion/joint"] = compute_joint_histogram(
                fraction, severity, AFFECTED_FRACTION_EDGES, SEVERITY_EDGES
            )
        for task in TASKS:
            sums[f"{centre}/{task}/loss"] = np.array([rows * (0.5 + k), rows], float)
    return sums


def test_every_task_type_is_scored_and_a_centre_without_labels_does_not_lower_the_mean() -> None:
    scores = score_tables.compute_scores(make_sums(), CONFIG, list(TASKS), with_sums=True)
    json.dumps({task: dataclasses.asdict(scores[task]) for task in TASKS}, allow_nan=False)
    for task in TASKS:
        assert scores[task].pooled["n"] == 50
        west = scores[task].centres["west"]
        assert west.metrics["n"] == 0
        assert west.loss is None
        undefined = {name for name, value in west.metrics.items() if value is None} - {"loss"}
        assert undefined <= west.reasons.keys()
    assert scores["brixia"].macro["mae"] == pytest.approx(0.15)
    assert scores["brixia"].pooled["mae"] == pytest.approx((20 * 0.1 + 30 * 0.2) / 50)
    assert scores["brixia"].worst["mae"] == WorstCentre(pytest.approx(0.2), "south")  # type: ignore[arg-type]
    assert scores["lesion"].macro["dice"] == pytest.approx(0.5)
    assert scores["lesion"].centres["south"].reasons["precision"] == "no pixel was predicted as affected"
    assert scores["finding"].macro["gmean"] == 1
    assert scores["moco"].macro == {"loss": pytest.approx(1.0)}
    assert scores["moco"].pooled["loss"] == pytest.approx((20 * 0.5 + 30 * 1.5) / 50)


def test_spearman_is_a_metric_only_of_a_segmentation_with_a_severity_column() -> None:
    scores = score_tables.compute_scores(make_sums(), CONFIG, list(TASKS))
    lesion = scores["lesion"]
    assert lesion.centres["north"].metrics["spearman"] == pytest.approx(1, abs=0.02)
    assert lesion.centres["west"].metrics["spearman"] == pytest.approx(-1, abs=0.02)  # needs no mask
    assert lesion.centres["south"].metrics["spearman"] is None
    assert lesion.centres["south"].reasons["spearman"] == "severity is known for 0 scans"
    assert lesion.macro["spearman"] == pytest.approx(0, abs=0.02)
    assert lesion.pooled["spearman"] is not None
    assert -1 < lesion.pooled["spearman"] < 1
    assert "spearman" not in scores["infection"].pooled


def test_selection_score_is_none_where_the_stage_lacks_the_task_or_the_metric() -> None:
    scores = score_tables.compute_scores(make_sums(), CONFIG, list(TASKS))
    by_worst = EvaluationConfig(task="lesion", metric="dice", reduction="worst")
    assert score_tables.get_selection_score(scores, CONFIG.evaluation) == pytest.approx(0.5)
    assert score_tables.get_selection_score(scores, by_worst) == 0
    assert score_tables.get_centre_score(scores, CONFIG.evaluation, ["north", "south"]) == pytest.approx(0.5)
    moco_scores = score_tables.compute_scores(make_sums(), CONFIG, ["moco"])
    for evaluation in (CONFIG.evaluation, EvaluationConfig(task="moco", metric="auc")):
        assert score_tables.get_selection_score(moco_scores, evaluation) is None
        assert score_tables.get_centre_score(moco_scores, evaluation, ["north"]) is None


def test_summary_falls_back_to_the_primary_metric_of_the_first_task() -> None:
    scores = score_tables.compute_scores(make_sums(), CONFIG, list(TASKS))
    moco_scores = score_tables.compute_scores(make_sums(), CONFIG, ["moco"])
    empty_sums = {key: 0 * array for key, array in make_sums().items()}
    undefined = score_tables.compute_scores(empty_sums, CONFIG, ["moco"])
    summary = score_tables.format_summary
    assert summary(moco_scores, "covid", "auc") == "moco loss  macro 1.000  worst 1.500 (south)"
    assert summary(scores, "lesion", "dice") == "lesion dice  macro 0.500  worst 0.000 (south)"
    assert summary({}, "covid", "auc") == ""
    assert summary(undefined, "covid", "auc") == "moco loss undefined"


def test_scores_hold_the_sums_only_where_asked_to() -> None:
    with_sums = score_tables.compute_scores(make_sums(), CONFIG, list(TASKS), with_sums=True)
    without_sums = score_tables.compute_scores(make_sums(), CONFIG, list(TASKS))
    assert with_sums["covid"].sums.keys() == {"north", "south", "west"}
    assert not without_sums["covid"].sums
    for task in TASKS:
        assert dataclasses.replace(with_sums[task], sums={}) == without_sums[task]


def test_label_counts_are_grouped_by_the_classes_of_each_task_type() -> None:
    member = JoinReply("north", ["north"], "", [], [], {"train": 3}, {}, {}, "cpu")
    label_counts = {
        f"north/train/{task}": np.array([1.0] * cells)
        for task, cells in (("covid", 3), ("finding", 4), ("brixia", 2), ("moco", 2))
    }
    result = score_tables.create_result("r", CONFIG, {"north": member}, label_counts)
    counts = result.centres["north"].counts["train"]
    assert list(counts["covid"]) == ["no covid", "covid", "unlabelled"]
    assert list(counts["finding"]) == ["none", "typical", "other", "unlabelled"]
    assert counts["brixia"] == counts["moco"] == {"labelled": 1.0, "unlabelled": 1.0}
