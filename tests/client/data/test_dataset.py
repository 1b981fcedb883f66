"""How many steps a round has (what makes federated, central and local runs comparable), and which scans they see."""

from __future__ import annotations

from collections import Counter
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from client.data.dataset import ScanDataset, iterate_batches, iterate_slices, concat_datasets, sampling_probabilities, count_round_steps
from common.utils.errors import Refused
from common.config.schema import Stage, Task
from common.learning.losses import IGNORE_INDEX

SIZES = st.lists(st.integers(1, 300), min_size=1, max_size=6)
EPOCHS = st.sampled_from([0.25, 0.5, 1.0, 2.0, 3.0])


def scans_of(*sizes: int, slices: int = 2) -> ScanDataset:
    """Scan i's pixels and its target are i (mod 251), so that a batch tells whom it holds."""
    cohort = [f"c{i}" for i, n in enumerate(sizes) for _ in range(n)]
    number = np.arange(len(cohort)) % 251
    return ScanDataset([np.full((slices, 1, 1), i, np.uint8) for i in number], {"covid": number.astype(np.float64)}, cohort)


def passes(n: int, stage: Stage, steps: int, seed: int = 0, slices: int = 2) -> list[list[int]]:
    """The scans of each batch."""
    return [b.slices[:, 0, 0, 0].tolist() for b in iterate_batches(scans_of(n, slices=slices), {"covid": Task()}, stage, steps, seed)]


@given(SIZES, st.integers(1, 40), st.sampled_from(["proportional", "equal"]), EPOCHS, st.booleans())
def test_pooled_takes_the_steps_of_all(sizes: list[int], batch: int, pace: str, epochs: float, drop_last: bool) -> None:
    stage = Stage(batch_size=batch, local_steps_mode=pace, local_epochs=epochs, drop_last=drop_last)  # type: ignore[arg-type]
    average = sum(sizes) / len(sizes)
    assert count_round_steps(scans_of(*sizes), stage, average) == sum(count_round_steps(scans_of(n), stage, average) for n in sizes)


@given(SIZES, st.integers(1, 40))
def test_equal_pace_is_equal_and_costs_no_more_than_its_rounding(sizes: list[int], batch: int) -> None:
    average = sum(sizes) / len(sizes)
    steps = {count_round_steps(scans_of(n), Stage(batch_size=batch, local_steps_mode="equal"), average) for n in sizes}
    assert len(steps) == 1
    own = sum(count_round_steps(scans_of(n), Stage(batch_size=batch), average) for n in sizes)
    assert abs(len(sizes) * steps.pop() - own) <= len(sizes)


@given(SIZES, st.integers(1, 40), st.integers(1, 50))
def test_fixed_steps_are_fixed_at_every_centre(sizes: list[int], batch: int, steps: int) -> None:
    assert count_round_steps(scans_of(*sizes), Stage(batch_size=batch, local_steps=steps, local_epochs=3)) == steps * len(sizes)


@given(st.integers(1, 120), st.integers(1, 40), st.integers(1, 3), st.booleans())
def test_a_rounds_steps_are_its_passes(n: int, batch: int, epochs: int, drop_last: bool) -> None:
    """The number of steps is that of the batches which that many passes hold; without drop_last every scan is seen once a pass."""
    stage = Stage(batch_size=batch, local_epochs=epochs, drop_last=drop_last)
    seen = passes(n, stage, count_round_steps(scans_of(n), stage))
    counts = Counter(i for rows in seen for i in rows)
    assert max(counts.values()) <= epochs
    if drop_last and n >= batch:
        assert {len(rows) for rows in seen} == {batch}
        assert len(seen) == epochs * (n // batch)
    else:
        assert counts == dict.fromkeys(range(n), epochs)


@given(st.integers(2, 60), st.integers(2, 20), st.integers(1, 3), st.booleans())
def test_no_batch_is_one_picture_and_yet_every_picture_is_seen(n: int, batch: int, epochs: int, drop_last: bool) -> None:
    """A radiograph left over takes the one before it along; of a CT the slices are a batch for batch norm."""
    stage = Stage(batch_size=batch, local_epochs=epochs, drop_last=drop_last)
    films, series = (passes(n, stage, count_round_steps(scans_of(n), stage), slices=slices) for slices in (1, 2))
    for film, ct in zip(films, series, strict=True):
        assert film[-len(ct) :] == ct
        assert len(film) == max(len(ct), 2)
        assert len(set(film)) == len(film)


@given(st.integers(1, 20), st.integers(1, 3))
def test_batches_of_one_that_were_asked_for_are_all_scans(n: int, slices: int) -> None:
    seen = passes(n, Stage(batch_size=1), n, slices=slices)
    assert sorted(i for rows in seen for i in rows) == list(range(n))


def test_each_pass_is_complete_before_the_next_begins_and_is_shuffled_anew() -> None:
    seen = passes(10, Stage(batch_size=4), 9)
    one, two, three = ([i for rows in seen[k : k + 3] for i in rows] for k in (0, 3, 6))
    assert sorted(one) == sorted(two) == sorted(three) == list(range(10))
    assert len({tuple(one), tuple(two), tuple(three)}) == 3


def test_the_order_depends_on_the_seed_alone() -> None:
    stage = Stage(batch_size=4)
    assert passes(10, stage, 6, seed=3) == passes(10, stage, 6, seed=3)
    assert passes(10, stage, 6, seed=3) != passes(10, stage, 6, seed=4)
    assert passes(10, stage, 3, seed=3) == passes(10, stage, 6, seed=3)[:3]


def test_targets_go_with_their_scans_missing_ones_too() -> None:
    scans = scans_of(9)
    scans.targets["covid"][[2, 5]] = np.nan
    for batch in iterate_batches(scans, {"covid": Task()}, Stage(batch_size=4), 6, 1):
        number = batch.slices[:, 0, 0, 0].double()
        expected = torch.where((number == 2) | (number == 5), torch.nan, number)
        torch.testing.assert_close(batch.targets["covid"], expected, equal_nan=True)


@given(st.integers(1, 60), st.integers(1, 20))
def test_parts_make_up_the_batch(n: int, count: int) -> None:
    (batch,) = iterate_batches(scans_of(n), {"covid": Task()}, Stage(batch_size=n), 1, 0)
    parts = list(batch.split_into(count))
    assert len(parts) == min(n, count)
    assert max(len(p.slices) for p in parts) - min(len(p.slices) for p in parts) <= 1
    assert torch.equal(torch.cat([p.slices for p in parts]), batch.slices)
    assert torch.equal(torch.cat([p.targets["covid"] for p in parts]), batch.targets["covid"])


@given(st.integers(1, 60), st.integers(1, 20))
def test_in_order_is_all_scans_in_order(n: int, batch: int) -> None:
    assert torch.cat(list(iterate_slices(scans_of(n), batch)))[:, 0, 0, 0].tolist() == list(range(n))


def test_a_ct_and_a_radiograph_in_one_batch_are_refused() -> None:
    mixed = ScanDataset([np.zeros((8, 4, 4), np.uint8), np.zeros((1, 4, 4), np.uint8)], {}, ["a", "a"])
    with pytest.raises(Refused, match=r"set preprocess.modality=CT or XR"):
        list(iterate_slices(mixed, 2))


# --- what goes together stays together -------------------------------------------------------------------------------------------------

KNOWN = st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), max_size=9)  # of each scan: covid, score, mask


def rich(known: list[tuple[bool, bool, bool]], first: int = 0, cohort: str = "a") -> ScanDataset:
    """Scans of which all that there is says their number, from `first` on."""
    number = np.arange(first, first + len(known), dtype=np.float64)
    covid, score, mask = (np.array([k[i] for k in known], bool) for i in range(3))
    pixels = [np.full((2, 2, 2), i, np.uint8) for i in number.astype(np.uint8)]
    both = np.stack([number, np.where(score, number, np.nan)], 1)
    return ScanDataset(
        pixels,
        {"covid": np.where(covid, number, np.nan), "score": both, "lesion": np.where(mask, 1.0, np.nan)},
        [cohort] * len(known),
        [str(int(i)) for i in number],
        {"lesion": [p if m else None for p, m in zip(pixels, mask, strict=True)]},
        [None if i % 3 == 0 else p for i, p in zip(number, pixels, strict=True)],
        {"lesion": number},
    )


def aligned(scans: ScanDataset, numbers: list[int], known: dict[int, tuple[bool, bool, bool]]) -> None:
    """Everything of scan k says the number of scan k."""
    assert [int(s[0, 0, 0]) for s in scans.slices] == numbers
    assert scans.store_keys == [str(i) for i in numbers]
    assert scans.extra_targets["lesion"].tolist() == numbers
    for k, i in enumerate(numbers):
        covid, score, mask = known[i]
        np.testing.assert_array_equal(scans.targets["covid"][k], i if covid else np.nan)
        np.testing.assert_array_equal(scans.targets["score"][k], [i, i if score else np.nan])
        np.testing.assert_array_equal(scans.targets["lesion"][k], 1.0 if mask else np.nan)
        held = scans.masks["lesion"][k]
        assert (held is None) == (not mask)
        assert held is None or int(held[0, 0, 0]) == i
        lung = scans.lung_masks[k]
        assert (lung is None) == (i % 3 == 0)
        assert lung is None or int(lung[0, 0, 0]) == i


@given(KNOWN, KNOWN, st.randoms(use_true_random=False))
def test_taken_joined_and_filtered_scans_stay_aligned(
    some: list[tuple[bool, bool, bool]], more: list[tuple[bool, bool, bool]], r: Random
) -> None:
    known = dict(enumerate([*some, *more]))
    parts = [rich(some), rich(more, len(some), "b")]
    whole = concat_datasets(parts)
    aligned(whole, list(known), known)
    assert whole.centres == ["a"] * len(some) + ["b"] * len(more)
    for part, first, n in ((parts[0], 0, len(some)), (parts[1], len(some), len(more))):
        aligned(part, list(range(first, first + n)), known)  # joining has not touched them
    rows = r.sample(list(known), r.randint(0, len(known)))
    aligned(whole.subset(np.array(rows, int)), rows, known)
    for tasks, wanted in ((["score"], [1]), (["covid", "lesion"], [0, 2])):
        if known:
            kept = [i for i in known if any(known[i][w] for w in wanted)]
            aligned(whole.select_labelled(tasks), kept, known)
    if known:
        found = whole.targets_for("lesion", np.arange(len(known)))
        for i, mask in enumerate(found):
            assert set(mask.unique().tolist()) == ({i} if known[i][2] else {IGNORE_INDEX})


# --- sampling by kind of label ---------------------------------------------------------------------------------------------------------

SHARES = st.dictionaries(st.sampled_from(["masked", "positive", "negative", "unlabelled"]), st.floats(0.1, 5), min_size=1)
TASKS = {"lesion": Task(type="segmentation"), "covid": Task()}


def kinds_of(labels: list[tuple[float, bool]]) -> ScanDataset:
    pixel = np.zeros((1, 1, 1), np.uint8)
    masks = [pixel if m else None for _, m in labels]
    covid = np.array([y for y, _ in labels])
    lesion = np.array([1.0 if m else np.nan for _, m in labels])
    return ScanDataset([pixel] * len(labels), {"covid": covid, "lesion": lesion}, ["a"] * len(labels), masks={"lesion": masks})


@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0, np.nan]), st.booleans()), min_size=1, max_size=30), SHARES)
def test_kinds_of_label_come_in_their_shares(labels: list[tuple[float, bool]], shares: dict[str, float]) -> None:
    """What is missing is divided among the others by their shares; within a kind all scans are alike; a healthy scan's mask is no mask."""
    kind = ["masked" if m and y != 0 else {0.0: "negative", 1.0: "positive"}.get(y, "unlabelled") for y, m in labels]
    scans = kinds_of(labels)
    there = {k: v for k, v in shares.items() if k in kind}
    if not there:
        with pytest.raises(Refused, match=r"no training scan is of a kind that stage.sampling_ratios names"):
            sampling_probabilities(scans, TASKS, shares)  # type: ignore[arg-type]
        return
    odds = sampling_probabilities(scans, TASKS, shares)  # type: ignore[arg-type]
    assert odds.sum() == pytest.approx(1)
    for k in set(kind):
        own = odds[[name == k for name in kind]]
        assert own.sum() == pytest.approx(there.get(k, 0) / sum(there.values()))
        assert np.ptp(own) == pytest.approx(0)


def test_drawn_batches_have_their_shares_and_without_a_binary_task_every_mask_counts() -> None:
    scans = kinds_of([(0.0, False)] * 80 + [(0.0, True)] * 10 + [(1.0, False)] * 8 + [(1.0, True)] * 2)
    stage = Stage(batch_size=20, sampling_ratios={"negative": 0.25, "positive": 0.25, "masked": 0.5})
    drawn = [b.rows for b in iterate_batches(scans, TASKS, stage, 50, 1) if b.rows is not None]
    assert {len(rows) for rows in drawn} == {20}
    rows = torch.cat(drawn)
    for share, (low, high) in ((0.25, (0, 90)), (0.25, (90, 98)), (0.5, (98, 100))):
        assert float(((rows >= low) & (rows < high)).double().mean()) == pytest.approx(share, abs=0.06)
    again = [b.rows for b in iterate_batches(scans, TASKS, stage, 50, 1) if b.rows is not None]
    assert torch.equal(rows, torch.cat(again))
    odds = sampling_probabilities(scans, {"lesion": TASKS["lesion"]}, {"masked": 1.0})
    np.testing.assert_allclose(odds, [0] * 80 + [1 / 12] * 10 + [0] * 8 + [1 / 12] * 2)


def test_training_draws_other_slices_with_their_masks() -> None:
    """Each view of scan i holds 10 * view + i in its slices and in its mask; evaluation sees the first view only."""

    def view(k: int) -> ScanDataset:
        pictures = [np.full((1, 2, 2), 10 * k + i, np.uint8) for i in range(4)]
        return ScanDataset(pictures, {"lesion": np.ones(4)}, ["a"] * 4, masks={"lesion": list(pictures)})

    scans = view(0)
    scans.views = [view(1), view(2)]
    seen = set()
    for batch in iterate_batches(concat_datasets([scans.subset(np.array([2, 1])), scans]), {"lesion": Task(type="segmentation")}, Stage(batch_size=3), 40, 5):
        assert torch.equal(batch.slices, batch.targets["lesion"])
        seen |= set(batch.slices[:, 0, 0, 0].tolist())
    assert seen == {10 * k + i for k in range(3) for i in range(4)}
    assert {int(s.max()) for s in next(iterate_slices(scans, 4))} == {0, 1, 2, 3}
