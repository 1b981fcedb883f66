"""Add noise to counts (`privacy.count_noise_multiplier`) and scores (`query_noise_multiplier`).

A scan adds 1 to one cell of each task's table, and at most `privacy.max_scans_per_patient` scans of a patient
count. So a patient changes an answer by at most `max_scans_per_patient * sqrt(tasks)` in L2 norm. Every cell
gets Gaussian noise of the noise multiplier times that, which is charged to the same budget as training
(client/site/privacy_budget.py). Which cells there are depends on the configuration alone.

What follows costs no more privacy. Cells are rounded to whole numbers, so that the low bits of a float reveal
nothing (Mironov, "On significance of the least significant bits for differential privacy", CCS 2012).
Histograms are made non-negative with the same noisy sum (norm-sub: Wang et al., "Locally differentially
private frequency estimation with consistency", NDSS 2020). Small cells are suppressed. A sum of losses has no
such bound, and does not leave.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping

import numpy as np
from numpy.typing import NDArray

from client.data.dataset import ScanDataset
from client.federation.query_context import QueryContext
from client.site.small_cells import raise_small_counts
from common.config.normalise import stage_tasks
from common.config.schema import Config
from common.privacy.accountant import Charge
from common.privacy.count_noise import (
    count_noise_std,
    find_count_noise_multiplier,
    has_label_columns,
    query_sensitivity,
)
from common.privacy.gaussian_noise import secure_gaussian
from common.privacy.masked_layout import empty_score_sums
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


def add_count_noise(counts: Sums, config: Config, min_cell_count: int) -> Sums:
    """Return label counts [K + 1] with noise; one above 0 and below `min_cell_count` stands as that."""
    noisy_counts: Sums = {}
    for key, cells in counts.items():
        rounded = np.rint(np.maximum(_add_gaussian(cells, count_noise_std(config)), 0))
        noisy_counts[key] = raise_small_counts(rounded, min_cell_count)
    return noisy_counts


def empty_scores(query: QueryContext, columns: Mapping[str, Collection[str]]) -> Sums:
    """Return {SumKey: zeros} of all scores that a query may have, by the label columns of each cohort.

    A cohort without a labelled scan sends noise: that it has none is not to be seen.
    """
    scores: Sums = {}
    for cohort, cohort_columns in columns.items():
        for name in stage_tasks(query.config, query.stage):
            task = query.config.tasks[name]
            if not has_label_columns(cohort_columns, name, task):
                continue
            for statistic, zeros in empty_score_sums(task, query.config.evaluation.histogram_bins).items():
                scores[str(SumKey(cohort, name, statistic))] = zeros
    return scores


def add_score_noise(scores: Sums, config: Config) -> Sums:
    """Return histograms [2, bins] and confusion matrices [K, K] with noise, and losses as zero.

    The policy suppresses small cells later (client/site/policy.py).
    """
    noise_std = config.privacy.query_noise_multiplier * query_sensitivity(config)
    noisy_scores: Sums = {}
    for key, cells in scores.items():
        if SumKey.parse(key).statistic == "loss":
            noisy_scores[key] = np.zeros_like(cells)
        else:
            rows = _add_gaussian(cells, noise_std)
            noisy_scores[key] = np.stack([np.rint(project_non_negative(row)) for row in rows])
    return noisy_scores


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


def planned_charges(config: Config) -> tuple[Charge, ...]:
    """Return what an undisturbed run pays for its queries.

    It asks for the counts once. Where scores have noise, it asks for those of validation before the first and
    after every round of a stage, and for those of the test.
    """
    charges = [Charge(find_count_noise_multiplier(config.privacy), 1.0, 1)]
    if config.privacy.query_noise_multiplier:
        num_scores = 1 + sum(stage.rounds + 1 for stage in config.stages.values())
        charges.append(Charge(config.privacy.query_noise_multiplier, 1.0, num_scores))
    return tuple(charges)
