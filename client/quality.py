"""What the centre's data look like, as sums over scans: where slices were kept, how much lung they show, how bright they are.

A scan adds 1 to a histogram, divided among the bins that its slices or pixels fall into.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.dataset import Scans
from client.store import Store
from common.messages import Sums
from common.quality import MEASURES

Floats = NDArray[np.float64]


def quality(parts: Mapping[str, Scans], stores: Mapping[str, Store], smallest_cell: int) -> Sums:
    """`cohort/quality/measure` -> [bins] over the scans of all splits; a measure that too few scans have is left out."""
    shares: dict[str, list[Floats]] = {}
    for scans in parts.values():
        for cohort, key, slices in zip(scans.cohort, scans.keys, scans.slices, strict=True):
            for measure, share in of_scan(slices, stores[cohort].facts(key)).items():
                shares.setdefault(f"{cohort}/quality/{measure}", []).append(share)
    return {key: reportable(np.stack(rows), smallest_cell) for key, rows in sorted(shares.items()) if len(rows) >= smallest_cell}


def of_scan(slices: NDArray[np.uint8], facts: Mapping[str, Any]) -> dict[str, Floats]:
    """{measure: [bins], sum 1} of slices [S, H, W] and what the store noted beside them; a radiograph has neither areas nor places."""
    pixels = np.bincount(slices.ravel() >> 3, minlength=len(MEASURES["intensity"].edges) - 1)
    found = {"intensity": pixels / pixels.sum()}
    if facts.get("modality") == "CT":
        found["position"] = _binned("position", np.array(facts["indices"]) / max(1, facts["scan"][0] - 1))
        if "areas" in facts:  # an earlier version did not note them
            found["area"] = _binned("area", np.array(facts["areas"]) / 100)
    return found


def _binned(measure: str, values: Floats) -> Floats:
    edges = MEASURES[measure].edges
    return np.asarray(np.histogram(np.clip(values, edges[0], edges[-1]), edges)[0] / len(values))


def reportable(rows: Floats, least: int) -> Floats:
    """The sum [bins] of scans' shares [N, bins] without bins that fewer than `least` scans fall into. What is left is scaled to a multiple of
    `least`: neither the bins left out nor the number of scans can be told from it."""
    bins = np.where((rows > 0).sum(0) >= least, rows.sum(0), 0.0)
    return bins * (len(rows) // least * least / bins.sum()) if bins.any() else bins
