"""Types and small functions that the metrics of all kinds of tasks use."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.utils.errors import ConsiliumError

Array = NDArray[np.float64]
Metrics = dict[str, float | None]

NO_LABELLED_SCANS = "no labelled scans"


def divide_or_none(numerator: float, denominator: float) -> float | None:
    """Return the quotient, or None when the denominator is not positive."""
    return numerator / denominator if denominator > 0 else None


def compute_f1(tp: float, fp: float, fn: float) -> float | None:
    """Return the F1 score of a class from its true positives, false positives and false negatives.

    It is None for a class without scans, even when false positives alone would make it 0.
    """
    return 2 * tp / (2 * tp + fp + fn) if tp + fn > 0 else None


def undefined_names(metrics: Mapping[str, float | None]) -> list[str]:
    """Return the names of the metrics that are None."""
    return [name for name, value in metrics.items() if value is None]


def flatten_rows(values: NDArray[Any]) -> NDArray[Any]:
    """Reshape [N, ...] or [N] to [N, values per row]."""
    return values.reshape(len(values), math.prod(values.shape[1:]))


def check_not_nan(predicted: NDArray[Any]) -> None:
    """Check the predictions [N, ...] of labelled scans.

    Raises:
        ConsiliumError: A prediction is NaN.
    """
    num_nan = int(np.isnan(flatten_rows(predicted)).any(1).sum())
    if num_nan:
        raise ConsiliumError(
            f"the model's output is not a number for {num_nan} of {len(predicted)} scans: "
            "training diverged, lower the learning rate"
        )
