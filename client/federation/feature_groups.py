"""Average features over small groups of similar patients, so that sums of features show no single one.

The steps of a clustering ask for sums over ever new parts of the same scans, and the difference of two steps
may be one scan's features. With every scan's features replaced by its group's mean it is a group's.

Source: MDAV (Domingo-Ferrer and Torra, "Ordinal, continuous and heterogeneous k-anonymity through
microaggregation", Data Mining and Knowledge Discovery 11:195, 2005), from one end only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def average_in_groups(features: Floats, patients: Sequence[str], min_patients: int) -> Floats:
    """Return features [N, D], each the mean over the scans of a group of at least `min_patients` patients."""
    names, patient_of_scan = np.unique(np.asarray(patients), return_inverse=True)
    means = np.stack([features[patient_of_scan == index].mean(0) for index in range(len(names))])
    averaged = features.copy()
    for group in _group_similar(means, min_patients):
        is_member = np.isin(patient_of_scan, group)
        averaged[is_member] = features[is_member].mean(0)
    return averaged


def _group_similar(points: Floats, size: int) -> list[NDArray[np.int64]]:
    """Divide points [P, D] into groups of `size`, the last of up to `2 * size - 1`.

    The point farthest from the mean of those left takes its nearest neighbours along.
    """
    remaining = np.arange(len(points))
    groups = []
    while len(remaining) >= 2 * size:
        centre = points[remaining].mean(0)
        farthest = remaining[_squared_distances(points[remaining], centre).argmax()]
        by_distance = np.argsort(_squared_distances(points[remaining], points[farthest]), kind="stable")
        groups.append(remaining[by_distance[:size]])
        remaining = np.sort(remaining[by_distance[size:]])
    groups.append(remaining)
    return groups


def _squared_distances(points: Floats, target: Floats) -> Floats:
    return np.asarray(((points - target) ** 2).sum(1))
