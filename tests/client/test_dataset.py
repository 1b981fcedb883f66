"""How many steps a round has: what makes federated, central and local runs comparable."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from client.dataset import Scans, steps_in_round
from common.schema import Stage

SIZES = st.lists(st.integers(1, 300), min_size=1, max_size=6)


def scans_of(*sizes: int) -> Scans:
    cohort = [f"c{i}" for i, n in enumerate(sizes) for _ in range(n)]
    return Scans([np.zeros((1, 1, 1), np.uint8)] * len(cohort), {}, cohort)


@given(SIZES, st.integers(1, 40), st.sampled_from(["own", "equal"]))
def test_pooled_takes_the_steps_of_all(sizes: list[int], batch: int, pace: str) -> None:
    stage = Stage(batch=batch, pace=pace)  # type: ignore[arg-type]
    average = sum(sizes) / len(sizes)
    assert steps_in_round(scans_of(*sizes), stage, average) == sum(steps_in_round(scans_of(n), stage, average) for n in sizes)


@given(SIZES, st.integers(1, 40))
def test_equal_pace_is_equal_and_costs_no_more_than_its_rounding(sizes: list[int], batch: int) -> None:
    average = sum(sizes) / len(sizes)
    steps = {steps_in_round(scans_of(n), Stage(batch=batch, pace="equal"), average) for n in sizes}
    assert len(steps) == 1
    own = sum(steps_in_round(scans_of(n), Stage(batch=batch), average) for n in sizes)
    assert abs(len(sizes) * steps.pop() - own) <= len(sizes)
