"""The solved noise multiplier: it suffices by the accountant's own reckoning, for all that a run costs."""

from __future__ import annotations

import pytest

from common.privacy.accountant import SEARCH_TOLERANCE, Charge, compute_epsilon, solve_noise_multiplier
from common.utils.errors import ConsiliumError

DELTA = 1e-5
PLANS: list[tuple[float, tuple[tuple[float, int], ...], tuple[Charge, ...]]] = [
    (8.0, ((1.0, 10),), ()),
    (3.0, ((0.2, 60),), ()),
    (8.0, ((0.3, 40), (0.1, 200)), ()),
    (8.0, ((0.2, 60),), (Charge(5.0, 1.0, 1),)),
    (4.0, ((0.2, 60),), (Charge(4.0, 1.0, 1), Charge(12.0, 1.0, 14))),
]


def cost(noise_multiplier: float, plan: tuple[tuple[float, int], ...], others: tuple[Charge, ...]) -> float:
    charges = [Charge(noise_multiplier, rate, steps) for rate, steps in plan]
    return compute_epsilon((*charges, *others), DELTA, SEARCH_TOLERANCE)


@pytest.mark.parametrize(("target", "plan", "others"), PLANS)
def test_solved_noise_suffices_and_no_noise_that_is_2_per_cent_smaller_does(
    target: float, plan: tuple[tuple[float, int], ...], others: tuple[Charge, ...]
) -> None:
    noise_multiplier = solve_noise_multiplier(target, DELTA, plan, others)
    assert cost(noise_multiplier, plan, others) <= target
    assert cost(noise_multiplier / 1.02, plan, others) > target


def test_each_part_of_the_plan_and_each_other_charge_needs_more_noise() -> None:
    whole = solve_noise_multiplier(4.0, DELTA, ((0.3, 40), (0.1, 200)), (Charge(4.0, 1.0, 1),))
    assert whole > solve_noise_multiplier(4.0, DELTA, ((0.3, 40), (0.1, 200)))
    assert whole > solve_noise_multiplier(4.0, DELTA, ((0.3, 40),), (Charge(4.0, 1.0, 1),))
    assert whole > solve_noise_multiplier(4.0, DELTA, ((0.1, 200),), (Charge(4.0, 1.0, 1),))


def test_charges_that_leave_nothing_for_training_are_refused() -> None:
    almost_all = (Charge(1.6, 1.0, 2),)
    spent = compute_epsilon(almost_all, DELTA, SEARCH_TOLERANCE)
    with pytest.raises(ConsiliumError, match="the run's queries alone cost an epsilon of"):
        solve_noise_multiplier(spent / 0.96, DELTA, ((0.2, 60),), almost_all)
    assert solve_noise_multiplier(spent / 0.9, DELTA, ((0.2, 60),), almost_all) > 1


def test_epsilon_is_an_upper_bound_that_a_coarser_search_does_not_fall_below() -> None:
    charges = (Charge(2.0, 0.1, 50), Charge(5.0, 1.0, 1))
    exact = compute_epsilon(charges, DELTA, 0.0005)
    assert exact <= compute_epsilon(charges, DELTA) <= 1.01 * exact
    assert exact <= compute_epsilon(charges, DELTA, SEARCH_TOLERANCE) <= 1.02 * exact
