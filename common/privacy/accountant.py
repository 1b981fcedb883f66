"""What Gaussian noise on sums costs in privacy: Opacus's accountants, for the centres' budgets (client/site/privacy_budget.py) and the coordinator's."""

from __future__ import annotations

import logging
import math
import warnings
from functools import lru_cache

import numpy as np
from opacus.accountants import PRVAccountant, RDPAccountant

from common.utils.errors import ConsiliumError

logging.getLogger("opacus.accountants.analysis.rdp").setLevel(
    logging.ERROR
)  # it warns of every order that it can do without

Charge = tuple[float, float, int]  # (noise multiplier, each one's odds in a step, steps)
EPSILON_TOLERANCE, SEARCH_TOLERANCE = (
    0.003,
    0.01,
)  # how far an epsilon may lie above the true one, as a share of it
EPSILON_CEILING = 200.0  # from here on nothing is protected, and a rougher bound will do


@lru_cache(maxsize=256)
def compute_epsilon(charges: tuple[Charge, ...], delta: float, tolerance: float = EPSILON_TOLERANCE) -> float:
    """The privacy loss of all charges together, from above (Gopi et al., "Numerical composition of differential privacy", NeurIPS 2021)."""
    steps: dict[tuple[float, float], int] = {}
    for noise, odds, count in charges:  # the order does not matter
        steps[noise, odds] = steps.get((noise, odds), 0) + count
    history = [(noise, odds, count) for (noise, odds), count in sorted(steps.items())]
    if not history:
        return 0.0
    rough, fine = RDPAccountant(), PRVAccountant()
    rough.history = fine.history = history
    with warnings.catch_warnings(), np.errstate(divide="ignore"):  # of orders it can do without; of odds of 1
        warnings.simplefilter("ignore")
        bound = float(rough.get_epsilon(delta, alphas=[*range(2, 64), 128, 256]))
        if bound > EPSILON_CEILING:
            return bound
        return min(bound, float(fine.get_epsilon(delta, eps_error=tolerance * max(bound, 0.01))))


@lru_cache(maxsize=64)
def solve_noise_multiplier(
    target_epsilon: float,
    delta: float,
    plan: tuple[tuple[float, int], ...],
    other_charges: tuple[Charge, ...] = (),
) -> float:
    """The smallest noise multiplier, to 1 %, with which the (odds, steps) of `plan` and what is charged `besides` cost no more than `target`.

    Raises ConsiliumError when `besides` leaves nothing."""

    def cost(noise: float) -> float:
        return compute_epsilon(
            (*((noise, odds, steps) for odds, steps in plan), *other_charges), delta, SEARCH_TOLERANCE
        )

    if (
        other_charges
        and (alone := compute_epsilon(other_charges, delta, SEARCH_TOLERANCE)) > 0.95 * target_epsilon
    ):
        raise ConsiliumError(
            f"the answers of a run alone cost an epsilon of {alone:.2f} of {target_epsilon:g}; raise privacy.query_noise_multiplier or privacy.epsilon, or take fewer rounds"
        )

    low, high = 0.3, 0.6
    while cost(high) > target_epsilon and high < 1e5:
        low, high = high, 2 * high
    while high / low > 1.01:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if cost(middle) <= target_epsilon else (middle, high)
    return high
