"""The four made-up centres: how many scans each has, its scanner, and which labels it knows.

From the multi-source paper (arXiv 2604.03320, true counts): scans and COVID scans per centre, in training
338/340/204/340 with 175/175/39/175, in validation 88/90/45/87 with 43/43/-/42. Ours: the third centre has 8
COVID scans of 45 in validation (the paper has none, which would leave that centre without an AUC), the test
split repeats the validation's counts, and every count is scaled by `PhantomConfig.scale` but is at least 4
scans of each class in training and 3 elsewhere.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from client.phantom.scanner import Scanner
from common.config.schema import PhantomConfig

MIN_SCANS = {"train": 4, "val": 3, "test": 3}  # of each class


@dataclass(frozen=True)
class CentreProfile:
    """One centre's scanner, how many CTs it has, and which labels it knows."""

    train_counts: tuple[int, int]  # (all, COVID)
    val_counts: tuple[int, int]  # (all, COVID), of validation and of test
    scanner: Scanner
    known_labels: tuple[str, ...]  # besides `covid`, which every centre knows; `brixia` is all six zones


# The only place that says who knows what.
CENTRE_PROFILES = {
    "north": CentreProfile(
        (338, 175),
        (88, 43),
        Scanner("Boreal", 360, 5.0, 30, -0.6, 0, (0, 0), 0),
        ("severity", "lesion", "transition", "outcome", "finding", "infection"),
    ),
    "east": CentreProfile(
        (340, 175),
        (90, 43),
        Scanner("Levant", 420, 6.0, 40, 0.8, 20, (12, -10), 3, feet_first=True),
        ("severity", "transition", "outcome", "finding", "lungs"),
    ),
    "south": CentreProfile(
        (204, 39),
        (45, 8),
        Scanner("Austral", 390, 8.0, 75, -0.9, -25, (-15, 8), -5, rle_compressed=True),
        ("lesion", "transition", "brixia", "outcome", "finding", "lungs"),
    ),
    "west": CentreProfile(
        (340, 175),
        (87, 42),
        Scanner("Occident", 340, 7.0, 22, -1.2, 35, (5, 4), 0),
        ("severity", "target", "brixia", "finding", "infection"),
    ),
}


def select_profile(centre: str, centre_index: int | None) -> CentreProfile:
    """Return a centre's profile.

    Another name takes one of the four, by its place in the federation or its letters.
    """
    if centre in CENTRE_PROFILES:
        return CENTRE_PROFILES[centre]
    if centre_index is None:
        centre_index = int(hashlib.sha256(centre.encode()).hexdigest(), 16)
    return list(CENTRE_PROFILES.values())[centre_index % len(CENTRE_PROFILES)]


def plan_scan_counts(profile: CentreProfile, settings: PhantomConfig) -> dict[str, tuple[int, int]]:
    """Return the scans to write per split: (without COVID, with COVID)."""
    counts = {}
    for split, least in MIN_SCANS.items():
        total, covid = profile.train_counts if split == "train" else profile.val_counts
        scaled_healthy = round((total - covid) * settings.scale)
        scaled_covid = round(covid * settings.scale)
        counts[split] = (max(least, scaled_healthy), max(least, scaled_covid))
    return counts
