"""Tables from the sums of centres that hold different labels, for every kind of task."""

from __future__ import annotations

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


def arrived() -> Sums:
    """What two centres with labels and a third without any send; `west` knows severities but has no mask."""
    random = np.random.default_rng(0)
    sums: Sums = {}
    for k, c in enumerate(("north", "south", "west")):
        rows = [20, 30, 0][k]
        truth, score = random.integers(0, 2, rows).astype(float), random.normal(size=rows)
        target = random.normal(size=(rows, 2))
        mask = random.integers(0, 2, (rows, 1, 4, 4)).astype(np.uint8)
        share = random.uniform(size=25)
        sums |= {
            f"{c}/covid/hist": compute_score_histogram(score, truth, 16),
            f"{c}/finding/confusion": np.diag([rows / 2, rows / 2, 0]),
            f"{c}/brixia/regression": compute_regression_sums(target + (k + 1) / 10, target),
            f"{c}/lesion/overlap": compute_overlap_sums(mask == 1 if k == 0 else np.zeros(mask.shape), mask),
            f"{c}/infection/overlap": compute_overlap_sums(np.ones(mask.shape), mask),
        }
        if c != "south":
            sums[f"{c}/lesion/joint"] = compute_joint_histogram(
                share, 4 * share if c == "north" else 1 - share, AFFECTED_FRACTION_EDGES, SEVERITY_EDGES
            )
        for task in TASKS:
            sums[f"{c}/{task}/loss"] = np.array([rows * (0.5 + k), rows], float)
    return sums


def test_every_kind_has_its_metrics_and_a_centre_without_labels_drags_none() -> None:
    got = score_tables.score_table(arrived(), CONFIG, list(TASKS), with_sums=True)
    json.dumps(got, allow_nan=False)
    for task in TASKS:
        assert got[task]["pooled"]["n"] == 50
        assert got[task]["centres"]["west"]["n"] == 0
        assert got[task]["centres"]["west"]["loss"] is None
        undefined = {name for name, value in got[task]["centres"]["west"].items() if value is None} - {"loss"}
        assert undefined <= got[task]["centres"]["west"]["reasons"].keys()
    assert got["brixia"]["macro"]["mae"] == pytest.approx(0.15)
    assert got["brixia"]["pooled"]["mae"] == pytest.approx((20 * 0.1 + 30 * 0.2) / 50)
    assert got["brixia"]["worst"]["mae"] == {"value": pytest.approx(0.2), "centre": "south"}
    assert got["lesion"]["macro"]["dice"] == pytest.approx(0.5)
    assert got["lesion"]["centres"]["south"]["reasons"]["precision"] == "no pixel was called affected"
    assert got["finding"]["macro"]["gmean"] == 1
    assert got["moco"]["macro"] == {"loss": pytest.approx(1.0)}
    assert got["moco"]["pooled"]["loss"] == pytest.approx((20 * 0.5 + 30 * 1.5) / 50)


def test_rank_agreement_is_a_metric_of_the_segmentation_with_a_burden_only() -> None:
    got = score_tables.score_table(arrived(), CONFIG, list(TASKS))
    lesion = got["lesion"]
    assert lesion["centres"]["north"]["spearman"] == pytest.approx(1, abs=0.02)
    assert lesion["centres"]["west"]["spearman"] == pytest.approx(-1, abs=0.02)  # known without a mask
    assert lesion["centres"]["south"]["spearman"] is None
    assert lesion["centres"]["south"]["reasons"]["spearman"] == "severity is known of 0 scans"
    assert lesion["macro"]["spearman"] == pytest.approx(0, abs=0.02)
    assert -1 < lesion["pooled"]["spearman"] < 1
    assert "spearman" not in got["infection"]["pooled"]


def test_what_chooses_is_none_where_the_stage_has_no_such_task_or_metric() -> None:
    got = score_tables.score_table(arrived(), CONFIG, list(TASKS))
    assert score_tables.selection_score(got, CONFIG.evaluation) == pytest.approx(0.5)
    assert (
        score_tables.selection_score(got, EvaluationConfig(task="lesion", metric="dice", reduction="worst"))
        == 0
    )
    assert score_tables.centre_score(got, CONFIG.evaluation, ["north", "south"]) == pytest.approx(0.5)
    only = score_tables.score_table(arrived(), CONFIG, ["moco"])
    for evaluation in (CONFIG.evaluation, EvaluationConfig(task="moco", metric="auc")):
        assert score_tables.selection_score(only, evaluation) is None
        assert score_tables.centre_score(only, evaluation, ["north"]) is None
    assert score_tables.summary_line(only, "covid", "auc") == "moco loss  macro 1.000  worst 1.500 (south)"
    assert score_tables.summary_line(got, "lesion", "dice") == "lesion dice  macro 0.500  worst 0.000 (south)"
    assert score_tables.summary_line({}, "covid", "auc") == ""
    nothing = {key: 0 * array for key, array in arrived().items()}
    assert (
        score_tables.summary_line(score_tables.score_table(nothing, CONFIG, ["moco"]), "covid", "auc")
        == "moco loss undefined"
    )


def test_sums_stay_out_of_what_is_kept_each_round() -> None:
    full, bare = (
        score_tables.score_table(arrived(), CONFIG, list(TASKS), with_sums=s) for s in (True, False)
    )
    assert {"hist"} <= full["covid"].keys() - bare["covid"].keys()
    assert score_tables.drop_sums(full) == bare


def test_a_centre_counts_its_scans_in_the_cells_of_each_kind() -> None:
    said = JoinReply("north", ["north"], "", [], [], {"train": 3}, {}, {}, "cpu")
    counts = {
        f"north/train/{task}": np.array([1.0] * cells)
        for task, cells in (("covid", 3), ("finding", 4), ("brixia", 2), ("moco", 2))
    }
    held = score_tables.create_result("r", CONFIG, {"north": said}, counts)["centres"]["north"]["counts"][
        "train"
    ]
    assert list(held["covid"]) == ["no covid", "covid", "unlabelled"]
    assert list(held["finding"]) == ["none", "typical", "other", "unlabelled"]
    assert held["brixia"] == held["moco"] == {"labelled": 1.0, "unlabelled": 1.0}
