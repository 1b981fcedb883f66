"""Which slices of a scan are kept: KDS (SSFL++, arXiv 2404.01643), the first paper's variant of it, quantiles along z, and an even grid.

Pure functions of the slices' areas. `kds` spreads the picks over the *distribution of areas*; `zquantile` over the *lung along z*,
which noise on the areas hardly moves; `even` over the slices that hold lung, each counting alike (whoever measures volumes wants that).
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
MIN_RELATIVE_AREA = 0.02  # of the largest lung area: a slice with less holds the windpipe, no lung


def select_slices(
    areas: NDArray[np.floating] | list[float],
    count: int,
    selection: SelectionMethod,
    positions: NDArray[np.floating] | None = None,
    rng: np.random.Generator | None = None,
) -> Indices:
    """[count] indices into `areas` [Z] (mm2, one a slice) in anatomical order, that is by `positions` [Z] in mm.

    Without `rng` (evaluation) each bin gives the slice nearest its middle; with it (training) a random one. All slices differ where Z
    allows it; with fewer slices than `count` the nearest are repeated, never a blank one. Areas all zero: an even grid.
    Raises ValueError when there is no slice.
    """
    found = np.nan_to_num(np.asarray(areas, dtype=np.float64)).clip(min=0)
    Z = len(found)
    if Z == 0 or count < 1:
        raise ValueError(f"cannot select {count} of {Z} slices")
    where = np.arange(Z, dtype=np.float64) if positions is None else np.asarray(positions, dtype=np.float64)
    order = np.argsort(where, kind="stable").astype(np.int64)
    found, where = found[order], where[order]
    if count >= Z:
        # Each slice in turn as often as the next: the middle of every share names its slice.
        return order[((np.arange(count) + 0.5) * Z / count).astype(np.int64)]
    if found.max() <= 0:
        chosen = pick_per_bin((np.arange(Z) + 0.5) / Z, count, where, rng)
    elif selection == "kds":
        chosen = _select_kds(found, count, where, rng)
    elif selection == "kds_paper":
        chosen = _select_kds_paper(found, count, rng)
    elif selection == "even":
        chosen = _select_even(found, count, where, rng)
    else:
        chosen = _select_zquantile(found, count, where, rng)
    return order[np.sort(chosen)]


def pick_per_bin(levels: Floats, count: int, positions: Floats, rng: np.random.Generator | None) -> Indices:
    """Of n >= count items with a `level` in [0, 1], one for each of `count` equal bins, all different.

    The nearest to each bin's middle, settled together where two bins want the same item; or, with `rng`, a random item of the bin. An empty
    bin takes the nearest that is left. Equal levels are told apart by `where` [n]: the item farthest from the others chosen.
    """
    middles = (np.arange(count) + 0.5) / count
    cost = np.abs(levels[None, :] - middles[:, None]).round(
        12
    )  # [count, n]; a sum's rounding must not decide
    if rng is None:
        ranks = np.lexsort(
            (positions, levels)
        )  # so that nothing but levels decides, whichever way the slices run
        chosen: Indices = ranks[linear_sum_assignment(cost[:, ranks])[1]].astype(np.int64)
    else:
        chosen = np.full(count, -1, dtype=np.int64)
        bins = np.minimum((levels * count).astype(np.int64), count - 1)
        for b in range(count):
            members = np.flatnonzero(bins == b)
            if len(members):
                chosen[b] = rng.choice(members)
        empty = np.flatnonzero(chosen < 0)
        free = np.setdiff1d(np.arange(len(levels)), chosen)
        if len(empty):
            chosen[empty] = free[linear_sum_assignment(cost[np.ix_(empty, free)])[1]]
        return chosen
    for b in range(count):
        free = np.setdiff1d(np.arange(len(levels)), np.delete(chosen, b))
        tied = free[np.abs(levels[free] - levels[chosen[b]]) <= TIE_TOLERANCE]
        if len(tied) > 1:
            others = np.delete(positions[chosen], b)
            apart = np.abs(positions[tied][:, None] - others[None, :]).min(axis=1, initial=np.inf)
            chosen[b] = tied[int(apart.argmax())]
    return chosen


def _scott_bandwidth(areas: Floats) -> float:
    """Scott's bandwidth in one dimension: sd * n^(-1/5)."""
    return float(areas.std(ddof=1) * len(areas) ** -0.2) if len(areas) > 1 else 0.0


def best_window(areas: Floats, length: int) -> int:
    """Where the `length` neighbouring slices with the largest summed area begin."""
    sums = np.convolve(areas, np.ones(length), mode="valid")
    best = np.flatnonzero(sums >= sums.max() * (1 - TIE_TOLERANCE))
    return int(best[len(best) // 2])  # of equal runs the middle one


def _select_kds(areas: Floats, count: int, positions: Floats, rng: np.random.Generator | None) -> Indices:
    """SSFL++: the better half, F(a) = mean_i Phi((a - a_i)/h) with Scott's h, one slice for each `count`-th of F."""
    length = max((len(areas) + 1) // 2, count)
    start = best_window(areas, length)
    half, place = areas[start : start + length], positions[start : start + length]
    h = _scott_bandwidth(half)
    level = (
        np.arange(length) + 0.5
    ) / length  # areas all alike: nothing to tell slices by but where they lie
    if h > half.max() * 1e-12:
        level = ndtr((half[:, None] - half[None, :]) / h).mean(axis=1)
    return start + pick_per_bin(level, count, place, rng)


def _select_zquantile(
    areas: Floats, count: int, positions: Floats, rng: np.random.Generator | None
) -> Indices:
    """Equal shares of the lung along z: the slice at the middle of each `count`-th of the cumulative area."""
    mass = areas * np.gradient(positions) if np.ptp(positions) > 0 else areas
    level = (np.cumsum(mass) - mass / 2) / mass.sum()
    # Slices without lung all have the level of an end: a hair of slope makes those nearest the lung the next to be taken.
    middle = (positions @ areas) / areas.sum()
    level = level + 1e-7 * (positions - middle) / max(float(np.ptp(positions)), 1e-9)
    return pick_per_bin(level.clip(0, 1), count, positions, rng)


def _select_even(areas: Floats, count: int, positions: Floats, rng: np.random.Generator | None) -> Indices:
    """An even grid from the first slice with lung to the last; of fewer than `count` the neighbours on both sides join."""
    held = np.flatnonzero(areas > MIN_RELATIVE_AREA * areas.max())
    length = max(int(held[-1] - held[0]) + 1, count)
    start = min(max(int(held[0] + held[-1] + 1 - length) // 2, 0), len(areas) - length)
    return start + pick_per_bin(
        (np.arange(length) + 0.5) / length, count, positions[start : start + length], rng
    )


def _select_kds_paper(areas: Floats, count: int, rng: np.random.Generator | None) -> Indices:
    """The first paper's code: all slices, F = cumulative sum of the density at the sorted areas (so density counts twice).

    One pick for each `count`-th, nearest its middle; empty bins are filled from an even grid over the slices.
    """
    h = _scott_bandwidth(areas)
    ranks = np.argsort(areas, kind="stable")
    if h <= areas.max() * 1e-12:
        density = np.ones(len(areas))
    else:
        density = np.exp(-0.5 * ((areas[ranks][:, None] - areas[None, :]) / h) ** 2).mean(axis=1)
    level = np.cumsum(density) / density.sum()
    chosen: list[int] = []
    for b in range(count):
        members = np.flatnonzero((level > b / count) & (level <= (b + 1) / count))
        if len(members):
            near = int(np.abs(level[members] - (b + 0.5) / count).argmin())
            chosen.append(int(ranks[members[near]] if rng is None else rng.choice(ranks[members])))
    # The grid may hit what is chosen already; then the nearest slice that is left.
    for want in np.linspace(0, len(areas) - 1, count).round():
        if len(chosen) < count:
            free = np.setdiff1d(np.arange(len(areas)), chosen)
            chosen.append(int(free[np.abs(free - want).argmin()]))
    return np.array(chosen, dtype=np.int64)
