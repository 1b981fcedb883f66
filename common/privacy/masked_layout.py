"""Give every centre's reply to a query the same keys and shapes, as a secure sum needs.

No centre is named in a secure sum: its sums count as those of the cohort `all`.
"""

from __future__ import annotations

import numpy as np

from common.config.normalise import stage_tasks
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
from common.protocol.sum_key import LabelCountKey, LabelWeightKey, SumKey, replace_cohort
from common.utils.errors import RefusalCode, Refused

SPLITS = ("train", "val", "test")
NO_VALUES = np.empty(0)


def empty_sums(query: StatisticsRequest, config: Config, layout: Layout) -> Sums:
    """Return {key: zeros} of a query's reply (client/federation/query_handlers.py) for the cohort `all`.

    Raises:
        Refused: The query is unknown, or cannot be part of a secure sum.
    """
    if query.name == "counts":
        return _empty_counts(config)
    if query.name == "scores":
        return _empty_scores(query.stage, config)
    if query.name == "moments":
        num_classes, num_features = _find_head_shape(query.task, layout)
        return {
            "n": np.zeros(num_classes),
            "sum": np.zeros((num_classes, num_features)),
            "square": np.zeros((num_features, num_features)),
        }
    if query.name == "clusters" and query.centroids is not None:
        num_clusters, num_features = query.centroids.shape
        return {
            "n": np.zeros(num_clusters),
            "sum": np.zeros((num_clusters, num_features)),
            "square": np.zeros(num_clusters),
        }
    raise Refused(f"query '{query.name}' cannot be answered in a secure sum")


def _empty_counts(config: Config) -> Sums:
    """Return zeros for the counts of every task and split, and for the weights that are derived from them."""
    sums: Sums = {}
    for split in SPLITS:
        for name, task in config.tasks.items():
            num_counts = len(class_names(name, task)) + 1  # the last one is of unlabelled scans
            sums[str(LabelCountKey(COMBINED_COHORT, split, name))] = np.zeros(num_counts)
    for name in config.tasks:
        sums[str(LabelWeightKey(COMBINED_COHORT, name))] = np.zeros(1)
    return sums


def _empty_scores(stage: str, config: Config) -> Sums:
    """Return zeros for the scores of every task of a stage."""
    sums: Sums = {}
    for name in stage_tasks(config, config.stages[stage]):
        score_sums = empty_score_sums(config.tasks[name], config.evaluation.histogram_bins)
        for statistic, zeros in score_sums.items():
            sums[str(SumKey(COMBINED_COHORT, name, statistic))] = zeros
    return sums


def _find_head_shape(task: str, layout: Layout) -> tuple[int, int]:
    """Return (classes, features) of a task's linear head."""
    for slot in layout.floats:
        if slot.group == task and len(slot.shape) == 2:
            num_classes, num_features = slot.shape
            return num_classes, num_features
    raise Refused(f"task '{task}' has no linear head, which query 'moments' needs")


def empty_score_sums(task: Task, num_bins: int) -> Sums:
    """Return {statistic: zeros} of the sums from which a task's metrics are computed."""
    sums: Sums = {"loss": np.zeros(2)}
    if task.type == "binary":
        sums["hist"] = compute_score_histogram(NO_VALUES, NO_VALUES, num_bins)
    elif task.type == "multiclass":
        sums["confusion"] = np.zeros((output_dim(task), output_dim(task)))
    elif task.type == "regression":
        no_rows = np.empty((0, output_dim(task)))
        sums["regression"] = compute_regression_sums(no_rows, no_rows)
    elif task.type == "segmentation":
        if task.severity_column:
            sums["joint"] = compute_joint_histogram(
                NO_VALUES, NO_VALUES, AFFECTED_FRACTION_EDGES, SEVERITY_EDGES
            )
        no_masks = np.empty((0, 1), np.uint8)
        sums["overlap"] = compute_overlap_sums(no_masks == 1, no_masks)
    return sums


def anonymise_keys(sums: Sums, template: Sums) -> Sums:
    """Return a centre's sums under the template's keys, those of its cohorts added as the cohort `all`.

    Raises:
        Refused: The template has no sum of that key and shape.
    """
    anonymous = {key: zeros.copy() for key, zeros in template.items()}
    for key, array in sums.items():
        template_key = replace_cohort(key, COMBINED_COHORT)
        if template_key not in anonymous or anonymous[template_key].shape != np.shape(array):
            name = key.rpartition("/")[2]
            raise Refused(
                f"the reply contains a sum '{name}' that is not part of this secure sum",
                RefusalCode.BAD_REPLY,
            )
        anonymous[template_key] += array
    return anonymous
