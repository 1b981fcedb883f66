"""Compute the privacy loss (epsilon) of Gaussian noise on sums, with Opacus's accountants.

The centres use it for their privacy budgets (client/site/privacy_budget.py), the coordinator for central
privacy.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from opacus.accountants import PRVAccountant, RDPAccountant

from common.utils.errors import ConsiliumError

# Opacus warns about every order that it cannot use; it does not need them all.
logging.getLogger("opacus.accountants.analysis.rdp").setLevel(logging.ERROR)


class Charge(NamedTuple):
    """A number of steps with noise, which cost privacy."""

    noise_multiplier: float
    sampling_rate: float  # the probability that a given patient or centre is part of a step
    steps: int


EPSILON_TOLERANCE = 0.003  # relative error with which an epsilon may lie above the true one
SEARCH_TOLERANCE = 0.01  # the same while searching for a noise multiplier
EPSILON_CEILING = 200.0  # above it there is no protection, and a rougher bound suffices
RDP_ORDERS = [*range(2, 64), 128, 256]
SMALLEST_NOISE_MULTIPLIER = 0.3
LARGEST_NOISE_MULTIPLIER = 1e5


@lru_cache(maxsize=256)
def compute_epsilon(charges: tuple[Charge, ...], delta: float, tolerance: float = EPSILON_TOLERANCE) -> float:
    """Return an upper bound on the privacy loss of all charges together; their order does not matter.

    Gopi et al., "Numerical composition of differential privacy", NeurIPS 2021.
    """
    history = _merge_charges(charges)
    if not history:
        return 0.0
    rdp_accountant = RDPAccountant()
    prv_accountant = PRVAccountant()
    rdp_accountant.history = history
    prv_accountant.history = history
    # Suppressed: warnings about unneeded orders, and the division by zero at a sampling rate of 1.
    with warnings.catch_warnings(), np.errstate(divide="ignore"):
        warnings.simplefilter("ignore")
        rough_bound = float(rdp_accountant.get_epsilon(delta, alphas=RDP_ORDERS))
        if rough_bound > EPSILON_CEILING:
            return rough_bound
        max_error = tolerance * max(rough_bound, 0.01)
        return min(rough_bound, float(prv_accountant.get_epsilon(delta, eps_error=max_error)))


def _merge_charges(charges: Sequence[Charge]) -> list[tuple[float, float, int]]:
    """Return an accountant's history: (noise multiplier, sampling rate, total steps), sorted."""
    total_steps: dict[tuple[float, float], int] = {}
    for noise_multiplier, sampling_rate, steps in charges:
        key = (noise_multiplier, sampling_rate)
        total_steps[key] = total_steps.get(key, 0) + steps
    return [(*key, steps) for key, steps in sorted(total_steps.items())]


@lru_cache(maxsize=64)
def solve_noise_multiplier(
    target_epsilon: float,
    delta: float,
    plan: tuple[tuple[float, int], ...],
    other_charges: tuple[Charge, ...] = (),
) -> float:
    """Return the smallest noise multiplier, to 1 %, with which a run stays within the target epsilon.

    Args:
        target_epsilon: the privacy loss of `plan` and `other_charges` together.
        delta: the probability that the loss is larger.
        plan: (sampling rate, steps) of the steps that get this noise.
        other_charges: what else the run costs.

    Raises:
        ConsiliumError: `other_charges` leave nothing for the plan.
    """
    cost_of_others = compute_epsilon(other_charges, delta, SEARCH_TOLERANCE)
    if cost_of_others > 0.95 * target_epsilon:
        raise ConsiliumError(
            f"the run's queries alone cost an epsilon of {cost_of_others:.2f} of {target_epsilon:g}; "
            "raise privacy.query_noise_multiplier or privacy.epsilon, or use fewer rounds"
        )

    def compute_cost(noise_multiplier: float) -> float:
        planned_charges = [Charge(noise_multiplier, sampling_rate, steps) for sampling_rate, steps in plan]
        return compute_epsilon((*planned_charges, *other_charges), delta, SEARCH_TOLERANCE)

    too_small = SMALLEST_NOISE_MULTIPLIER
    sufficient = 2 * SMALLEST_NOISE_MULTIPLIER
    while compute_cost(sufficient) > target_epsilon and sufficient < LARGEST_NOISE_MULTIPLIER:
        too_small = sufficient
        sufficient = 2 * sufficient
    while sufficient / too_small > 1.01:
        middle = math.sqrt(too_small * sufficient)
        if compute_cost(middle) <= target_epsilon:
            sufficient = middle
        else:
            too_small = middle
    return sufficient
