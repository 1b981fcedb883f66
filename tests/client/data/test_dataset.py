"""Steps of a round, which scans they see, and scans that stay together with what is known of them."""

from __future__ import annotations

from collections import Counter
from random import Random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from client.data.dataset import (
    ScanDataset,
    concat_datasets,
    count_round_steps,
    iterate_batches,
    iterate_slices,
    sampling_probabilities,
)
from common.config.schema import Stage, Task
from common.learning.losses import IGNORE_INDEX
from common.utils.errors import Refused

SIZES = st.lists(st.integers(1, 300), min_size=1, max_size=6)
EPOCHS = st.sampled_from([0.25, 0.5, 1.0, 2.0, 3.0])


def scans_of(*sizes: int, slices: int = 2) -> ScanDataset:
    """Make centres of these sizes; scan i's pixels and its target are i (mod 251)."""
    centres = [f"c{i}" for i, n in enumerate(sizes) for _ in range(n)]
    numbers = np.arange(len(centres)) % 251
    pixels = [np.full((slices, 1, 1), i, np.uint8) for i in numbers]
    return ScanDataset(pixels, {"covid": numbers.astype(np.float64)}, centres)


def passes(n: int, stage: Stage, steps: int, seed: int = 0, slices: int = 2) -> list[list[int]]:
    """Return the scans of each batch."""
    batches = iterate_batches(scans_of(n, slices=slices), {"covid": Task()}, stage, steps, seed)
    return [batch.slices[:, 0, 0, 0].tolist() for batch in batches]


@given(SIZES, st.integers(1, 40), st.sampled_from(["proportional", "equal"]), EPOCHS, st.booleans())
def test_pooled_takes_the_steps_of_all(
    sizes: list[int], batch: int, mode: str, epochs: float, drop_last: bool
) -> None:
    stage = Stage(batch_size=batch, local_steps_mode=mode, local_epochs=epochs, drop_last=drop_last)  # type: ignore[arg-type]
    mean = sum(sizes) / len(sizes)
    separate = [count_round_steps(scans_of(n), stage, mean) for n in sizes]
    assert count_round_steps(scans_of(*sizes), stage, mean) == sum(separate)


@given(SIZES, st.integers(1, 40))
def test_equal_steps_are_equal_and_add_no_more_than_rounding(sizes: list[int], batch: int) -> None:
    mean = sum(sizes) / len(sizes)
    equal = Stage(batch_size=batch, local_steps_mode="equal")
    steps = {count_round_steps(scans_of(n), equal, mean) for n in sizes}
    assert len(steps) == 1
    proportional = sum(count_round_steps(scans_of(n), Stage(batch_size=batch), mean) for n in sizes)
    assert abs(len(sizes) * steps.pop() - proportional) <= len(sizes)


@given(SIZES, st.integers(1, 40), st.integers(1, 50))
def test_fixed_steps_are_fixed_at_every_centre(sizes: list[int], batch: int, steps: int) -> None:
    stage = Stage(batch_size=batch, local_steps=steps, local_epochs=3)
    assert count_round_steps(scans_of(*sizes), stage) == steps * len(sizes)


@given(st.integers(1, 120), st.integers(1, 40), st.integers(1, 3), st.booleans())
def test_a_rounds_steps_are_the_batches_of_its_passes(
    n: int, batch: int, epochs: int, drop_last: bool
) -> None:
    """A round has the steps of its passes; without drop_last every scan is seen once a pass."""
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
def test_no_batch_is_one_radiograph_and_every_radiograph_is_seen(
    n: int, batch: int, epochs: int, drop_last: bool
) -> None:
    """A single radiograph at the end is joined by the one before it; a CT's slices are batch enough."""
    stage = Stage(batch_size=batch, local_epochs=epochs, drop_last=drop_last)
    steps = count_round_steps(scans_of(n), stage)
    radiograph_batches = passes(n, stage, steps, slices=1)
    ct_batches = passes(n, stage, steps, slices=2)
    for radiographs, cts in zip(radiograph_batches, ct_batches, strict=True):
        assert radiographs[-len(cts) :] == cts
        assert len(radiographs) == max(len(cts), 2)
        assert len(set(radiographs)) == len(radiographs)


@given(st.integers(1, 20), st.integers(1, 3))
def test_batches_of_size_one_cover_all_scans(n: int, slices: int) -> None:
    seen = passes(n, Stage(batch_size=1), n, slices=slices)
    assert sorted(i for rows in seen for i in rows) == list(range(n))


def test_each_pass_is_complete_and_shuffled_anew() -> None:
    seen = passes(10, Stage(batch_size=4), 9)
    orders = {tuple(i for rows in seen[k : k + 3] for i in rows) for k in (0, 3, 6)}
    assert len(orders) == 3
    for order in orders:
        assert sorted(order) == list(range(10))


def test_the_order_depends_on_the_seed_alone() -> None:
    stage = Stage(batch_size=4)
    assert passes(10, stage, 6, seed=3) == passes(10, stage, 6, seed=3)
    assert passes(10, stage, 6, seed=3) != passes(10, stage, 6, seed=4)
    assert passes(10, stage, 3, seed=3) == passes(10, stage, 6, seed=3)[:3]


def test_targets_stay_with_their_scans_even_if_missing() -> None:
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
def test_iterate_slices_yields_all_scans_in_order(n: int, batch: int) -> None:
    assert torch.cat(list(iterate_slices(scans_of(n), batch)))[:, 0, 0, 0].tolist() == list(range(n))


def test_a_ct_and_a_radiograph_in_one_batch_are_refused() -> None:
    mixed = ScanDataset([np.zeros((8, 4, 4), np.uint8), np.zeros((1, 4, 4), np.uint8)], {}, ["a", "a"])
    with pytest.raises(Refused, match=r"set preprocess.modality=CT or XR"):
        list(iterate_slices(mixed, 2))


# --- alignment of scans, targets and masks ----------------------------------------------------------------

KNOWN = st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), max_size=9)  # covid, score, mask


def numbered_scans(known: list[tuple[bool, bool, bool]], first: int = 0, cohort: str = "a") -> ScanDataset:
    """Make scans whose pixels, targets and masks all hold their number, from `first` on."""
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


def assert_aligned(scans: ScanDataset, numbers: list[int], known: dict[int, tuple[bool, bool, bool]]) -> None:
    """Assert that everything known of each scan holds its number."""
    assert [int(s[0, 0, 0]) for s in scans.slices] == numbers
    assert scans.store_keys == [str(i) for i in numbers]
    assert scans.extra_targets["lesion"].tolist() == numbers
    for k, i in enumerate(numbers):
        covid, score, mask = known[i]
        np.testing.assert_array_equal(scans.targets["covid"][k], i if covid else np.nan)
        np.testing.assert_array_equal(scans.targets["score"][k], [i, i if score else np.nan])
        np.testing.assert_array_equal(scans.targets["lesion"][k], 1.0 if mask else np.nan)
        scan_mask = scans.masks["lesion"][k]
        assert (scan_mask is None) == (not mask)
        assert scan_mask is None or int(scan_mask[0, 0, 0]) == i
        lung = scans.lung_masks[k]
        assert (lung is None) == (i % 3 == 0)
        assert lung is None or int(lung[0, 0, 0]) == i


@given(KNOWN, KNOWN, st.randoms(use_true_random=False))
def test_subsets_and_concatenations_stay_aligned(
    first: list[tuple[bool, bool, bool]], second: list[tuple[bool, bool, bool]], random: Random
) -> None:
    known = dict(enumerate([*first, *second]))
    datasets = [numbered_scans(first), numbered_scans(second, len(first), "b")]
    combined = concat_datasets(datasets)
    assert_aligned(combined, list(known), known)
    assert combined.centres == ["a"] * len(first) + ["b"] * len(second)
    assert_aligned(datasets[0], list(range(len(first))), known)  # not changed by the concatenation
    assert_aligned(datasets[1], list(range(len(first), len(known))), known)
    rows = random.sample(list(known), random.randint(0, len(known)))
    assert_aligned(combined.subset(np.array(rows, int)), rows, known)
    if not known:
        return
    for tasks, labels in ((["score"], [1]), (["covid", "lesion"], [0, 2])):
        labelled = [i for i in known if any(known[i][label] for label in labels)]
        assert_aligned(combined.select_labelled(tasks), labelled, known)
    for i, mask in enumerate(combined.targets_for("lesion", np.arange(len(known)))):
        assert set(mask.unique().tolist()) == ({i} if known[i][2] else {IGNORE_INDEX})


# --- sampling by kind of label ----------------------------------------------------------------------------

KINDS = st.sampled_from(["masked", "positive", "negative", "unlabelled"])
SHARES = st.dictionaries(KINDS, st.floats(0.1, 5), min_size=1)
TASKS = {"lesion": Task(type="segmentation"), "covid": Task()}


def scans_with_labels(labels: list[tuple[float, bool]]) -> ScanDataset:
    pixel = np.zeros((1, 1, 1), np.uint8)
    masks = [pixel if m else None for _, m in labels]
    covid = np.array([y for y, _ in labels])
    lesion = np.array([1.0 if m else np.nan for _, m in labels])
    targets = {"covid": covid, "lesion": lesion}
    return ScanDataset([pixel] * len(labels), targets, ["a"] * len(labels), masks={"lesion": masks})


@given(
    st.lists(st.tuples(st.sampled_from([0.0, 1.0, np.nan]), st.booleans()), min_size=1, max_size=30), SHARES
)
def test_kinds_of_label_come_in_their_shares(
    labels: list[tuple[float, bool]], shares: dict[str, float]
) -> None:
    """A missing kind's share goes to the others; a negative scan's mask does not count."""
    kinds = []
    for label, has_mask in labels:
        kind = {0.0: "negative", 1.0: "positive"}.get(label, "unlabelled")
        kinds.append("masked" if has_mask and label != 0 else kind)
    scans = scans_with_labels(labels)
    present_shares = {kind: share for kind, share in shares.items() if kind in kinds}
    if not present_shares:
        with pytest.raises(Refused, match=r"no training scan is of a kind that stage.sampling_ratios names"):
            sampling_probabilities(scans, TASKS, shares)  # type: ignore[arg-type]
        return
    probabilities = sampling_probabilities(scans, TASKS, shares)  # type: ignore[arg-type]
    assert probabilities.sum() == pytest.approx(1)
    for kind in set(kinds):
        of_kind = probabilities[np.array(kinds) == kind]
        expected = present_shares.get(kind, 0) / sum(present_shares.values())
        assert of_kind.sum() == pytest.approx(expected)
        assert np.ptp(of_kind) == pytest.approx(0)


def test_sampled_batches_have_their_shares_and_every_mask_counts_without_a_binary_task() -> None:
    scans = scans_with_labels(
        [(0.0, False)] * 80 + [(0.0, True)] * 10 + [(1.0, False)] * 8 + [(1.0, True)] * 2
    )
    stage = Stage(batch_size=20, sampling_ratios={"negative": 0.25, "positive": 0.25, "masked": 0.5})
    drawn = [b.rows for b in iterate_batches(scans, TASKS, stage, 50, 1) if b.rows is not None]
    assert {len(rows) for rows in drawn} == {20}
    rows = torch.cat(drawn)
    for share, (low, high) in ((0.25, (0, 90)), (0.25, (90, 98)), (0.5, (98, 100))):
        assert float(((rows >= low) & (rows < high)).double().mean()) == pytest.approx(share, abs=0.06)
    again = [b.rows for b in iterate_batches(scans, TASKS, stage, 50, 1) if b.rows is not None]
    assert torch.equal(rows, torch.cat(again))
    probabilities = sampling_probabilities(scans, {"lesion": TASKS["lesion"]}, {"masked": 1.0})
    np.testing.assert_allclose(probabilities, [0] * 80 + [1 / 12] * 10 + [0] * 8 + [1 / 12] * 2)


def test_training_draws_views_with_their_masks() -> None:
    """View k of scan i holds 10 k + i in its slices and in its mask; evaluation sees the first view only."""

    def view(k: int) -> ScanDataset:
        pictures = [np.full((1, 2, 2), 10 * k + i, np.uint8) for i in range(4)]
        return ScanDataset(pictures, {"lesion": np.ones(4)}, ["a"] * 4, masks={"lesion": list(pictures)})

    scans = view(0)
    scans.views = [view(1), view(2)]
    seen = set()
    combined = concat_datasets([scans.subset(np.array([2, 1])), scans])
    tasks = {"lesion": Task(type="segmentation")}
    for batch in iterate_batches(combined, tasks, Stage(batch_size=3), 40, 5):
        assert torch.equal(batch.slices, batch.targets["lesion"])
        seen |= set(batch.slices[:, 0, 0, 0].tolist())
    assert seen == {10 * k + i for k in range(3) for i in range(4)}
    assert {int(s.max()) for s in next(iterate_slices(scans, 4))} == {0, 1, 2, 3}
