"""Imbalance, corrected twice with one rule: between classes in the loss, between centres in the aggregation.

Logit adjustment (Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, eq. 10) trains on `z + tau log pi` and predicts with `z`.
The centre weights mirror it: FedAvg's weight `n_c` divided by `pi_c^tau`, that is `w_c ~ n_c^(1 - tau)`: what the loss takes off a frequent
class, the server takes off a big centre.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from common.config.schema import AggregationConfig, Task
from common.learning.losses import uses_feature_map

Floats = NDArray[np.float64]


def compute_log_prior(counts: ArrayLike, smoothing: float = 1.0) -> Floats:
    """Log-frequencies of counts `[K]`, add-`smooth`: an absent class has a finite prior. `smooth=0` keeps an empty cell at -inf."""
    n = np.asarray(counts, dtype=np.float64) + smoothing
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(np.log(n) - np.log(n.sum()))


def compute_logit_adjustment(
    counts: ArrayLike, tau: float, method: Literal["log", "fedlc"] = "log"
) -> Floats:
    """What training adds to the logits `[K]`, from training counts `[K]`.

    `log`: `tau log pi`. `fedlc`: `-tau n_y^(-1/4)` (Zhang et al., "Federated learning with label distribution skew via logits
    calibration", ICML 2022, eq. 6), smoothed by one because an absent class would have an infinite margin.
    """
    if method == "fedlc":
        return np.asarray(-tau * (np.asarray(counts, dtype=np.float64) + 1.0) ** -0.25)
    return tau * compute_log_prior(counts)


def compute_centre_weights(cells: Mapping[str, ArrayLike], tau: float) -> dict[str, float]:
    """Weights that sum to one, from each centre's counts `[cells]`: `w_c ~ sum_y n_cy / pi_cy^tau` over its non-empty cells.

    `tau = 0` is FedAvg; `tau = 1` counts every non-empty cell alike. Counts of one cell a centre give `softmax_c((1 - tau) log n_c)`.
    A centre whose cells are all empty weighs nothing; if all are, every weight is zero.
    """
    names = sorted(cells)
    counts = [np.atleast_1d(np.asarray(cells[name], dtype=np.float64)) for name in names]
    flat = np.concatenate(counts) if counts else np.zeros(0)
    if not flat.sum() > 0:
        return dict.fromkeys(names, 0.0)
    owner = np.repeat(np.arange(len(names)), [len(c) for c in counts])
    full = flat > 0
    log_mass = np.log(flat[full]) - tau * compute_log_prior(flat[full], smoothing=0.0)
    mass = np.exp(log_mass - log_mass.max())  # the largest is 1: no overflow whatever tau is
    total = np.bincount(owner[full], weights=mass, minlength=len(names))
    return {name: float(w) for name, w in zip(names, total / total.sum(), strict=True)}


def unnormalised_weight(cells: ArrayLike, settings: AggregationConfig) -> float:
    """What a centre's labelled counts `[cells]` weigh before they are divided by all centres' sum: `centre_weights` of one centre alone."""
    n = np.asarray(cells, dtype=np.float64)
    n = n.sum(keepdims=True) if settings.weight_by == "scans" else n
    return float((n[n > 0] ** (1.0 - settings.tau)).sum())


def weights_by_group(weights: Mapping[str, float], tasks: Mapping[str, Task]) -> dict[str, float]:
    """{"backbone", "decoder" or head: weight} of a centre, from its weight for each task that any centre has labels for.

    What tasks share goes by the mean of their weights, each task counting as much as in the loss: the backbone by all of them, the decoder by
    those that read its map.
    """

    def shared(some: list[str]) -> float:
        having = {t: tasks[t].loss_weight for t in some}
        if not sum(having.values()):
            having = dict.fromkeys(having, 1.0)
        return sum(v * weights[t] for t, v in having.items()) / (sum(having.values()) or 1.0)

    return {
        "backbone": shared(list(weights)),
        "decoder": shared([t for t in weights if uses_feature_map(tasks[t])]),
        **weights,
    }


def compute_effective_centres(weights: Mapping[str, float]) -> float:
    """`1 / sum w^2`: how many centres of equal weight would average as well; 0 when no centre weighs anything."""
    squares = sum(w * w for w in weights.values())
    return 1.0 / squares if squares > 0 else 0.0
