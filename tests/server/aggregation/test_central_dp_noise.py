"""Central differential privacy: each part of a round gets the full noise that the accountant assumes.

Bounds on the scale of noise are so wide that they fail with a probability below 1e-9.
"""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from common.config.compose import compose_config
from common.config.schema import Config
from common.modeling.parameters import Layout, TensorSlot
from common.privacy.accountant import solve_noise_multiplier
from common.protocol.messages import TrainReply
from server.aggregation.central_dp import (
    adapt_clip_norm,
    dp_weighted_sum,
    noisy_weighted_sum,
    round_noise_multiplier,
    sum_noise_multiplier,
)
from server.aggregation.stored_updates import StoredUpdate, store_update
from server.rounds.run_lifecycle import open_ledger
from server.run.run_state import Run
from tests.in_process_federation import InProcess

SIZE = 4000  # values of a group: their standard deviation is known to 1.1 %
GROUPS = ("backbone", "decoder", "covid", "severity")
LAYOUT = Layout(
    [
        TensorSlot(f"{group}.weight", (SIZE,), number * SIZE, (number + 1) * SIZE, group, True, False)
        for number, group in enumerate(GROUPS)
    ]
)
WEIGHTS = {
    "backbone": {"a": 0.5, "b": 0.3, "c": 0.2},
    "decoder": {"a": 0.4, "b": 0.4, "c": 0.2},
    "covid": {"a": 0.1, "b": 0.1, "c": 0.8},
    "severity": {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3},
}


def store(folder: Path, delta: np.ndarray) -> list[StoredUpdate]:
    updates = []
    for centre in "abc":
        reply = TrainReply(centre, delta.astype(np.float32), np.empty(0, np.int64), 1, 1, {}, 0.0)
        updates.append(store_update(reply, LAYOUT, folder))
    return updates


def central_config(*overrides: str) -> Config:
    return compose_config(["privacy=central", "stage.rounds=10", *overrides])


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("clip_norm", [0.5, 3.0])
def test_every_group_gets_the_full_noise_by_itself(tmp_path: Path, group: str, clip_norm: float) -> None:
    """The noise of the largest weight of any group, 0.8, whatever the group's own largest is."""
    updates = store(tmp_path, np.zeros(LAYOUT.size))
    total = noisy_weighted_sum(updates, WEIGHTS, LAYOUT, clip_norm=clip_norm, noise_multiplier=1.5, frozen=[])
    noise = total[LAYOUT.group_slices()[group][0]] / (1.5 * clip_norm * 0.8)
    assert noise.std() == pytest.approx(1.0, rel=0.08)
    assert abs(noise.mean()) < 0.11
    assert len(np.unique(noise)) > 0.99 * SIZE  # no value's noise is another's


def test_groups_and_rounds_have_noise_of_their_own(tmp_path: Path) -> None:
    updates = store(tmp_path, np.zeros(LAYOUT.size))
    totals = []
    for _ in range(2):
        totals.append(
            noisy_weighted_sum(updates, WEIGHTS, LAYOUT, clip_norm=1.0, noise_multiplier=1.0, frozen=[])
        )
    rows = np.concatenate([total.reshape(len(GROUPS), SIZE) for total in totals])
    correlations = np.corrcoef(rows) - np.eye(len(rows))
    assert np.abs(correlations).max() < 0.11


def test_count_of_norms_gets_its_full_noise() -> None:
    """Its sensitivity is 1/2: the noise is half of `COUNT_NOISE_RATIO` = 3 times the round's multiplier."""
    num_norms = 1000
    steps = []
    for _ in range(4000):
        clip_norm = adapt_clip_norm(1.0, [0.5] * num_norms, 0.5, 2.0)
        steps.append(math.log(clip_norm) / -0.2)  # the noisy fraction of norms within, less the quantile
    noise = (np.array(steps) - 0.5) * num_norms
    assert noise.std() == pytest.approx(3.0 * 2.0 / 2, rel=0.08)
    assert abs(noise.mean()) < 0.11 * 3


def test_all_rounds_of_all_stages_together_cost_epsilon() -> None:
    config = central_config()
    stage = config.stages["main"]
    two_stages = replace(
        config, stages={"first": replace(stage, rounds=6), "second": replace(stage, rounds=4)}
    )
    assert round_noise_multiplier(two_stages) == round_noise_multiplier(config)
    longest_alone = replace(config, stages={"first": replace(stage, rounds=6)})
    assert round_noise_multiplier(two_stages) > 1.1 * round_noise_multiplier(longest_alone)
    expected = solve_noise_multiplier(config.privacy.epsilon, config.privacy.delta, ((1.0, 10),))
    assert round_noise_multiplier(config) == expected


def test_norm_that_was_summed_too_small_does_not_escape_the_clipping(tmp_path: Path) -> None:
    delta = np.random.default_rng(1).normal(size=LAYOUT.size)
    updates = store(tmp_path, delta)
    for update in updates:
        update.norm *= 1 - 9e-5  # as float32 may lose
    weights = {group: {"a": 1.0, "b": 0.0, "c": 0.0} for group in GROUPS}
    for clip_norm in (1.0, updates[0].norm):
        total = noisy_weighted_sum(
            updates, weights, LAYOUT, clip_norm=clip_norm, noise_multiplier=0.0, frozen=[]
        )
        length = float(np.linalg.norm(total.astype(np.float64)))
        assert length <= clip_norm * (1 + 1e-6)
        assert length == pytest.approx(clip_norm, rel=3e-4)


@pytest.mark.parametrize("quantile", [0.0, 0.5])
def test_round_is_recorded_and_gets_its_noise_multiplier(tmp_path: Path, quantile: float) -> None:
    config = central_config(f"privacy.adaptive_clip_quantile={quantile}", "privacy.clip_norm=2")
    run = Run("r", config, tmp_path, InProcess([]), open_ledger(tmp_path))
    run.model.layout = LAYOUT
    updates = store(tmp_path / "spool", np.zeros(LAYOUT.size))
    multiplier = round_noise_multiplier(config)
    first = dp_weighted_sum(run, config.stages["main"], updates, WEIGHTS)
    assert first.clip_norm == 2.0
    assert first.update.std() == pytest.approx(sum_noise_multiplier(multiplier, config) * 2.0 * 0.8, rel=0.05)
    assert (sum_noise_multiplier(multiplier, config) > multiplier) == bool(quantile)
    next_clip_norm = run.result.clip_norm
    assert next_clip_norm is not None
    assert (next_clip_norm != 2.0) == bool(quantile)
    second = dp_weighted_sum(run, config.stages["main"], updates, WEIGHTS)
    assert second.clip_norm == next_clip_norm
    assert second.epsilon > first.epsilon > 0
    assert json.loads((tmp_path / "privacy.json").read_text())["noise"] == [multiplier] * 2
