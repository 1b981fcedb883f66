"""Count the labelled scans of each class."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from client.data.dataset import ScanDataset
from client.federation.query_context import QueryContext
from common.config.schema import Config
from common.learning.losses import class_names
from common.protocol.messages import Sums
from common.protocol.sum_key import LabelCountKey


def count_classes(targets: NDArray[np.float64], num_classes: int) -> NDArray[np.float64]:
    """Count the scans in each class [K], then the unlabelled ones: [K + 1].

    `targets` is [N], or [N, R] of a regression, whose labelled scans all count as one class.
    """
    is_labelled = np.isfinite(targets)
    if targets.ndim > 1:
        is_labelled = np.asarray(is_labelled.all(axis=1))
    if num_classes > 1:
        classes = targets[is_labelled].astype(int)
    else:
        classes = np.zeros(int(is_labelled.sum()), int)
    by_class = np.bincount(classes, minlength=num_classes)
    return np.append(by_class, len(targets) - len(classes)).astype(np.float64)


def sum_label_counts(context: QueryContext) -> Sums:
    """Answer query `counts`: the classes of every cohort, split and task."""
    return count_labels(context.datasets, context.config)


def count_labels(datasets: Mapping[str, ScanDataset], config: Config) -> Sums:
    """Count the classes of every cohort, split and task: {LabelCountKey: [K + 1]}."""
    sums: Sums = {}
    for split, dataset in datasets.items():
        cohort_of_scan = np.array(dataset.centres)
        for cohort in sorted(set(dataset.centres)):
            is_own = cohort_of_scan == cohort
            for name, task in config.tasks.items():
                counts = count_classes(dataset.targets[name][is_own], len(class_names(name, task)))
                sums[str(LabelCountKey(cohort, split, name))] = counts
    return sums
