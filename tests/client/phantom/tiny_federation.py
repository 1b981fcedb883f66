"""The smallest made-up hospitals: their settings, their cohorts, and what their scans show."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from client.data.cohort import load_cohort
from client.phantom.chest_ct import GroundTruth, draw_chest
from client.phantom.federation import _make_rng
from client.phantom.profiles import CENTRE_PROFILES
from common.config.schema import PhantomConfig

TINY = PhantomConfig(
    scale=0.001, num_slices=10, image_size=64
)  # the least: 4 of a class in train, 3 in val and test


def drawn(centre: str, row: pd.Series, settings: PhantomConfig = TINY) -> tuple[np.ndarray, GroundTruth]:
    """What a row of the cohort shows, drawn again."""
    person, visit = (
        _make_rng(settings.seed, centre, row["patient"]),
        _make_rng(settings.seed, centre, row["scan"].removesuffix("-xr")),
    )
    return draw_chest(
        person,
        visit,
        CENTRE_PROFILES[centre].scanner,
        bool(row["covid"]),
        settings.num_slices,
        settings.image_size,
    )


def rows_of(federation: Path, centre: str, modality: str) -> pd.DataFrame:
    df = load_cohort(federation / centre, centre)
    return df[df["modality"] == modality].reset_index(drop=True)
