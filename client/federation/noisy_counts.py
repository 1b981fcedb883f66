"""`privacy.query_noise_multiplier`: noise on the counts and histograms a centre answers with, so that no patient can be told from them either.

A scan adds 1 to one cell of each task's table, and of one patient `privacy.max_scans_per_patient` count at most: a patient changes an answer by
`scans * sqrt(tasks)` at most (L2). Every cell gets Gaussian noise of `privacy.query_noise_multiplier` times that, which is charged to the same budget as training
(client/site/privacy_budget.py). What follows costs nothing more: whole numbers (so that nothing is told by a float's low bits: Mironov, CCS 2012), none below 0
while a row keeps its noisy sum (norm-sub: Wang et al., "Locally differentially private frequency estimation with consistency", NDSS 2020), and small
cells suppressed. A sum of losses has no such bound: it does not leave.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from client.data.dataset import ScanDataset
from common.config.schema import Config
from common.privacy.gaussian_noise import secure_gaussian
from common.protocol.messages import Sums

Floats = NDArray[np.float64]


def cap_scans_per_patient(scans: ScanDataset, max_scans: int) -> ScanDataset:
    """The first `most` scans of each patient."""
    seen: dict[str, int] = {}
    rows = []
    for i, patient in enumerate(scans.patient_ids):
        seen[patient] = seen.get(patient, 0) + 1
        if seen[patient] <= max_scans:
            rows.append(i)
    return scans.subset(np.array(rows, int))


def add_noise(sums: Sums, config: Config, query_name: str, min_count: int) -> Sums:
    """The answer to `query` with noise on every cell of counts [K + 1], histograms [2, bins] and confusions [K, K], and without losses. A count above
    0 and below `least` is reported as `least`; what else is too small is the policy's (client/site/policy.py)."""
    scale = (
        config.privacy.query_noise_multiplier
        * config.privacy.max_scans_per_patient
        * math.sqrt(len(config.tasks))
    )
    found: Sums = {}
    for key, cells in sums.items():
        if key.endswith("/loss"):
            found[key] = np.zeros_like(cells)
            continue
        noisy = cells + scale * secure_gaussian(cells.size).double().numpy().reshape(cells.shape)
        if query_name == "counts":
            whole = np.rint(np.maximum(noisy, 0))
            found[key] = np.where((whole > 0) & (whole < min_count), min_count, whole)
        else:
            found[key] = np.stack([np.rint(project_non_negative(row)) for row in noisy])
    return found


def project_non_negative(cells: Floats) -> Floats:
    """The nearest cells [n] that are not below 0 and have the same sum (0 where that is below): all less one number, what falls below 0 cut off."""
    total = max(float(cells.sum()), 0.0)
    ordered = np.sort(cells)[::-1]
    less = (np.cumsum(ordered) - total) / np.arange(1, len(cells) + 1)
    kept = np.flatnonzero(ordered > less)
    return np.maximum(cells - less[kept[-1]], 0.0) if len(kept) else np.zeros_like(cells)


def planned_answers(config: Config) -> int:
    """The answers of a run that nothing disturbs: the counts, validation before and after every round, the test."""
    return 2 + sum(stage.rounds + 1 for stage in config.stages.values())
