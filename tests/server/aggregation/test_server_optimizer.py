"""The server's optimiser against the algorithms of the paper."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from common.config.schema import AggregationConfig
from server.aggregation.server_optimizer import server_step
from server.aggregation.stored_updates import store_update
from tests.server.aggregation.updates import LAYOUT, START, make_reply


def test_integer_counters_keep_their_type_and_take_the_largest(tmp_path: Path) -> None:
    updates = [
        store_update(make_reply("north", 1, 2**40 + 1), LAYOUT, tmp_path),
        store_update(make_reply("east", 2, 3), LAYOUT, tmp_path),
    ]
    mean_delta = np.zeros(LAYOUT.size, np.float32)
    weights = server_step(START, mean_delta, updates, AggregationConfig(), LAYOUT, {})
    assert weights.int_buffers.dtype == np.int64
    assert (weights.int_buffers == 2**40 + 1).all()


@pytest.mark.parametrize("method", ["fedadam", "fedyogi"])
def test_adaptive_optimisers_follow_the_paper(method: str) -> None:
    """Reddi et al. 2021, algorithm 2, for two rounds; batch-norm statistics are plain averages."""
    config = AggregationConfig(
        method=method,  # type: ignore[arg-type]
        server_lr=0.1,
        beta1=0.9,
        beta2=0.99,
        eps=1e-3,
    )
    deltas = [make_reply("", seed).delta for seed in (4, 5)]
    optimiser_state: dict[str, np.ndarray] = {}
    weights = START
    m = np.zeros(LAYOUT.size)
    v = np.full(LAYOUT.size, 1e-6)
    expected = START.floats.astype(np.float64)
    parameters = LAYOUT.parameter_mask()
    for delta in deltas:
        weights = server_step(weights, delta.copy(), [], config, LAYOUT, optimiser_state)
        d = delta.astype(np.float64)
        m = 0.9 * m + 0.1 * d
        v = 0.99 * v + 0.01 * d**2 if method == "fedadam" else v - 0.01 * d**2 * np.sign(v - d**2)
        expected = expected + np.where(parameters, 0.1 * m / (np.sqrt(v) + 1e-3), d)
    np.testing.assert_allclose(weights.floats, expected, rtol=2e-4, atol=2e-4)
