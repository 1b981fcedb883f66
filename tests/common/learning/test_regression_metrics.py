"""Regression metrics from sums against scikit-learn and SciPy on the values."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn import metrics as reference

from common.learning.metrics import (
    compute_regression_metrics,
    compute_regression_sums,
    explain_undefined_regression,
)
from common.utils.errors import ConsiliumError


def test_regression_of_three_centres_equals_scikit_learn() -> None:
    random = np.random.default_rng(0)
    target = random.integers(0, 4, (90, 6)).astype(float)
    predicted = (target + random.normal(0, 1, target.shape)).astype(np.float32)
    unlabelled = np.vstack([np.full((2, 6), np.nan), target[:1].copy()])
    unlabelled[2, 3] = np.nan  # one unknown value makes a row unlabelled
    sums = (
        compute_regression_sums(predicted[:40], target[:40])
        + compute_regression_sums(predicted[40:], target[40:])
        + compute_regression_sums(np.full((3, 6), np.nan), unlabelled)
    )
    metrics = compute_regression_metrics(sums)
    predictions = predicted.ravel().astype(float)
    labels = target.ravel()
    assert metrics["n"] == 90
    assert metrics["mae"] == pytest.approx(reference.mean_absolute_error(labels, predictions))
    assert metrics["rmse"] == pytest.approx(reference.root_mean_squared_error(labels, predictions))
    assert metrics["r2"] == pytest.approx(reference.r2_score(labels, predictions))
    assert metrics["pearson"] == pytest.approx(stats.pearsonr(labels, predictions).statistic)
    assert explain_undefined_regression(sums) == {}


def test_nan_prediction_of_a_labelled_scan_is_an_error() -> None:
    predicted = np.array([[np.nan], [1.0], [np.nan]])
    with pytest.raises(ConsiliumError, match="not a number for 1 of 2 scans"):
        compute_regression_sums(predicted, np.array([1.0, 2.0, np.nan]))


def test_equal_labels_give_errors_but_no_correlation() -> None:
    sums = compute_regression_sums(np.array([0.1, 0.7, 0.4]), np.full(3, 0.1))
    metrics = compute_regression_metrics(sums)
    assert metrics["mae"] == pytest.approx(0.3)
    assert metrics["r2"] is metrics["pearson"] is None
    assert set(explain_undefined_regression(sums).values()) == {"the labels are all the same"}


def test_equal_predictions_give_no_correlation() -> None:
    sums = compute_regression_sums(np.full(3, 0.1), np.array([0.1, 0.7, 0.4]))
    assert explain_undefined_regression(sums) == {"pearson": "the predictions are all the same"}


def test_metrics_without_scans_are_undefined() -> None:
    sums = compute_regression_sums(np.zeros((0, 2)), np.zeros((0, 2)))
    metrics = compute_regression_metrics(sums)
    assert metrics == {"n": 0, "mae": None, "rmse": None, "r2": None, "pearson": None}
    assert set(explain_undefined_regression(sums).values()) == {"no labelled scans"}
