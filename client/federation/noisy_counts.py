"""Add noise to counts and histograms (`privacy.query_noise_multiplier`), so that they reveal no patient.

A scan adds 1 to one cell of each task's table, and at most `privacy.max_scans_per_patient` scans of a patient
count. So a patient changes an answer by at most `max_scans_per_patient * sqrt(tasks)` in L2 norm. Every cell
gets Gaussian noise of the noise multiplier times that, which is charged to the same budget as training
(client/site/privacy_budget.py).

What follows costs no more privacy. Cells are rounded to whole numbers, so that the low bits of a float reveal
nothing (Mironov, "On significance of the least significant bits for differential privacy", CCS 2012).
Histograms are made non-negative with the same noisy sum (norm-sub: Wang et al., "Locally differentially
private frequency estimation with consistency", NDSS 2020). Small cells are suppressed. A sum of losses has no
such bound, and does not leave.
"""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
from numpy.typing import NDArray

from client.data.dataset import ScanDataset
from client.site.small_cells import raise_small_counts
from common.config.schema import Config
from common.privacy.gaussian_noise import secure_gaussian
from common.protocol.messages import Sums
from common.protocol.sum_key import SumKey

Floats = NDArray[np.float64]


def cap_scans_per_patient(dataset: ScanDataset, max_scans: int) -> ScanDataset:
    """Return the first `max_scans` scans of each patient."""
    num_scans: Counter[str] = Counter()
    rows = []
    for row, patient in enumerate(dataset.patient_ids):
        num_scans[patient] += 1
        if num_scans[patient] <= max_scans:
            rows.append(row)
    return dataset.subset(np.array(rows, int))


def add_noise(sums: Sums, config: Config, query_name: str, min_cell_count: int) -> Sums:
    """Return the sums of query `counts` or `scores` with noise on every cell.

    Counts are [K + 1]; one above 0 and below `min_cell_count` stands as `min_cell_count`. Scores are
    histograms [2, bins] and confusion matrices [K, K], whose small cells the policy suppresses
    (client/site/policy.py), and losses, which are set to zero.
    """
    privacy = config.privacy
    noise_std = privacy.query_noise_multiplier * privacy.max_scans_per_patient * math.sqrt(len(config.tasks))
    noisy_sums: Sums = {}
    for key, cells in sums.items():
        if query_name == "counts":
            counts = np.rint(np.maximum(_add_gaussian(cells, noise_std), 0))
            noisy_sums[key] = raise_small_counts(counts, min_cell_count)
        elif SumKey.parse(key).statistic == "loss":
            noisy_sums[key] = np.zeros_like(cells)
        else:
            rows = _add_gaussian(cells, noise_std)
            noisy_sums[key] = np.stack([np.rint(project_non_negative(row)) for row in rows])
    return noisy_sums


def _add_gaussian(cells: Floats, std: float) -> Floats:
    noise = secure_gaussian(cells.size).double().numpy().reshape(cells.shape)
    return np.asarray(cells + std * noise)


def project_non_negative(cells: Floats) -> Floats:
    """Return the nearest cells [n] that are not negative and have the same sum, or 0 where that is negative.

    The same number is subtracted from all cells, and what falls below 0 is cut off.
    """
    total = max(float(cells.sum()), 0.0)
    descending = np.sort(cells)[::-1]
    offsets = (np.cumsum(descending) - total) / np.arange(1, len(cells) + 1)
    positive = np.flatnonzero(descending > offsets)
    if not len(positive):
        return np.zeros_like(cells)
    return np.asarray(np.maximum(cells - offsets[positive[-1]], 0.0))


def planned_answers(config: Config) -> int:
    """Return how many queries an undisturbed run asks.

    It asks for the counts, the validation scores before and after every round, and the test scores.
    """
    return 2 + sum(stage.rounds + 1 for stage in config.stages.values())
