"""How many steps a round has (what makes federated, central and local runs comparable), and which scans they see."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from client.dataset import Scans, batches, in_order, steps_in_round
from common.errors import Refused
from common.schema import Stage, Task

SIZES = st.lists(st.integers(1, 300), min_size=1, max_size=6)
EPOCHS = st.sampled_from([0.25, 0.5, 1.0, 2.0, 3.0])


def scans_of(*sizes: int) -> Scans:
    """Scan i's only pixel and its target are i (mod 251), so that a batch tells whom it holds."""
    cohort = [f"c{i}" for i, n in enumerate(sizes) for _ in range(n)]
    number = np.arange(len(cohort)) % 251
    return Scans([np.full((1, 1, 1), i, np.uint8) for i in number], {"covid": number.astype(np.float64)}, cohort)


def passes(n: int, stage: Stage, steps: int, seed: int = 0) -> list[list[int]]:
    """The scans of each batch."""
    return [b.slices[:, 0, 0, 0].tolist() for b in batches(scans_of(n), {"covid": Task()}, stage, steps, seed)]


@given(SIZES, st.integers(1, 40), st.sampled_from(["own", "equal"]), EPOCHS, st.booleans())
def test_pooled_takes_the_steps_of_all(sizes: list[int], batch: int, pace: str, epochs: float, drop_last: bool) -> None:
    stage = Stage(batch=batch, pace=pace, epochs=epochs, drop_last=drop_last)  # type: ignore[arg-type]
    average = sum(sizes) / len(sizes)
    assert steps_in_round(scans_of(*sizes), stage, average) == sum(steps_in_round(scans_of(n), stage, average) for n in sizes)


@given(SIZES, st.integers(1, 40))
def test_equal_pace_is_equal_and_costs_no_more_than_its_rounding(sizes: list[int], batch: int) -> None:
    average = sum(sizes) / len(sizes)
    steps = {steps_in_round(scans_of(n), Stage(batch=batch, pace="equal"), average) for n in sizes}
    assert len(steps) == 1
    own = sum(steps_in_round(scans_of(n), Stage(batch=batch), average) for n in sizes)
    assert abs(len(sizes) * steps.pop() - own) <= len(sizes)


@given(SIZES, st.integers(1, 40), st.integers(1, 50))
def test_fixed_steps_are_fixed_at_every_centre(sizes: list[int], batch: int, steps: int) -> None:
    assert steps_in_round(scans_of(*sizes), Stage(batch=batch, steps=steps, epochs=3)) == steps * len(sizes)


@given(st.integers(1, 120), st.integers(1, 40), st.integers(1, 3), st.booleans())
def test_a_rounds_steps_are_its_passes(n: int, batch: int, epochs: int, drop_last: bool) -> None:
    """The number of steps is that of the batches which that many passes hold; without drop_last every scan is seen once a pass."""
    stage = Stage(batch=batch, epochs=epochs, drop_last=drop_last)
    seen = passes(n, stage, steps_in_round(scans_of(n), stage))
    counts = Counter(i for rows in seen for i in rows)
    assert max(counts.values()) <= epochs
    if drop_last and n >= batch:
        assert {len(rows) for rows in seen} == {batch}
        assert len(seen) == epochs * (n // batch)
    else:
        assert counts == dict.fromkeys(range(n), epochs)


def test_each_pass_is_complete_before_the_next_begins_and_is_shuffled_anew() -> None:
    seen = passes(10, Stage(batch=4), 9)
    one, two, three = ([i for rows in seen[k : k + 3] for i in rows] for k in (0, 3, 6))
    assert sorted(one) == sorted(two) == sorted(three) == list(range(10))
    assert len({tuple(one), tuple(two), tuple(three)}) == 3


def test_the_order_depends_on_the_seed_alone() -> None:
    stage = Stage(batch=4)
    assert passes(10, stage, 6, seed=3) == passes(10, stage, 6, seed=3)
    assert passes(10, stage, 6, seed=3) != passes(10, stage, 6, seed=4)
    assert passes(10, stage, 3, seed=3) == passes(10, stage, 6, seed=3)[:3]


def test_targets_go_with_their_scans_missing_ones_too() -> None:
    scans = scans_of(9)
    scans.targets["covid"][[2, 5]] = np.nan
    for batch in batches(scans, {"covid": Task()}, Stage(batch=4), 6, 1):
        number = batch.slices[:, 0, 0, 0].double()
        expected = torch.where((number == 2) | (number == 5), torch.nan, number)
        torch.testing.assert_close(batch.targets["covid"], expected, equal_nan=True)


@given(st.integers(1, 60), st.integers(1, 20))
def test_parts_make_up_the_batch(n: int, count: int) -> None:
    (batch,) = batches(scans_of(n), {"covid": Task()}, Stage(batch=n), 1, 0)
    parts = list(batch.parts(count))
    assert len(parts) == min(n, count)
    assert max(len(p.slices) for p in parts) - min(len(p.slices) for p in parts) <= 1
    assert torch.equal(torch.cat([p.slices for p in parts]), batch.slices)
    assert torch.equal(torch.cat([p.targets["covid"] for p in parts]), batch.targets["covid"])


@given(st.integers(1, 60), st.integers(1, 20))
def test_in_order_is_all_scans_in_order(n: int, batch: int) -> None:
    assert torch.cat(list(in_order(scans_of(n), batch)))[:, 0, 0, 0].tolist() == list(range(n))


def test_a_ct_and_a_radiograph_in_one_batch_are_refused() -> None:
    mixed = Scans([np.zeros((8, 4, 4), np.uint8), np.zeros((1, 4, 4), np.uint8)], {}, ["a", "a"])
    with pytest.raises(Refused, match="set preprocess.modality=CT or XR"):
        list(in_order(mixed, 2))
