"""Weighted sums of updates against straightforward references."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.config.schema import AggregationConfig
from server.aggregation.server_optimizer import server_step
from server.aggregation.weighted_mean import weighted_sum
from server.aggregation.weighting import compute_group_weights
from tests.server.aggregation.updates import CENTRES, LAYOUT, START, TASKS, make_reply, store_random_updates


def test_tau_0_by_scans_is_fedavg(tmp_path: Path) -> None:
    """Every tensor by n_c / n, computed in float64."""
    counts = {
        "north": {"covid": [60, 40, 0], "source": [100, 0, 0]},
        "east": {"covid": [10, 10, 0], "source": [0, 20, 0]},
        "south": {"covid": [5, 0, 0], "source": [0, 5, 0]},
    }
    weights = compute_group_weights(counts, AggregationConfig(tau=0.0, weight_by="scans"), TASKS)
    mean_delta = weighted_sum(store_random_updates(tmp_path, 1, 2, 3), weights, LAYOUT)
    after = server_step(START, mean_delta, [], AggregationConfig(), LAYOUT, {})
    fractions = np.array([100, 20, 5]) / 125
    deltas = np.stack([make_reply("", seed).delta.astype(np.float64) for seed in (1, 2, 3)])
    np.testing.assert_allclose(after.floats, START.floats + fractions @ deltas, atol=1e-6)


def test_a_head_without_labels_anywhere_does_not_move(tmp_path: Path) -> None:
    counts = {centre: {"covid": [5, 5, 0], "source": [0, 0, 10]} for centre in ("north", "east")}
    weights = compute_group_weights(counts, AggregationConfig(), TASKS)
    update = weighted_sum(store_random_updates(tmp_path, 1, 2), weights, LAYOUT)
    for slot in LAYOUT.floats:
        assert (update[slot.span] == 0).all() == (slot.group == "source")


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.permutations([0, 1, 2]))
def test_the_order_of_arrival_changes_no_bit(tmp_path: Path, order: list[int]) -> None:
    updates = store_random_updates(tmp_path, 1, 2, 3)
    centre_weights = dict(zip(CENTRES, (0.5, 0.3, 0.2), strict=True))
    weights = {group: centre_weights for group in LAYOUT.group_slices()}
    np.testing.assert_array_equal(
        weighted_sum([updates[i] for i in order], weights, LAYOUT), weighted_sum(updates, weights, LAYOUT)
    )
