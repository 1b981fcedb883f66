"""Compute metrics of a regression from nine sums over its scans."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.learning.metrics.shared import (
    NO_LABELLED_SCANS,
    Array,
    Metrics,
    check_not_nan,
    divide_or_none,
    flatten_rows,
    undefined_names,
)


class RegressionSums(NamedTuple):
    """Sums over the labels y, predictions p and errors p - y of labelled scans, in the array's order."""

    scans: float
    values: float
    absolute_errors: float
    squared_errors: float
    labels: float
    squared_labels: float
    predictions: float
    squared_predictions: float
    products: float  # of prediction and label

    @property
    def label_variation(self) -> float:
        """The sum of (y - mean y)^2."""
        return _sum_squared_deviations(self.values, self.labels, self.squared_labels)

    @property
    def prediction_variation(self) -> float:
        """The sum of (p - mean p)^2."""
        return _sum_squared_deviations(self.values, self.predictions, self.squared_predictions)


def compute_regression_sums(predicted: NDArray[Any], target: NDArray[Any]) -> Array:
    """Compute the sums [9], in the order of `RegressionSums`, of predictions and labels [N, R].

    A row with a NaN among its labels is dropped.

    Raises:
        ConsiliumError: The prediction of a labelled scan is NaN.
    """
    predictions = flatten_rows(np.asarray(predicted, np.float64))
    labels = flatten_rows(np.asarray(target, np.float64))
    labelled = ~np.isnan(labels).any(1)
    predictions = predictions[labelled]
    labels = labels[labelled]
    check_not_nan(predictions)
    errors = predictions - labels
    sums = RegressionSums(
        scans=len(labels),
        values=labels.size,
        absolute_errors=np.abs(errors).sum(),
        squared_errors=(errors**2).sum(),
        labels=labels.sum(),
        squared_labels=(labels**2).sum(),
        predictions=predictions.sum(),
        squared_predictions=(predictions**2).sum(),
        products=(predictions * labels).sum(),
    )
    return np.array(sums, np.float64)


def compute_regression_metrics(sums: Array) -> Metrics:
    """Compute metrics of all columns together from their sums [9].

    `mae` and `rmse` are in the labels' unit; `r2` = 1 - sum (p - y)^2 / sum (y - mean y)^2; `pearson` is the
    correlation.
    """
    totals = RegressionSums(*map(float, sums))
    label_variation = totals.label_variation
    prediction_variation = totals.prediction_variation
    metrics: Metrics = {
        "n": totals.scans,
        "mae": divide_or_none(totals.absolute_errors, totals.values),
        "rmse": None,
        "r2": None,
        "pearson": None,
    }
    if totals.values:
        metrics["rmse"] = math.sqrt(totals.squared_errors / totals.values)
    if label_variation:
        metrics["r2"] = 1 - totals.squared_errors / label_variation
    if label_variation and prediction_variation:
        covariation = totals.products - totals.predictions * totals.labels / totals.values
        metrics["pearson"] = covariation / math.sqrt(label_variation * prediction_variation)
    return metrics


def explain_undefined_regression(sums: Array) -> dict[str, str]:
    """Return {metric: reason} for the metrics of `compute_regression_metrics` that are None."""
    totals = RegressionSums(*map(float, sums))
    if not totals.values:
        reason = NO_LABELLED_SCANS
    elif not totals.label_variation:
        reason = "the labels are all the same"
    else:
        reason = "the predictions are all the same"
    return dict.fromkeys(undefined_names(compute_regression_metrics(sums)), reason)


def _sum_squared_deviations(count: float, total: float, squares: float) -> float:
    """Return the sum of (x - mean x)^2; exactly 0 when only rounding errors are left of it."""
    if not count:
        return 0.0
    deviations = squares - total**2 / count
    return deviations if deviations > 1e-12 * squares else 0.0
