"""Which slices of a scan are kept: kernel-density selection (KDS), quantiles along z, or an even grid.

Pure functions of the slices' areas. `kds` (SSFL++, arXiv 2404.01643) spreads the picks over the distribution
of areas; `zquantile` over the lung along z, which noise on the areas hardly moves; `even` over the slices
that hold lung, each counting alike, which is what measuring volumes needs. `kds_paper` is KDS as the code of
Robust Multi-Source COVID-19 Detection (arXiv 2604.03320) has it.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment
from scipy.special import ndtr

SelectionMethod = Literal["kds", "kds_paper", "zquantile", "even"]
Indices = NDArray[np.int64]
Floats = NDArray[np.float64]
TIE_TOLERANCE = 1e-9
FLAT_BANDWIDTH = 1e-12  # of the largest area: areas with less spread are all alike
MIN_RELATIVE_AREA = 0.02  # of the largest lung area: a slice with less holds the windpipe, no lung


def select_slices(
    areas: NDArray[np.floating] | list[float],
    count: int,
    selection: SelectionMethod,
    positions: NDArray[np.floating] | None = None,
    rng: np.random.Generator | None = None,
) -> Indices:
    """Return [count] indices into `areas` [Z] (mm2) in anatomical order, by `positions` [Z] (mm).

    Without `rng` (evaluation) each bin gives the slice nearest its middle; with it (training) a random one.
    All slices differ where Z allows it; with fewer slices than `count` the nearest are repeated, never a
    blank one. Where all areas are zero, an even grid is taken.

    Raises:
        ValueError: There is no slice, or none is asked for.
    """
    finite_areas = np.nan_to_num(np.asarray(areas, dtype=np.float64)).clip(min=0)
    Z = len(finite_areas)
    if Z == 0 or count < 1:
        raise ValueError(f"cannot select {count} of {Z} slices")
    z_mm = np.asarray(np.arange(Z) if positions is None else positions, dtype=np.float64)
    order = np.argsort(z_mm, kind="stable").astype(np.int64)
    if count >= Z:
        # Each slice in turn as often as the next: the middle of every share names its slice.
        return order[((np.arange(count) + 0.5) * Z / count).astype(np.int64)]
    chosen = _select_ordered(finite_areas[order], count, selection, z_mm[order], rng)
    return order[np.sort(chosen)]


def pick_per_bin(levels: Floats, count: int, positions: Floats, rng: np.random.Generator | None) -> Indices:
    """Pick, of n >= count items with `levels` [n] in 0..1, one for each of `count` equal bins, all different.

    Without `rng` it is the item nearest to the bin's middle, settled together where two bins want the same
    one; with it a random item of the bin. An empty bin takes the nearest item that is left. Of items with
    equal levels, the one whose position [n] is farthest from the others chosen is taken.
    """
    middles = (np.arange(count) + 0.5) / count
    # [count, n]; rounded, so that the rounding of a sum does not decide
    costs = np.abs(levels[None, :] - middles[:, None]).round(12)
    if rng is not None:
        return _pick_random_per_bin(levels, costs, rng)
    # Sorted, so that nothing but levels decides, whichever way the slices run.
    ranks = np.lexsort((positions, levels))
    assigned = linear_sum_assignment(costs[:, ranks])[1]
    return _spread_ties(ranks[assigned].astype(np.int64), levels, positions)


def best_window(areas: Floats, length: int) -> int:
    """Return where the `length` neighbouring slices of the largest summed area begin."""
    # Of equal windows the middle one is taken.
    sums = np.convolve(areas, np.ones(length), mode="valid")
    best = np.flatnonzero(sums >= sums.max() * (1 - TIE_TOLERANCE))
    return int(best[len(best) // 2])


def _select_ordered(
    areas: Floats, count: int, selection: SelectionMethod, positions: Floats, rng: np.random.Generator | None
) -> Indices:
    """Return [count] indices, in any order, of more than `count` slices in anatomical order."""
    if areas.max() <= 0:
        return pick_per_bin(_even_levels(len(areas)), count, positions, rng)
    if selection == "kds":
        return _select_kds(areas, count, positions, rng)
    if selection == "kds_paper":
        return _select_kds_paper(areas, count, rng)
    if selection == "even":
        return _select_even(areas, count, positions, rng)
    return _select_zquantile(areas, count, positions, rng)


def _even_levels(length: int) -> Floats:
    """Return [length] levels that give each slice the same share of 0..1."""
    return (np.arange(length) + 0.5) / length


def _pick_random_per_bin(levels: Floats, costs: Floats, rng: np.random.Generator) -> Indices:
    """Pick a random item of each bin; for the empty bins, those left with the least `costs` [count, n]."""
    count, n = costs.shape
    chosen = np.full(count, -1, dtype=np.int64)
    bin_of_item = np.minimum((levels * count).astype(np.int64), count - 1)
    for bin_index in range(count):
        members = np.flatnonzero(bin_of_item == bin_index)
        if len(members):
            chosen[bin_index] = rng.choice(members)
    empty = np.flatnonzero(chosen < 0)
    if len(empty):
        free = np.setdiff1d(np.arange(n), chosen)
        chosen[empty] = free[linear_sum_assignment(costs[np.ix_(empty, free)])[1]]
    return chosen


def _spread_ties(chosen: Indices, levels: Floats, positions: Floats) -> Indices:
    """Replace each chosen item by the one of its level that lies farthest from the others chosen."""
    everything = np.arange(len(levels))
    for bin_index in range(len(chosen)):
        others = np.delete(chosen, bin_index)
        free = np.setdiff1d(everything, others)
        tied = free[np.abs(levels[free] - levels[chosen[bin_index]]) <= TIE_TOLERANCE]
        if len(tied) > 1:
            distances = np.abs(positions[tied][:, None] - positions[others][None, :])
            chosen[bin_index] = tied[int(distances.min(axis=1, initial=np.inf).argmax())]
    return chosen


def _scott_bandwidth(areas: Floats) -> float:
    """Return Scott's bandwidth in one dimension: sd * n^(-1/5)."""
    if len(areas) < 2:
        return 0.0
    return float(areas.std(ddof=1) * len(areas) ** -0.2)


def _select_kds(areas: Floats, count: int, positions: Floats, rng: np.random.Generator | None) -> Indices:
    """Select as SSFL++ (arXiv 2404.01643) does: one slice for each `count`-th of F, over the better half.

    F(a) = mean_i Phi((a - a_i) / h), with Scott's bandwidth h.
    """
    length = max((len(areas) + 1) // 2, count)
    start = best_window(areas, length)
    half = areas[start : start + length]
    h = _scott_bandwidth(half)
    if h > half.max() * FLAT_BANDWIDTH:
        levels = ndtr((half[:, None] - half[None, :]) / h).mean(axis=1)
    else:
        levels = _even_levels(length)
    return start + pick_per_bin(levels, count, positions[start : start + length], rng)


def _select_zquantile(
    areas: Floats, count: int, positions: Floats, rng: np.random.Generator | None
) -> Indices:
    """Select the slice at the middle of each `count`-th of the cumulative area along z."""
    extent = float(np.ptp(positions))
    volumes = areas
    if extent > 0:
        volumes = areas * np.gradient(positions)
    levels = (np.cumsum(volumes) - volumes / 2) / volumes.sum()
    # Slices without lung all have the level of an end; a minute slope puts those nearest the lung first.
    lung_centre = (positions @ areas) / areas.sum()
    levels = levels + 1e-7 * (positions - lung_centre) / max(extent, 1e-9)
    return pick_per_bin(levels.clip(0, 1), count, positions, rng)


def _select_even(areas: Floats, count: int, positions: Floats, rng: np.random.Generator | None) -> Indices:
    """Select an even grid from the first slice with lung to the last, widened to at least `count` slices."""
    with_lung = np.flatnonzero(areas > MIN_RELATIVE_AREA * areas.max())
    length = max(int(with_lung[-1] - with_lung[0]) + 1, count)
    centred_start = int(with_lung[0] + with_lung[-1] + 1 - length) // 2
    start = min(max(centred_start, 0), len(areas) - length)
    return start + pick_per_bin(_even_levels(length), count, positions[start : start + length], rng)


def _select_kds_paper(areas: Floats, count: int, rng: np.random.Generator | None) -> Indices:
    """Select as the code of arXiv 2604.03320 does: over all slices, with density counted twice.

    F is the cumulative sum of the density at the sorted areas. One slice is taken for each `count`-th of F,
    nearest its middle; the places of empty bins are filled from an even grid over the slices.
    """
    h = _scott_bandwidth(areas)
    ranks = np.argsort(areas, kind="stable")
    if h <= areas.max() * FLAT_BANDWIDTH:
        density = np.ones(len(areas))
    else:
        density = np.exp(-0.5 * ((areas[ranks][:, None] - areas[None, :]) / h) ** 2).mean(axis=1)
    levels = np.cumsum(density) / density.sum()
    chosen: list[int] = []
    for bin_index in range(count):
        members = np.flatnonzero((levels > bin_index / count) & (levels <= (bin_index + 1) / count))
        if not len(members):
            continue
        if rng is None:
            nearest = int(np.abs(levels[members] - (bin_index + 0.5) / count).argmin())
            chosen.append(int(ranks[members[nearest]]))
        else:
            chosen.append(int(rng.choice(ranks[members])))
    # Where the grid hits a slice that is chosen already, the nearest one that is left is taken.
    for grid_index in np.linspace(0, len(areas) - 1, count).round():
        if len(chosen) < count:
            free = np.setdiff1d(np.arange(len(areas)), chosen)
            chosen.append(int(free[np.abs(free - grid_index).argmin()]))
    return np.array(chosen, dtype=np.int64)
