"""Summarise metrics over centres, and choose the metric that represents a task."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import Any

from common.learning.metrics.shared import Array, Metrics, divide_or_none

COUNT_METRICS = ("n", "positives")  # sizes, not performance: their mean or worst value says nothing
LOWER_IS_BETTER = ("ece", "brier", "mae", "rmse", "loss")
PRIMARY_METRICS = (
    "auc",
    "balanced_accuracy",
    "accuracy",
    "dice",
    "r2",
    "mae",
    "loss",
)  # in order of preference


def compute_loss_metrics(sums: Array) -> Metrics:
    """Return {n, loss} of a task that is measured by its loss only, from [2]: summed loss and scans."""
    summed_loss, scans = map(float, sums)
    return {"n": scans, "loss": divide_or_none(summed_loss, scans)}


def explain_undefined_loss(sums: Array) -> dict[str, str]:
    """Return {"loss": reason} when the loss is None, else {}."""
    if sums[1]:
        return {}
    return {"loss": "no scans"}


def summarise_centres(
    per_centre: Mapping[str, Mapping[str, float | None]], pooled: Mapping[str, float | None]
) -> dict[str, dict[str, Any]]:
    """Summarise the centres' metrics; a centre where a metric is undefined does not count for it.

    Returns four views, each by the name of the metric, with None where no centre has it:

    - `macro`: the mean over centres.
    - `pooled`: the metrics of the summed sums, as given.
    - `worst`: {"value", "centre"}, the largest value of a metric in LOWER_IS_BETTER, else the smallest.
    - `spread`: the largest minus the smallest value.
    """
    views: dict[str, dict[str, Any]] = {"macro": {}, "pooled": dict(pooled), "worst": {}, "spread": {}}
    for name in pooled:
        if name in COUNT_METRICS:
            continue
        ranking = _rank_centres(name, per_centre)
        if not ranking:
            views["macro"][name] = None
            views["worst"][name] = {"value": None, "centre": None}
            views["spread"][name] = None
            continue
        values = [value for value, _ in ranking]
        worst_value, worst_centre = ranking[0]
        if name in LOWER_IS_BETTER:
            worst_value, worst_centre = max(ranking, key=lambda pair: pair[0])
        # fsum is exact, so the mean does not depend on the order in which the centres replied.
        views["macro"][name] = math.fsum(values) / len(values)
        views["worst"][name] = {"value": worst_value, "centre": worst_centre}
        views["spread"][name] = values[-1] - values[0]
    return views


def _rank_centres(
    metric: str, per_centre: Mapping[str, Mapping[str, float | None]]
) -> list[tuple[float, str]]:
    """Return (value, centre) of the centres that have a metric, the smallest value first."""
    ranking: list[tuple[float, str]] = []
    for centre, metrics in per_centre.items():
        value = metrics.get(metric)
        if value is not None:
            ranking.append((value, centre))
    return sorted(ranking)


def primary_metric(preferred: str, available: Collection[str]) -> str:
    """Return the metric that represents a task: the preferred one, else the first available of a list."""
    if preferred in available:
        return preferred
    return next((name for name in PRIMARY_METRICS if name in available), preferred)
