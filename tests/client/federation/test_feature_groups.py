"""Features of a clustering are those of groups of patients, whatever its steps ask for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from client.federation.feature_groups import average_in_groups


@given(st.integers(0, 2**32 - 1), st.integers(5, 40), st.integers(2, 5))
def test_every_value_is_the_mean_over_enough_patients(seed: int, num_scans: int, min_patients: int) -> None:
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(num_scans, 3))
    patients = [f"p{number}" for number in rng.integers(0, num_scans, num_scans)]
    averaged = average_in_groups(features, patients, min_patients)
    if len(set(patients)) < min_patients:
        return
    for value in np.unique(averaged, axis=0):
        members = np.flatnonzero((averaged == value).all(axis=1))
        assert len({patients[row] for row in members}) >= min_patients
        np.testing.assert_allclose(features[members].mean(0), value)


def test_no_step_of_a_clustering_tells_one_scans_features() -> None:
    """A centroid upon a scan's features takes it out of the sum of the others: the difference is the scan."""
    rng = np.random.default_rng(1)
    features = rng.normal(size=(30, 4))
    patients = [f"p{number}" for number in range(30)]
    averaged = average_in_groups(features, patients, 5)
    for target in features:
        distances = ((averaged - target) ** 2).sum(1)
        isolated = averaged[distances == distances.min()]
        assert len(isolated) >= 5
        assert np.abs(isolated.mean(0) - target).max() > 0.01


def test_clusters_that_lie_apart_stay_apart() -> None:
    rng = np.random.default_rng(2)
    features = np.concatenate([rng.normal(0, 1, (30, 4)), rng.normal(20, 1, (30, 4))])
    averaged = average_in_groups(features, [f"p{number}" for number in range(60)], 5)
    assert averaged[:30].max() < 10 < averaged[30:].min()
    assert averaged.mean(0) == pytest.approx(features.mean(0))
