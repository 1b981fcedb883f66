"""What the answer to a query looks like when nothing is in it: in a secure sum every centre's vector must have the same places.

No centre has a name there: its sums count as those of the cohort `all`.
"""

from __future__ import annotations

import numpy as np

from common.config.compose import stage_tasks
from common.config.schema import Config, Task
from common.learning.losses import class_names, output_dim
from common.learning.metrics import compute_regression_sums, compute_score_histogram
from common.learning.segmentation_metrics import (
    AFFECTED_FRACTION_EDGES,
    SEVERITY_EDGES,
    compute_joint_histogram,
    compute_overlap_sums,
)
from common.modeling.parameters import Layout
from common.privacy.secure_aggregation import COMBINED_COHORT
from common.protocol.messages import StatisticsRequest, Sums
from common.utils.errors import Refused

SPLITS = ("train", "val", "test")
NO_VALUES = np.empty(0)


def empty_sums(query: StatisticsRequest, config: Config, layout: Layout) -> Sums:
    """{key: zeros} of a query's answer (client/federation/query_handlers.py), `cohort` being `all`; counts also have the masses behind the centres' weights.

    Raises Refused for a query that is none of ours.
    """
    if query.name == "counts":
        cells = {t: len(class_names(t, task)) + 1 for t, task in config.tasks.items()}
        found = {f"{COMBINED_COHORT}/{split}/{t}": np.zeros(n) for split in SPLITS for t, n in cells.items()}
        return found | {f"{COMBINED_COHORT}/mass/{t}": np.zeros(1) for t in cells}
    if query.name == "scores":
        tasks = {t: config.tasks[t] for t in stage_tasks(config, config.stages[query.stage])}
        return {
            f"{COMBINED_COHORT}/{t}/{what}": sums
            for t, task in tasks.items()
            for what, sums in empty_score_sums(task, config.evaluation.histogram_bins).items()
        }
    if query.name == "moments":
        k, d = next(e.shape for e in layout.floats if e.group == query.task and len(e.shape) == 2)
        return {"n": np.zeros(k), "sum": np.zeros((k, d)), "square": np.zeros((d, d))}
    if query.name == "clusters" and query.centroids is not None:
        k, d = query.centroids.shape
        return {"n": np.zeros(k), "sum": np.zeros((k, d)), "square": np.zeros(k)}
    raise Refused(f"query '{query.name}' cannot be answered in a secure sum")


def empty_score_sums(task: Task, num_bins: int) -> Sums:
    """{what: zeros} that a model is measured by at a task."""
    loss = {"loss": np.zeros(2)}
    if task.type == "binary":
        return loss | {"hist": compute_score_histogram(NO_VALUES, NO_VALUES, num_bins)}
    if task.type == "multiclass":
        return loss | {"confusion": np.zeros((output_dim(task), output_dim(task)))}
    if task.type == "regression":
        none = np.empty((0, output_dim(task)))
        return loss | {"regression": compute_regression_sums(none, none)}
    if task.type == "segmentation":
        pixels = np.empty((0, 1), np.uint8)
        joint = (
            {"joint": compute_joint_histogram(NO_VALUES, NO_VALUES, AFFECTED_FRACTION_EDGES, SEVERITY_EDGES)}
            if task.severity_column
            else {}
        )
        return loss | joint | {"overlap": compute_overlap_sums(pixels == 1, pixels)}
    return loss


def anonymise_keys(sums: Sums, template: Sums) -> Sums:
    """A centre's sums in the places of `empty`, its cohorts' names replaced. Raises Refused for a sum that has no place there."""
    found = {key: array.copy() for key, array in template.items()}
    for key, array in sums.items():
        place = f"{COMBINED_COHORT}/{key.partition('/')[2]}" if "/" in key else key
        if place not in found or found[place].shape != np.shape(array):
            raise Refused(f"its answer has a '{key.rpartition('/')[2]}' that no other centre's would have")
        found[place] += array
    return found
