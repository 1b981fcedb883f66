"""Central differential privacy: noise on the sum of the updates, so that the model reveals no single update.

DP-FedAvg (McMahan et al., "Learning differentially private recurrent language models", ICLR 2018) with every
centre in every round. An update is clipped to the norm C; in the weighted sum it then moves the weights by C
times its largest weight at most, and Gaussian noise of sigma times that is added to every value that can
move. The unit is the centre: its update against none (all zeros) in its place, while everybody's counts,
weights and presence are known. `privacy.adaptive_clip_quantile` lets C follow that quantile of the norms
(Andrew et al., "Differentially private learning with adaptive clipping", NeurIPS 2021): the number of norms
within C is counted with noise too, which takes its part of the round's noise multiplier (their theorem 1).

This protects against whoever sees the models: other centres, and the recipients of the final one. It does not
protect against the coordinator, which sees every update as it is, and the counts and scores in the report are
exact. Against the coordinator there is `privacy.dp_level=patient`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from common.config.schema import Config, Stage
from common.modeling.local_layers import find_local_values
from common.modeling.model import make_model, shallow_parameter_names
from common.modeling.parameters import Layout
from common.privacy.accountant import compute_epsilon, solve_noise_multiplier
from common.privacy.gaussian_noise import secure_gaussian
from common.utils.atomic_files import atomic_write
from server.aggregation.stored_updates import StoredUpdate
from server.aggregation.weighted_mean import BLOCK_SIZE, split_into_blocks, weighted_sum
from server.aggregation.weighting import GroupWeights
from server.run.run_state import Run

BUDGET_FILE = "privacy.json"  # in the run's folder
CLIP_LEARNING_RATE = 0.2  # of the clip norm's steps (Andrew et al., section 3)
# Noise multiplier of the count of norms within the clip norm, as a multiple of the round's. It costs the sum
# 6 % more noise.
COUNT_NOISE_RATIO = 3.0
NORM_ROUNDING = 1e-4  # a norm that was summed in float32 may be smaller than the true one by this fraction


@dataclass(frozen=True)
class PrivateSum:
    """A noisy sum of updates, and what it cost."""

    update: NDArray[np.float32]  # [P]
    epsilon: float  # of the whole run so far
    clip_norm: float  # of this round


def dp_weighted_sum(
    run: Run, stage: Stage, updates: Sequence[StoredUpdate], group_weights: GroupWeights
) -> PrivateSum:
    """Return the noisy sum of a round's updates, after its cost was recorded; adapt the run's clip norm."""
    privacy = run.config.privacy
    clip_norm = privacy.clip_norm if run.result.clip_norm is None else run.result.clip_norm
    noise_multiplier = round_noise_multiplier(run.config)
    epsilon = record_spent(run.run_dir / BUDGET_FILE, noise_multiplier, privacy.delta)
    update = noisy_weighted_sum(
        updates,
        group_weights,
        run.model.layout,
        clip_norm=clip_norm,
        noise_multiplier=sum_noise_multiplier(noise_multiplier, run.config),
        frozen=frozen_slices(run, stage),
    )
    run.result.clip_norm = clip_norm
    if privacy.adaptive_clip_quantile:
        norms = [update.norm for update in updates]
        run.result.clip_norm = adapt_clip_norm(
            clip_norm, norms, privacy.adaptive_clip_quantile, noise_multiplier
        )
    return PrivateSum(update, epsilon, clip_norm)


def round_noise_multiplier(config: Config) -> float:
    """Return a round's noise multiplier: as configured, or such that all rounds cost `privacy.epsilon`."""
    if config.privacy.noise_multiplier:
        return config.privacy.noise_multiplier
    num_rounds = sum(stage.rounds for stage in config.stages.values())
    return solve_noise_multiplier(config.privacy.epsilon, config.privacy.delta, ((1.0, num_rounds),))


def sum_noise_multiplier(noise_multiplier: float, config: Config) -> float:
    """Return what is left of the round's noise multiplier z for the sum.

    Where the clip norm adapts, the count has its part: 1/z^2 = 1/sum^2 + 1/count^2.
    """
    if config.privacy.adaptive_clip_quantile:
        correction: float = (1 - COUNT_NOISE_RATIO**-2) ** -0.5
        return noise_multiplier * correction
    return noise_multiplier


def noisy_weighted_sum(
    updates: Sequence[StoredUpdate],
    group_weights: GroupWeights,
    layout: Layout,
    *,
    clip_norm: float,
    noise_multiplier: float,
    frozen: Sequence[slice],
) -> NDArray[np.float32]:
    """Return `sum_c w_c delta_c min(1, C / |delta_c|) + sigma C max w N(0, 1)` [P].

    Values in `frozen` and parameter groups without weights do not move.
    """
    update = weighted_sum(updates, _clip_weights(updates, group_weights, clip_norm), layout)
    largest_weight = 0.0
    for weights in group_weights.values():
        largest_weight = max([largest_weight, *weights.values()])
    noise_scale = noise_multiplier * clip_norm * largest_weight
    for group, spans in layout.group_slices().items():
        if any(group_weights.get(group, {}).values()):
            for span in spans:
                _add_noise(update[span], noise_scale)
    for span in frozen:
        update[span] = 0
    return update


def _clip_weights(
    updates: Sequence[StoredUpdate], group_weights: GroupWeights, clip_norm: float
) -> dict[str, dict[str, float]]:
    """Return the weights times the factors that bring each update's norm down to the clip norm."""
    clip_factors = {}
    for update in updates:
        norm = update.norm * (1 + NORM_ROUNDING)
        clip_factors[update.centre] = min(1.0, clip_norm / norm) if norm else 1.0
    clipped_weights = {}
    for group, weights in group_weights.items():
        clipped_weights[group] = {c: weight * clip_factors[c] for c, weight in weights.items()}
    return clipped_weights


def _add_noise(values: NDArray[np.float32], noise_scale: float) -> None:
    """Add Gaussian noise in place, block by block."""
    for block in split_into_blocks(slice(0, len(values)), BLOCK_SIZE):
        noise = secure_gaussian(block.stop - block.start)
        torch.from_numpy(values[block]).add_(noise, alpha=noise_scale)


def frozen_slices(run: Run, stage: Stage) -> list[slice]:
    """Return what no honest centre changes, so that it needs no noise.

    Frozen weights, buffers, and layers that stay at the centres.
    """
    layout = run.model.layout
    local_values = find_local_values(layout, stage.local_layers)
    frozen_names = set()
    for slot in layout.match_patterns(stage.freeze):
        frozen_names.add(slot.name)
    if stage.freeze_fraction:
        model = make_model(run.config.backbone, run.config.tasks, 0)
        frozen_names |= shallow_parameter_names(model, stage.freeze_fraction)
    spans = []
    for slot in layout.floats:
        if slot.name in frozen_names or not slot.is_parameter or local_values.floats[slot.start]:
            spans.append(slot.span)
    return spans


def adapt_clip_norm(
    clip_norm: float, norms: Sequence[float], quantile: float, noise_multiplier: float
) -> float:
    """Return the next clip norm: `C exp(-0.2 (b - quantile))`, b the noisy fraction of norms within C.

    Each norm counts as 1/2 or -1/2, so that one update moves the count by 1/2 at most.
    """
    count = sum((norm <= clip_norm) - 0.5 for norm in norms)
    noise = COUNT_NOISE_RATIO * noise_multiplier / 2 * float(secure_gaussian(1)[0])
    fraction = (count + noise) / len(norms) + 0.5
    return clip_norm * math.exp(-CLIP_LEARNING_RATE * (fraction - quantile))


def record_spent(path: Path, noise_multiplier: float, delta: float) -> float:
    """Add a round to the run's budget file and return the run's epsilon.

    Written before the noisy sum is used: a round that is repeated after a crash was seen twice and costs
    twice.
    """
    noise_multipliers = []
    if path.exists():
        noise_multipliers = json.loads(path.read_text())["noise"]
    noise_multipliers.append(noise_multiplier)
    atomic_write(path, json.dumps({"noise": noise_multipliers}).encode())
    return compute_epsilon(tuple((multiplier, 1.0, 1) for multiplier in noise_multipliers), delta)
