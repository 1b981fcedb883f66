"""Names of metrics, views and splits as reports show them, and how numbers and durations are written."""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Any, NamedTuple

THIN_SPACE = "\u2009"


class MetricColumn(NamedTuple):
    """How a metric is shown."""

    name: str
    short_name: str = ""  # in the terminal and the model card, which leave out a metric without one
    decimals: int = 3


# The metrics of all task types, in the order of a table's columns.
METRIC_COLUMNS = {
    "n": MetricColumn("scans", "scans", 0),
    "positives": MetricColumn("positive", "pos.", 0),
    "auc": MetricColumn("ROC-AUC", "AUC"),
    "f1": MetricColumn("F1", "F1"),
    "dice": MetricColumn("Dice", "Dice"),
    "dice_affected": MetricColumn("Dice where affected", "Dice aff."),
    "dice_pixels": MetricColumn("Dice of all pixels", "Dice pix."),
    "sensitivity": MetricColumn("sensitivity", "sens."),
    "specificity": MetricColumn("specificity", "spec."),
    "precision": MetricColumn("precision"),
    "balanced_accuracy": MetricColumn("balanced accuracy", "bal. acc."),
    "gmean": MetricColumn("G-mean"),
    "accuracy": MetricColumn("accuracy"),
    "mae": MetricColumn("mean absolute error", "MAE"),
    "rmse": MetricColumn("root mean squared error", "RMSE"),
    "r2": MetricColumn("R²", "R²"),
    "pearson": MetricColumn("Pearson's r", "r"),
    "spearman": MetricColumn("Spearman's rho", "rho"),
    "ece": MetricColumn("calibration error", "cal. err."),
    "brier": MetricColumn("Brier score"),
    "loss": MetricColumn("loss"),
}


class View(StrEnum):
    """A way to summarise a metric over centres: the fields of `server.run.records.TaskScores`."""

    MACRO = "macro"
    POOLED = "pooled"
    WORST = "worst"
    SPREAD = "spread"


VIEW_LABELS = {
    View.MACRO: "mean of centres",
    View.POOLED: "pooled",
    View.WORST: "worst centre",
    View.SPREAD: "spread",
}
SPLIT_LABELS = {"train": "training", "val": "validation", "test": "test"}


def describe_metric(metric: str) -> MetricColumn:
    """Return how a metric is shown; an unknown metric is shown by its own name."""
    return METRIC_COLUMNS.get(metric, MetricColumn(metric))


def label_metric(metric: str) -> str:
    """Return a metric's name for people."""
    return describe_metric(metric).name


def to_finite_float(value: Any) -> float | None:
    """Return a finite number as a float, and None for anything else."""
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    return None


def format_number(value: Any, decimals: int = 3) -> str | None:
    """Write a finite number with thin spaces between thousands; return None for anything else."""
    number = to_finite_float(value)
    if number is None:
        return None
    return f"{number:,.{decimals}f}".replace(",", THIN_SPACE)


def format_number_or_dash(value: Any, decimals: int = 3) -> str:
    """Write a finite number as `format_number` does, and a dash for anything else."""
    return format_number(value, decimals) or "–"


def format_duration(seconds: float) -> str:
    """Write a duration for people: ``1 h 2 min``, ``2 min 3 s``, ``3.4 s``."""
    total_minutes, remaining_seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(total_minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    if minutes:
        return f"{minutes} min {remaining_seconds} s"
    return f"{seconds:.1f} s"


def count_noun(count: int, noun: str) -> str:
    """Write a count with its noun: ``1 round``, ``3 rounds``."""
    if count == 1:
        return f"1 {noun}"
    return f"{count} {noun}s"
