"""The noise on label counts under `privacy=patient`: how large it is, and what noisy counts are good for.

A noisy count is never taken at its word. That it is 0 does not mean that there is no scan, so who takes part
in a task follows from the label columns that a centre names. Weights and priors use estimates, never 0.
"""

from __future__ import annotations

import math
from collections.abc import Collection

import numpy as np
from numpy.typing import ArrayLike, NDArray

from common.config.schema import Config, PrivacyConfig, Task
from common.learning.losses import task_label_columns


def find_count_noise_multiplier(privacy: PrivacyConfig) -> float:
    """Return the noise multiplier of label counts: that of counts or of scores, whichever is larger.

    It is 0 where counts are exact, which they are in no run with `privacy=patient`.
    """
    if privacy.dp_level != "patient":
        return 0.0
    return max(privacy.count_noise_multiplier, privacy.query_noise_multiplier)


def query_sensitivity(config: Config) -> float:
    """Return how far one patient moves an answer, in L2 norm.

    A scan adds 1 to one cell of each task's table, and `privacy.max_scans_per_patient` scans of a patient
    count.
    """
    return config.privacy.max_scans_per_patient * math.sqrt(len(config.tasks))


def count_noise_std(config: Config) -> float:
    """Return the standard deviation of the noise on a label count, in scans; 0 where counts are exact."""
    return find_count_noise_multiplier(config.privacy) * query_sensitivity(config)


def estimate_counts(noisy_counts: ArrayLike, config: Config) -> NDArray[np.float64]:
    """Return counts [cells] for weights and priors; one below the noise's standard deviation stands as that.

    Exact counts are returned as they are.
    """
    return np.maximum(np.asarray(noisy_counts, dtype=np.float64), count_noise_std(config))


def has_label_columns(columns: Collection[str], name: str, task: Task) -> bool:
    """Return whether a centre with these label columns has labels for a task; some tasks need none."""
    return set(task_label_columns(name, task)) <= set(columns)
