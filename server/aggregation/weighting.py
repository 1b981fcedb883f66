"""The weight of each centre in each parameter group, from the labels that it holds."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import ArrayLike

from common.config.schema import AggregationConfig, Task
from common.learning.class_imbalance import compute_centre_weights, weights_by_group
from common.learning.losses import uses_feature_map

GroupWeights = Mapping[str, Mapping[str, float]]  # {parameter group: {centre: weight}}


def compute_group_weights(
    counts: Mapping[str, Mapping[str, ArrayLike]], settings: AggregationConfig, tasks: Mapping[str, Task]
) -> dict[str, dict[str, float]]:
    """Return {"backbone", "decoder" or head: {centre: weight}}.

    A head's weights follow the scans that are labelled for its task, so that a centre without such labels
    never dilutes it; those of the shared groups combine the tasks' weights (`weights_by_group`).

    Args:
        counts: {centre: {task: training scans per class, then unlabelled [K + 1]}}.
        settings: what is counted (`weight_by`) and how much size matters (`tau`).
        tasks: the stage's tasks.
    """
    weights: dict[str, dict[str, float]] = {}
    for task in tasks:
        cells = {}
        for centre, centre_counts in counts.items():
            labelled_scans = np.asarray(centre_counts[task], dtype=np.float64)[:-1]
            if settings.weight_by == "scans":
                labelled_scans = labelled_scans.sum(keepdims=True)
            cells[centre] = labelled_scans
        weights[task] = compute_centre_weights(cells, settings.tau)
    labelled_tasks = [task for task in tasks if sum(weights[task].values()) > 0]
    shared_weights: dict[str, dict[str, float]] = {"backbone": {}}
    if any(map(uses_feature_map, tasks.values())):
        shared_weights["decoder"] = {}
    for centre in counts:
        task_weights = {task: weights[task][centre] for task in labelled_tasks}
        centre_weights = weights_by_group(task_weights, tasks)
        for group, shared in shared_weights.items():
            shared[centre] = centre_weights[group]
    return shared_weights | weights
