"""The scans, the model and the configuration that the tests of queries ask about."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from client.data.dataset import ScanDataset
from common.config.schema import BackboneConfig, Config, EvaluationConfig, FederationConfig, Stage, Task
from common.modeling.model import Model, make_model

CONFIG = Config(
    tasks={"covid": Task(), "source": Task(type="multiclass", classes=["a", "b", "c"])},
    stages={"main": Stage(batch_size=4)},
    federation=FederationConfig(centres=["a", "b"]),
    evaluation=EvaluationConfig(histogram_bins=64),
)
NUM_SCANS = 23


@pytest.fixture(scope="module")
def model() -> Model:
    return make_model(BackboneConfig(), CONFIG.tasks, 3)


@pytest.fixture(scope="module")
def scans() -> ScanDataset:
    """9 scans of centre a and 14 of centre b, a few of them without labels."""
    rng = np.random.default_rng(0)
    covid = rng.integers(0, 2, NUM_SCANS).astype(float)
    source = rng.integers(0, 3, NUM_SCANS).astype(float)
    covid[[3, 11]] = np.nan
    source[[5]] = np.nan
    slices = [rng.integers(0, 256, (2, 32, 32), dtype=np.uint8) for _ in range(NUM_SCANS)]
    return ScanDataset(slices, {"covid": covid, "source": source}, ["a"] * 9 + ["b"] * 14)


def stack_images(scans: ScanDataset) -> torch.Tensor:
    return torch.from_numpy(np.stack(scans.slices)) / 255


def compute_features(model: Model, scans: ScanDataset) -> np.ndarray:
    with torch.no_grad():
        return model.eval().extract_features(stack_images(scans)).double().numpy()
