"""The server's optimiser: FedAvg, FedAdam and FedYogi.

Reddi et al., "Adaptive federated optimization", ICLR 2021.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from common.config.schema import AggregationConfig
from common.modeling.parameters import Layout, Weights
from server.aggregation.stored_updates import StoredUpdate

OptimiserState = dict[str, NDArray[np.float32]]  # the moments "m" and "v" [P]; empty for FedAvg


def server_step(
    weights: Weights,
    mean_delta: NDArray[np.float32],
    updates: Sequence[StoredUpdate],
    settings: AggregationConfig,
    layout: Layout,
    optimiser_state: OptimiserState,
) -> Weights:
    """Return the next weights; `mean_delta` [P] is overwritten by them and the moments change in place.

    FedAvg adds `server_lr * mean_delta`; the adaptive methods scale it by moments first. Batch-norm
    statistics are plain averages in every method. Integer counters are the largest of the centres' and keep
    their type.
    """
    buffer_means = []
    for slot in layout.floats:
        if not slot.is_parameter:
            buffer_means.append((slot.span, mean_delta[slot.span].copy()))
    if settings.method != "fedavg":
        _scale_by_moments(mean_delta, settings, optimiser_state)
    mean_delta *= settings.server_lr
    for span, buffer_mean in buffer_means:
        mean_delta[span] = buffer_mean
    mean_delta += weights.floats
    int_buffers = weights.int_buffers
    if updates and layout.int_buffer_size:
        int_buffers = np.max([update.int_buffers for update in updates], axis=0)
    return Weights(mean_delta, int_buffers)


def _scale_by_moments(
    mean_delta: NDArray[np.float32], settings: AggregationConfig, optimiser_state: OptimiserState
) -> None:
    """Replace the mean delta by `m / (sqrt(v) + eps)` (algorithm 2 of the paper)."""
    m = optimiser_state.setdefault("m", np.zeros_like(mean_delta))
    v = optimiser_state.setdefault("v", np.full_like(mean_delta, settings.eps**2))
    square = mean_delta**2
    m += (1 - settings.beta1) * (mean_delta - m)
    growth = square - v
    if settings.method == "fedyogi":
        growth = square * np.sign(growth)
    v += (1 - settings.beta2) * growth
    np.divide(m, np.sqrt(v) + settings.eps, out=mean_delta)
