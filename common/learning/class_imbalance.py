"""Correct imbalance by one rule in two places: between classes in the loss, between centres on the server.

Logit adjustment (Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, eq. 10) trains on `z +
tau log pi` and predicts with `z`. The centre weights mirror it: FedAvg's weight `n_c` divided by `pi_c^tau`,
that is `w_c ~ n_c^(1 - tau)`. What the loss takes from a frequent class, the server takes from a large
centre.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from common.config.schema import AggregationConfig, Task
from common.learning.losses import uses_feature_map

Floats = NDArray[np.float64]


def compute_log_prior(counts: ArrayLike, smoothing: float = 1.0) -> Floats:
    """Return the log-frequencies of counts [K].

    Args:
        counts: scans in each class.
        smoothing: added to every count, so that an absent class has a finite prior. With 0 it has -inf.
    """
    smoothed = np.asarray(counts, dtype=np.float64) + smoothing
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.log(smoothed) - np.log(smoothed.sum()))


def compute_logit_adjustment(
    counts: ArrayLike, tau: float, method: Literal["log", "fedlc"] = "log"
) -> Floats:
    """Return what training adds to the logits [K], from the training scans in each class [K].

    Args:
        counts: scans in each class.
        tau: the strength of the adjustment.
        method: `log`: `tau log pi`. `fedlc`: `-tau n_y^(-1/4)` (Zhang et al., "Federated learning with label
            distribution skew via logits calibration", ICML 2022, eq. 6), with one added to each count because
            an absent class would have an infinite margin.
    """
    if method == "fedlc":
        return np.asarray(-tau * (np.asarray(counts, dtype=np.float64) + 1.0) ** -0.25)
    return tau * compute_log_prior(counts)


def compute_centre_weights(cells: Mapping[str, ArrayLike], tau: float) -> dict[str, float]:
    """Return each centre's weight, `w_c ~ sum_y n_cy / pi_cy^tau` over its non-empty cells; they sum to one.

    `tau = 0` is FedAvg; `tau = 1` counts every non-empty cell alike. With one cell per centre the weights are
    `softmax_c((1 - tau) log n_c)`. A centre whose cells are all empty has weight zero; if all are, all
    weights are.

    Args:
        cells: {centre: counts [cells]}.
        tau: the strength of the correction.
    """
    names = sorted(cells)
    counts_by_centre = [np.atleast_1d(np.asarray(cells[name], dtype=np.float64)) for name in names]
    counts = np.concatenate([np.zeros(0), *counts_by_centre])
    if not counts.sum() > 0:
        return dict.fromkeys(names, 0.0)
    centre_of_cell = np.repeat(np.arange(len(names)), list(map(len, counts_by_centre)))
    filled = counts > 0
    log_weights = np.log(counts[filled]) - tau * compute_log_prior(counts[filled], smoothing=0.0)
    cell_weights = np.exp(log_weights - log_weights.max())  # the largest is 1, so nothing overflows
    centre_weights = np.bincount(centre_of_cell[filled], weights=cell_weights, minlength=len(names))
    return dict(zip(names, map(float, centre_weights / centre_weights.sum()), strict=True))


def unnormalised_weight(cells: ArrayLike, settings: AggregationConfig) -> float:
    """Return a centre's weight from its counts [cells] before it is divided by the sum over all centres.

    After the division it equals that of `compute_centre_weights`, without the other centres' counts.
    """
    counts = np.asarray(cells, dtype=np.float64)
    if settings.weight_by == "scans":
        counts = counts.sum(keepdims=True)
    return float((counts[counts > 0] ** (1.0 - settings.tau)).sum())


def weights_by_group(weights: Mapping[str, float], tasks: Mapping[str, Task]) -> dict[str, float]:
    """Return a centre's weight for each group of parameters: "backbone", "decoder" and every head.

    Groups that tasks share get the mean of the tasks' weights, each task counting as much as in the loss: the
    backbone the mean of all tasks, the decoder the mean of those that use its feature map.

    Args:
        weights: the centre's weight for each task that any centre has labels for.
        tasks: the recipe's tasks.
    """
    decoder_tasks = [name for name in weights if uses_feature_map(tasks[name])]
    return {
        "backbone": _average_task_weights(weights, tasks, list(weights)),
        "decoder": _average_task_weights(weights, tasks, decoder_tasks),
        **weights,
    }


def _average_task_weights(
    weights: Mapping[str, float], tasks: Mapping[str, Task], names: Collection[str]
) -> float:
    """Return the mean of some tasks' weights by loss weight, or the plain mean if those are zero."""
    if not names:
        return 0.0
    loss_weights = {name: tasks[name].loss_weight for name in names}
    if not sum(loss_weights.values()):
        loss_weights = dict.fromkeys(names, 1.0)
    weighted_sum = sum(loss_weight * weights[name] for name, loss_weight in loss_weights.items())
    return weighted_sum / sum(loss_weights.values())


def compute_effective_centres(weights: Mapping[str, float]) -> float:
    """Return `1 / sum w^2`: the number of equally weighted centres that would average as well."""
    sum_of_squares = sum(weight * weight for weight in weights.values())
    return 1.0 / sum_of_squares if sum_of_squares > 0 else 0.0
