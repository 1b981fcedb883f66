"""What an additive query is computed from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from client.data.dataset import ScanDataset
from client.imaging.slice_store import SliceStore
from common.config.schema import Config, Stage
from common.modeling.model import Model


@dataclass(kw_only=True)
class QueryContext:
    """The scans, the model and the settings of a query."""

    datasets: Mapping[str, ScanDataset]  # {split: scans}
    split: str  # which of them the query is about
    config: Config
    stage: Stage
    model: Model | None = None  # with the requested weights; None when none came
    task_name: str = ""  # moments, clusters: the task
    min_patients: int = 1  # that a number must stand for
    min_scans: int = 1  # so many scans surely stand for as many patients as the policy wants
    device: torch.device
    centroids: NDArray[np.float64] | None = None  # clusters: [K, D]
    features_dir: Path | None = None  # clusters: where features are kept between the steps of k-means
    slice_stores: Mapping[str, SliceStore] = field(default_factory=dict)  # quality: {cohort: its slices}

    @property
    def dataset(self) -> ScanDataset:
        """Return the scans of the requested split."""
        return self.datasets[self.split]
