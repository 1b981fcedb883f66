"""From a cohort's columns to targets, for every kind of task, and the checks before training."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.data.labels import check_labels, encode_classes, task_targets
from common.config.schema import Task
from common.utils.errors import ConsiliumError

SCORES = st.sampled_from([0.0, 1, 2, 3, float("nan")])


def table(**columns: object) -> pd.DataFrame:
    n = len(next(iter(columns.values())))  # type: ignore[arg-type]
    start = {"scan": [f"s{k}" for k in range(n)], "path": [f"p{k}" for k in range(n)], "split": ["train"] * n}
    return pd.DataFrame({**start, **columns})


def test_targets_by_name_or_number() -> None:
    df = table(
        covid=[1, 0, None, 1],
        severity=["mild", "severe", None, "mild"],
        grade=[1.0, 2.0, None, 2.0],
        odd=[1, 2, 3, None],
    )
    np.testing.assert_array_equal(encode_classes(df, "covid"), [1, 0, np.nan, 1])
    np.testing.assert_array_equal(encode_classes(df, "severity", ["severe", "mild"]), [1, 0, np.nan, 1])
    # names come first, then the numbers of classes
    np.testing.assert_array_equal(encode_classes(df, "grade", ["1", "2"]), [0, 1, np.nan, 1])
    np.testing.assert_array_equal(encode_classes(df, "grade", ["a", "b", "c"]), [1, 2, np.nan, 2])
    assert np.isnan(encode_classes(df, "absent")).all()
    with pytest.raises(ConsiliumError, match="'odd' has 2 values"):
        encode_classes(df, "odd")
    with pytest.raises(ConsiliumError, match="the classes are: mild"):
        encode_classes(df, "severity", ["mild"])


@given(
    st.lists(st.tuples(SCORES, SCORES), min_size=1, max_size=12),
    st.sets(st.integers(-1, 7), min_size=1, max_size=4),
)
def test_a_binned_sum_counts_the_edges_it_exceeds(rows: list[tuple[float, float]], edges: set[int]) -> None:
    df = pd.DataFrame(rows, columns=["left", "right"])
    bin_edges = sorted(map(float, edges))
    classes = list("abcde"[: len(edges) + 1])
    task = Task(type="multiclass", label_columns=["left", "right"], bin_edges=bin_edges, classes=classes)
    for row, got in zip(rows, task_targets(df, "brixia", task), strict=True):
        total = row[0] + row[1]
        assert np.isnan(got) if np.isnan(total) else got == sum(total > e for e in edges)


def test_targets_of_every_kind_of_task() -> None:
    df = table(
        a=[0.0, 3.0, None],
        b=[1.0, None, 2.0],
        covid=[1, 0, None],
        lesion=["a.png", None, "b.png"],
        word=["x", None, "1"],
    )
    zones = Task(type="regression", label_columns=["a", "b"])
    np.testing.assert_array_equal(task_targets(df, "zones", zones), [[0, 1], [3, np.nan], [np.nan, 2]])
    np.testing.assert_array_equal(task_targets(df, "a", Task(type="regression")), [[0], [3], [np.nan]])
    assert np.isnan(
        task_targets(df, "none", Task(type="regression", label_columns=["a", "gone"]))[:, 1]
    ).all()
    np.testing.assert_array_equal(task_targets(df, "covid", Task()), encode_classes(df, "covid"))
    binned = Task(type="multiclass", label_column="a", bin_edges=[0.0, 3.0])
    np.testing.assert_array_equal(task_targets(df, "grade", binned), [0, 1, np.nan])
    for task in (
        Task(type="segmentation", label_column="lesion"),
        Task(type="contrastive"),
        Task(type="inpainting"),
        Task(type="multiclass", num_clusters=[2, 4]),
    ):
        assert np.isnan(task_targets(df, "covid", task)).all()
        assert task_targets(df, "covid", task).shape == (3,)
    with pytest.raises(ConsiliumError, match="'word' has 1 values that are no numbers"):
        task_targets(df, "word", Task(type="regression"))
    with pytest.raises(ConsiliumError, match="2 classes and 2 edges"):
        task_targets(df, "a", Task(type="multiclass", bin_edges=[0.0, 3.0], classes=["low", "high"]))


def test_check_labels_notes_what_is_missing() -> None:
    tasks = {
        "covid": Task(),
        "severity": Task(type="multiclass", classes=["mild", "severe"]),
        "source": Task(type="multiclass"),
    }
    df = table(covid=[1, 1, 0], source=["north"] * 3, patient=["a", "b", "c"])
    df["split"] = ["train", "train", "val"]
    notes = check_labels(df, tasks)
    assert "no scan is in the test split" in notes
    assert any("'severity'" in s and "will not train it" in s for s in notes)
    assert any("'covid' has one class only in train (1)" in s for s in notes)
    assert not any("'source'" in s for s in notes)
    with pytest.raises(ConsiliumError, match="empty"):
        check_labels(df[:0], tasks)
    with pytest.raises(
        ConsiliumError, match="no label for any task; fill at least one of the columns: outcome"
    ):
        check_labels(df, {"death": Task(label_column="outcome")})


def test_check_labels_counts_masks_numbers_and_bins() -> None:
    df = table(lesion=["a.png", None, " "], a=[0.0, 3.0, 9.0], b=[1.0, None, 2.0], patient=["a", "b", "c"])
    df["split"] = ["train", "train", "val"]
    tasks = {
        "affected": Task(type="segmentation", label_column="lesion"),
        "zones": Task(type="regression", label_columns=["a", "b"]),
        "bins": Task(type="multiclass", label_columns=["a", "b"], bin_edges=[4.0], classes=["low", "high"]),
        "moco": Task(type="contrastive"),
    }
    notes = check_labels(df, tasks)
    assert "task 'affected': masks of 1 in train, 0 in val, 0 in test" in notes
    assert "task 'zones': numbers of 1 in train, 1 in val, 0 in test" in notes
    assert any("'bins' has one class only in train (low)" in s for s in notes)
    assert not any("moco" in s for s in notes)
    tasks["else"] = Task(type="segmentation", label_column="gone")
    tasks["sum"] = Task(type="regression", label_columns=["a", "gone"])
    notes = check_labels(df, tasks)
    assert "no scan has a mask for task 'else' (column 'gone'); this centre will not train it" in notes
    assert any("of which 1 are not there (gone)" in s for s in notes)
    assert check_labels(df, {"moco": Task(type="contrastive")})
