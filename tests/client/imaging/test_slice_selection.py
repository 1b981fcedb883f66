"""Laws of slice selection, and the first paper's variant against a reference written from its description."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import gaussian_kde

from client.imaging.slice_selection import select_slices

SELECTIONS = ["kds", "kds_paper", "zquantile", "even"]
Floats = NDArray[np.float64]
law = settings(deadline=None)  # a busy machine is no failure


def chest(Z: int, seed: int) -> Floats:
    """A lung-like profile: nothing below and above, a lopsided hill between, a little noise; no two areas alike."""
    rng = np.random.default_rng(seed)
    z = (np.arange(Z) + 0.5) / Z
    hill = np.clip(np.sin(np.pi * np.clip((z - 0.1) / 0.8, 0, 1) ** rng.uniform(0.6, 1.6)), 0, None)
    return np.asarray((hill + 0.01) * 2e4 * rng.uniform(0.97, 1.03, Z))


chests = st.builds(chest, st.integers(2, 120), st.integers(0, 10_000))
counts = st.integers(1, 16)
selections = st.sampled_from(SELECTIONS)
any_areas = st.lists(
    st.one_of(st.just(0.0), st.floats(0, 1e5), st.just(float("nan"))), min_size=1, max_size=60
)


@law
@given(any_areas, counts, selections, st.booleans())
def test_always_count_ascending_indices_and_no_slice_twice_where_there_are_enough(
    areas: list[float], count: int, selection: str, train: bool
) -> None:
    found = select_slices(areas, count, selection, rng=np.random.default_rng(0) if train else None)  # type: ignore[arg-type]
    assert found.shape == (count,)
    assert found.min() >= 0
    assert found.max() < len(areas)
    assert (np.diff(found) >= 0).all()
    assert len(set(found.tolist())) == min(count, len(areas))


@law
@given(chests, counts, selections, st.randoms(use_true_random=False))
def test_slices_given_in_any_order_are_the_same_slices(
    areas: Floats, count: int, selection: str, random: object
) -> None:
    positions = np.arange(len(areas)) * 2.5 - 100
    shuffled = np.random.default_rng(random.randrange(2**32)).permutation(len(areas))  # type: ignore[attr-defined]
    straight = select_slices(areas, count, selection, positions)  # type: ignore[arg-type]
    again = select_slices(areas[shuffled], count, selection, positions[shuffled])  # type: ignore[arg-type]
    np.testing.assert_array_equal(shuffled[again], straight)


@law
@given(chests, counts, st.sampled_from(["kds", "zquantile"]))
def test_a_scan_upside_down_gives_the_mirrored_slices(areas: Floats, count: int, selection: str) -> None:
    Z = len(areas)
    if count >= Z:  # which of equals is repeated is a convention
        return
    found = select_slices(areas, count, selection)  # type: ignore[arg-type]
    np.testing.assert_array_equal(select_slices(areas[::-1], count, selection), (Z - 1 - found)[::-1])  # type: ignore[arg-type]


@law
@given(chests, counts, selections, st.floats(1e-3, 1e3))
def test_units_of_area_do_not_matter(areas: Floats, count: int, selection: str, unit: float) -> None:
    np.testing.assert_array_equal(
        select_slices(areas, count, selection), select_slices(areas * unit, count, selection)
    )  # type: ignore[arg-type]


@law
@given(st.integers(16, 120), st.integers(0, 10_000))
def test_kds_keeps_to_the_better_half_and_takes_its_largest_share_of_every_bin(Z: int, seed: int) -> None:
    areas, count = chest(Z, seed), 8
    found = select_slices(areas, count, "kds")
    half = (Z + 1) // 2
    start = max(range(Z - half + 1), key=lambda i: areas[i : i + half].sum())
    assert found.min() >= start
    assert found.max() < start + half
    # An independent F; the picks, sorted by area, are as near to the bins' middles in sum as any choice of different slices.
    kept = areas[start : start + half]
    kde = gaussian_kde(kept)  # Scott's rule is its default
    level = np.sort([kde.integrate_box_1d(-np.inf, a) for a in kept])
    middles = (np.arange(count) + 0.5) / count
    error = np.abs(np.sort([kde.integrate_box_1d(-np.inf, a) for a in areas[found]]) - middles).sum()
    greedy = 0.0
    free = list(level)
    for middle in middles:
        nearest = min(free, key=lambda f: abs(f - middle))
        greedy += abs(nearest - middle)
        free.remove(nearest)
    assert error <= greedy + 1e-9


def test_kds_by_hand() -> None:
    # Of 16 slices the better half is 4..11; its areas 10..80 rise evenly, so every slice has a bin of its own.
    areas = np.array([1, 2, 3, 4, 10, 20, 30, 40, 50, 60, 70, 80, 4, 3, 2, 1], float)
    np.testing.assert_array_equal(select_slices(areas, 8, "kds"), np.arange(4, 12))
    np.testing.assert_array_equal(
        select_slices(areas, 1, "zquantile"), [9]
    )  # half of the lung lies on either side of slice 9
    np.testing.assert_array_equal(select_slices(areas, 16, "kds"), np.arange(16))
    np.testing.assert_array_equal(select_slices([5.0, 6.0], 4, "kds"), [0, 0, 1, 1])


def test_equal_areas_are_told_apart_by_where_they_lie() -> None:
    # Both flanks have the same areas: the picks must not all come from one of them.
    flank = np.linspace(100, 1000, 20)
    found = select_slices(np.concatenate([flank, flank[::-1]]), 8, "kds")
    assert 2 <= (found < 20).sum() <= 6
    for selection in SELECTIONS:  # alike everywhere, or nothing anywhere: an even grid
        np.testing.assert_allclose(
            select_slices(np.zeros(80), 8, selection), np.arange(4.5, 80, 10), atol=0.6
        )  # type: ignore[arg-type]
    np.testing.assert_allclose(
        select_slices(np.full(80, 3.0), 8, "zquantile"), np.arange(4.5, 80, 10), atol=0.6
    )


def reference_of_the_paper(areas: Floats, count: int) -> NDArray[np.int64]:
    """Paper 1's rule, from its description: density at the sorted areas, cumulated; nearest to each share's middle; an even grid."""
    order = np.argsort(areas)
    density = gaussian_kde(areas, bw_method="scott")(areas[order])
    cdf = np.cumsum(density) / np.sum(density)
    picks = []
    for low, high in zip(np.linspace(0, 1, count + 1)[:-1], np.linspace(0, 1, count + 1)[1:], strict=True):
        inside = [i for i in range(len(areas)) if low < cdf[i] <= high]
        if inside:
            picks.append(order[min(inside, key=lambda i: abs(cdf[i] - (low + high) / 2))])
    for grid in np.linspace(0, len(areas) - 1, count):
        if len(picks) < count:
            picks.append(
                min((i for i in range(len(areas)) if i not in picks), key=lambda i: abs(i - round(grid)))
            )
    return np.sort(np.array(picks))


@law
@given(st.integers(9, 100), st.integers(0, 10_000), st.integers(2, 8))
def test_the_papers_variant_agrees_with_its_reference(Z: int, seed: int, count: int) -> None:
    areas = chest(Z, seed)
    np.testing.assert_array_equal(
        select_slices(areas, count, "kds_paper"), reference_of_the_paper(areas, count)
    )


@law
@given(chests, st.integers(0, 1000), selections)
def test_training_picks_vary_with_the_generator_only(areas: Floats, seed: int, selection: str) -> None:
    def draw(s: int) -> list[int]:
        return [int(i) for i in select_slices(areas, 8, selection, rng=np.random.default_rng(s))]  # type: ignore[arg-type]

    assert draw(seed) == draw(seed)
    if len(areas) >= 60:
        assert len({tuple(draw(s)) for s in range(10)}) > 1


def test_zquantile_is_steady_under_noise_where_kds_is_not() -> None:
    rng = np.random.default_rng(1)
    stays: dict[str, list[int]] = {"kds": [], "zquantile": []}
    for seed in range(30):
        areas = chest(100, seed)
        noisy = areas * (1 + 0.01 * rng.standard_normal(100))
        for selection, kept in stays.items():
            kept.append(
                len(np.intersect1d(select_slices(areas, 8, selection), select_slices(noisy, 8, selection)))
            )  # type: ignore[arg-type]
    assert np.mean(stays["zquantile"]) > 7
    assert np.mean(stays["zquantile"]) > np.mean(stays["kds"]) + 2


def test_zquantile_weighs_by_millimetres_not_by_slices() -> None:
    # The upper half is sampled five times as densely; equal lung above and below must still share the picks.
    positions = np.concatenate([np.arange(0, 100, 5.0), np.arange(100, 200, 1.0)])
    found = select_slices(np.ones(len(positions)), 8, "zquantile", positions)
    assert (positions[found] < 100).sum() == 4


def test_nothing_to_choose_from() -> None:
    with pytest.raises(ValueError, match="of 0 slices"):
        select_slices([], 8, "kds")


def test_even_is_a_grid_over_the_slices_that_hold_lung() -> None:
    areas = np.zeros(60)
    areas[20:52] = 100.0
    areas[16:20] = 1.0  # the windpipe
    assert select_slices(areas, 8, "even").tolist() == [21, 25, 29, 33, 37, 41, 45, 49]
    areas[:] = 0
    areas[57:] = 9.0  # fewer than are wanted: their neighbours join, within the scan
    assert select_slices(areas, 8, "even").tolist() == list(range(52, 60))
