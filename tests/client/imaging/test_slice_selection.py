"""Properties of slice selection, and `kds_paper` against a reference written from the paper's description."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import gaussian_kde

from client.imaging.slice_selection import SelectionMethod, select_slices

SELECTIONS: list[SelectionMethod] = ["kds", "kds_paper", "zquantile", "even"]
Floats = NDArray[np.float64]
no_deadline = settings(deadline=None)  # a busy machine is no failure


def make_areas(Z: int, seed: int) -> Floats:
    """Return a lung-like profile: an asymmetric hill with a little noise; no two areas are alike."""
    rng = np.random.default_rng(seed)
    z = (np.arange(Z) + 0.5) / Z
    hill = np.clip(np.sin(np.pi * np.clip((z - 0.1) / 0.8, 0, 1) ** rng.uniform(0.6, 1.6)), 0, None)
    return np.asarray((hill + 0.01) * 2e4 * rng.uniform(0.97, 1.03, Z))


chests = st.builds(make_areas, st.integers(2, 120), st.integers(0, 10_000))
counts = st.integers(1, 16)
selections = st.sampled_from(SELECTIONS)
any_areas = st.lists(
    st.one_of(st.just(0.0), st.floats(0, 1e5), st.just(float("nan"))), min_size=1, max_size=60
)


@no_deadline
@given(any_areas, counts, selections, st.booleans())
def test_selection_gives_ascending_indices_without_repeats_when_slices_suffice(
    areas: list[float], count: int, selection: SelectionMethod, train: bool
) -> None:
    chosen = select_slices(areas, count, selection, rng=np.random.default_rng(0) if train else None)
    assert chosen.shape == (count,)
    assert chosen.min() >= 0
    assert chosen.max() < len(areas)
    assert (np.diff(chosen) >= 0).all()
    assert len(set(chosen.tolist())) == min(count, len(areas))


@no_deadline
@given(chests, counts, selections, st.randoms(use_true_random=False))
def test_selection_does_not_depend_on_order_of_input(
    areas: Floats, count: int, selection: SelectionMethod, random: Random
) -> None:
    positions = np.arange(len(areas)) * 2.5 - 100
    shuffled = np.random.default_rng(random.randrange(2**32)).permutation(len(areas))
    in_order = select_slices(areas, count, selection, positions)
    shuffled_choice = select_slices(areas[shuffled], count, selection, positions[shuffled])
    np.testing.assert_array_equal(shuffled[shuffled_choice], in_order)


@no_deadline
@given(chests, counts, st.sampled_from(["kds", "zquantile"]))
def test_selection_of_reversed_scan_is_mirrored(
    areas: Floats, count: int, selection: SelectionMethod
) -> None:
    Z = len(areas)
    if count >= Z:  # which of equals is repeated is a convention
        return
    chosen = select_slices(areas, count, selection)
    np.testing.assert_array_equal(select_slices(areas[::-1], count, selection), (Z - 1 - chosen)[::-1])


@no_deadline
@given(chests, counts, selections, st.floats(1e-3, 1e3))
def test_selection_does_not_depend_on_unit_of_area(
    areas: Floats, count: int, selection: SelectionMethod, unit: float
) -> None:
    np.testing.assert_array_equal(
        select_slices(areas, count, selection), select_slices(areas * unit, count, selection)
    )


@no_deadline
@given(st.integers(16, 120), st.integers(0, 10_000))
def test_kds_picks_from_better_half_near_bin_middles(Z: int, seed: int) -> None:
    areas, count = make_areas(Z, seed), 8
    chosen = select_slices(areas, count, "kds")
    half = (Z + 1) // 2
    start = max(range(Z - half + 1), key=lambda i: areas[i : i + half].sum())
    assert chosen.min() >= start
    assert chosen.max() < start + half
    # With an independent F the picks are, in sum, at least as near to the bins' middles as a greedy choice.
    half_areas = areas[start : start + half]
    kde = gaussian_kde(half_areas)  # Scott's rule is its default
    level = np.sort([kde.integrate_box_1d(-np.inf, a) for a in half_areas])
    middles = (np.arange(count) + 0.5) / count
    error = np.abs(np.sort([kde.integrate_box_1d(-np.inf, a) for a in areas[chosen]]) - middles).sum()
    greedy = 0.0
    free = list(level)
    for middle in middles:
        nearest = min(free, key=lambda f: abs(f - middle))
        greedy += abs(nearest - middle)
        free.remove(nearest)
    assert error <= greedy + 1e-9


def test_kds_matches_values_computed_by_hand() -> None:
    # Of 16 slices the better half is 4..11; its areas 10..80 rise evenly, so every slice has its own bin.
    areas = np.array([1, 2, 3, 4, 10, 20, 30, 40, 50, 60, 70, 80, 4, 3, 2, 1], float)
    np.testing.assert_array_equal(select_slices(areas, 8, "kds"), np.arange(4, 12))
    np.testing.assert_array_equal(
        select_slices(areas, 1, "zquantile"), [9]
    )  # half of the lung lies on either side of slice 9
    np.testing.assert_array_equal(select_slices(areas, 16, "kds"), np.arange(16))
    np.testing.assert_array_equal(select_slices([5.0, 6.0], 4, "kds"), [0, 0, 1, 1])


def test_slices_of_equal_area_are_spread_by_position() -> None:
    # Both flanks have the same areas: the picks must not all come from one of them.
    flank = np.linspace(100, 1000, 20)
    chosen = select_slices(np.concatenate([flank, flank[::-1]]), 8, "kds")
    assert 2 <= (chosen < 20).sum() <= 6
    for selection in SELECTIONS:  # alike everywhere, or nothing anywhere: an even grid
        np.testing.assert_allclose(
            select_slices(np.zeros(80), 8, selection), np.arange(4.5, 80, 10), atol=0.6
        )
    np.testing.assert_allclose(
        select_slices(np.full(80, 3.0), 8, "zquantile"), np.arange(4.5, 80, 10), atol=0.6
    )


def select_by_paper_reference(areas: Floats, count: int) -> NDArray[np.int64]:
    """Select as arXiv 2604.03320 describes: by cumulated density at the sorted areas, then an even grid."""
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


@no_deadline
@given(st.integers(9, 100), st.integers(0, 10_000), st.integers(2, 8))
def test_kds_paper_agrees_with_reference_implementation(Z: int, seed: int, count: int) -> None:
    areas = make_areas(Z, seed)
    np.testing.assert_array_equal(
        select_slices(areas, count, "kds_paper"), select_by_paper_reference(areas, count)
    )


@no_deadline
@given(chests, st.integers(0, 1000), selections)
def test_random_selection_depends_only_on_generator(
    areas: Floats, seed: int, selection: SelectionMethod
) -> None:
    def draw(s: int) -> list[int]:
        return [int(i) for i in select_slices(areas, 8, selection, rng=np.random.default_rng(s))]

    assert draw(seed) == draw(seed)
    if len(areas) >= 60:
        assert len({tuple(draw(s)) for s in range(10)}) > 1


def test_zquantile_is_more_stable_under_noise_than_kds() -> None:
    rng = np.random.default_rng(1)
    overlaps: dict[SelectionMethod, list[int]] = {"kds": [], "zquantile": []}
    for seed in range(30):
        areas = make_areas(100, seed)
        noisy = areas * (1 + 0.01 * rng.standard_normal(100))
        for selection, half_areas in overlaps.items():
            half_areas.append(
                len(np.intersect1d(select_slices(areas, 8, selection), select_slices(noisy, 8, selection)))
            )
    assert np.mean(overlaps["zquantile"]) > 7
    assert np.mean(overlaps["zquantile"]) > np.mean(overlaps["kds"]) + 2


def test_zquantile_weighs_by_millimetres_not_by_slice_count() -> None:
    # The upper half is sampled five times as densely; equal lung above and below must still share the picks.
    positions = np.concatenate([np.arange(0, 100, 5.0), np.arange(100, 200, 1.0)])
    chosen = select_slices(np.ones(len(positions)), 8, "zquantile", positions)
    assert (positions[chosen] < 100).sum() == 4


def test_selection_from_no_slices_is_refused() -> None:
    with pytest.raises(ValueError, match="of 0 slices"):
        select_slices([], 8, "kds")


def test_even_selection_is_grid_over_slices_with_lung() -> None:
    areas = np.zeros(60)
    areas[20:52] = 100.0
    areas[16:20] = 1.0  # the windpipe
    assert select_slices(areas, 8, "even").tolist() == [21, 25, 29, 33, 37, 41, 45, 49]
    areas[:] = 0
    areas[57:] = 9.0  # fewer than are wanted: their neighbours join, within the scan
    assert select_slices(areas, 8, "even").tolist() == list(range(52, 60))
