"""Count the labelled scans of each class."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from client.data.dataset import ScanDataset
from client.federation.query_context import QueryContext
from client.site.small_cells import raise_small_counts
from common.config.schema import Config
from common.learning.losses import class_names
from common.protocol.messages import Sums
from common.protocol.sum_key import LabelCountKey


def count_classes(
    targets: NDArray[np.float64], num_classes: int, min_cell_count: int = 1
) -> NDArray[np.float64]:
    """Count the scans in each class [K], then the unlabelled ones: [K + 1].

    `targets` is [N], or [N, R] of a regression, whose labelled scans all count as one class. A count above 0
    and below `min_cell_count` stands as `min_cell_count`.
    """
    is_labelled = np.isfinite(targets)
    if targets.ndim > 1:
        is_labelled = np.asarray(is_labelled.all(axis=1))
    if num_classes > 1:
        classes = targets[is_labelled].astype(int)
    else:
        classes = np.zeros(int(is_labelled.sum()), int)
    by_class = np.bincount(classes, minlength=num_classes)
    counts = np.append(by_class, len(targets) - len(classes)).astype(np.float64)
    return raise_small_counts(counts, min_cell_count)


def sum_label_counts(context: QueryContext) -> Sums:
    """Answer query `counts`: the classes of every cohort, split and task."""
    return count_labels(context.datasets, context.config, context.min_cell_count)


def count_labels(datasets: Mapping[str, ScanDataset], config: Config, min_cell_count: int) -> Sums:
    """Count the classes of every cohort, split and task: {LabelCountKey: [K + 1]}."""
    sums: Sums = {}
    for split, dataset in datasets.items():
        cohort_of_scan = np.array(dataset.centres)
        for cohort in sorted(set(dataset.centres)):
            is_own = cohort_of_scan == cohort
            for name, task in config.tasks.items():
                num_classes = len(class_names(name, task))
                counts = count_classes(dataset.targets[name][is_own], num_classes, min_cell_count)
                sums[str(LabelCountKey(cohort, split, name))] = counts
    return sums
