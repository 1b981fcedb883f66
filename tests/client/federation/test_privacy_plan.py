"""The plan of a private run: its training and its queries together cost the requested epsilon."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from client.data.dataset import ScanDataset
from client.federation.noisy_counts import planned_charges
from client.federation.privacy_plan import PrivacyPlan, plan_privacy
from common.config.compose import compose_config
from common.config.schema import Config
from common.modeling.model import make_model
from common.modeling.parameters import Weights
from common.privacy.accountant import SEARCH_TOLERANCE, Charge, compute_epsilon
from common.privacy.gaussian_noise import secure_gaussian
from common.protocol.messages import TrainRequest

NO_WEIGHTS = Weights(np.empty(0, np.float32), np.empty(0, np.int64))
NUM_PATIENTS = 60


def make_scans() -> ScanDataset:
    """Make 60 patients with two scans each; every second patient has a label of the second stage's task."""
    patients = [f"p{row // 2}" for row in range(2 * NUM_PATIENTS)]
    has_source = np.arange(2 * NUM_PATIENTS) // 2 % 2 == 0
    return ScanDataset(
        [np.zeros((1, 8, 8), np.uint8)] * len(patients),
        {"covid": np.ones(len(patients)), "source": np.where(has_source, 0.0, np.nan)},
        ["north"] * len(patients),
        patient_ids=patients,
    )


def two_stage_config(*overrides: str) -> Config:
    config = compose_config(
        [
            "privacy=patient",
            "stage.batch_size=10",
            "stage.local_epochs=1",
            "tasks.source.classes=[a,b]",
            *overrides,
        ]
    )
    stage = config.stages["main"]
    stages = {
        "first": replace(stage, tasks=["covid"], rounds=3),
        "second": replace(stage, tasks=["source"], rounds=5),
    }
    return replace(config, stages=stages)


def plan(config: Config, stage: str) -> PrivacyPlan:
    model = make_model(config.backbone, config.tasks, 1)
    return plan_privacy(config, make_scans(), TrainRequest("r", {}, stage, 1, NO_WEIGHTS), model)


@pytest.mark.parametrize(
    "queries",
    [
        ["privacy.count_noise_multiplier=1.5"],
        ["privacy.count_noise_multiplier=4", "privacy.query_noise_multiplier=8"],
    ],
)
def test_all_rounds_of_all_stages_and_all_queries_together_cost_epsilon(queries: list[str]) -> None:
    config = two_stage_config("privacy.epsilon=6", *queries)
    first = plan(config, "first").charge
    second = plan(config, "second").charge
    assert first.noise_multiplier == second.noise_multiplier
    charges = [*planned_charges(config)]
    for charge, rounds in ((first, 3), (second, 5)):
        charges.append(charge._replace(steps=rounds * charge.steps))
    spent = compute_epsilon(tuple(charges), config.privacy.delta, SEARCH_TOLERANCE)
    assert 0.97 * 6 < spent <= 6


def test_patients_are_planned_for_and_not_scans() -> None:
    config = two_stage_config()
    first = plan(config, "first")
    second = plan(config, "second")
    assert (first.charge.sampling_rate, first.charge.steps) == (10 / 60, 6)
    assert (second.charge.sampling_rate, second.charge.steps) == (10 / 30, 3)
    assert first.dp_params.expected_patients == pytest.approx(10)
    assert first.dp_params.noise_multiplier == first.charge.noise_multiplier
    assert first.dp_params.clip_norm == config.privacy.clip_norm
    assert first.dp_params.draw_normals is secure_gaussian  # not a generator that a seed determines


def test_given_noise_multiplier_is_used_as_it_is() -> None:
    config = two_stage_config("privacy.epsilon=0", "privacy.noise_multiplier=1.3")
    assert plan(config, "first").charge == Charge(1.3, 10 / 60, 6)
