"""`privacy=central`: noise on the sum of the contributions, so that the model does not tell what any one centre brought in.

DP-FedAvg (McMahan et al., "Learning differentially private recurrent language models", ICLR 2018) with every centre in every round. A contribution is
clipped to the norm C; in the weighted sum it then moves the weights by C times its largest weight at most, and Gaussian noise of sigma times that is
added to every value that can move. The unit is the centre: its contribution against none (all zeros) in its place, everybody's counts, weights and
presence being known. `privacy.adaptive_clip_quantile` lets C follow that quantile of the norms (Andrew et al., "Differentially private learning with adaptive
clipping", NeurIPS 2021): how many lie within C is counted with noise too, of which the sum's noise gives off its part (their theorem 1).

It protects against whoever sees the models: other centres, and those who are given the final one. It does not against the coordinator, which sees
every contribution as it is; and the counts and scores in the report are exact. Against the coordinator there is `privacy=patient`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from common.config.schema import Config, Stage
from common.modeling.model import make_model, shallow_parameter_names
from common.modeling.parameters import Layout
from common.privacy.accountant import compute_epsilon, solve_noise_multiplier
from common.privacy.gaussian_noise import secure_gaussian
from common.utils.atomic_files import atomic_write
from server.aggregation.contributions import BLOCK_SIZE, StoredUpdate, weighted_sum
from server.run.run_state import Run

CLIP_LEARNING_RATE = 0.2  # of the clip's steps, as in Andrew et al., section 3
COUNT_NOISE_RATIO = 3.0  # the noise multiplier of the count within the clip, as a multiple of the round's: it costs the sum 6 % more noise
NORM_ROUNDING = 1e-4  # a norm added up in float32 may be short of the true one by this share


def dp_weighted_sum(
    run: Run, stage: Stage, updates: list[StoredUpdate], group_weights: Mapping[str, Mapping[str, float]]
) -> tuple[NDArray[np.float32], dict[str, float]]:
    """The noisy update [P], and what it cost: {"epsilon" of the run so far, "clip" of this round}. It is charged before it is returned."""
    clip = float(run.result.setdefault("clip", run.config.privacy.clip_norm))
    noise = round_noise_multiplier(run.config)
    spent = record_spent(run.run_dir / "privacy.json", noise, run.config.privacy.delta)
    update = noisy_weighted_sum(
        updates,
        group_weights,
        run.layout,
        clip,
        sum_noise_multiplier(noise, run.config),
        frozen_slices(run, stage),
    )
    if run.config.privacy.adaptive_clip_quantile:
        run.result["clip"] = adapt_clip(
            clip, [one.norm for one in updates], run.config.privacy.adaptive_clip_quantile, noise
        )
    return update, {"epsilon": spent, "clip": clip}


def round_noise_multiplier(config: Config) -> float:
    """The noise multiplier of a round: given, or as all rounds of the run together may cost `privacy.epsilon`."""
    rounds = sum(stage.rounds for stage in config.stages.values())
    return config.privacy.noise_multiplier or solve_noise_multiplier(
        config.privacy.epsilon, config.privacy.delta, ((1.0, rounds),)
    )


def sum_noise_multiplier(noise_multiplier: float, config: Config) -> float:
    """What is left for the sum: 1/noise^2 = 1/sum^2 + 1/count^2."""
    return (
        noise_multiplier * (1 - COUNT_NOISE_RATIO**-2) ** -0.5
        if config.privacy.adaptive_clip_quantile
        else noise_multiplier
    )


def noisy_weighted_sum(
    updates: list[StoredUpdate],
    group_weights: Mapping[str, Mapping[str, float]],
    layout: Layout,
    clip_norm: float,
    noise_multiplier: float,
    frozen: list[slice],
) -> NDArray[np.float32]:
    """`sum_c w_c delta_c min(1, C / |delta_c|) + sigma C max w N(0, 1)` [P]; what is `still`, and groups without weights, do not move."""
    within = {
        one.centre: min(1.0, clip_norm / (one.norm * (1 + NORM_ROUNDING))) if one.norm else 1.0
        for one in updates
    }
    update = weighted_sum(
        updates,
        {group: {c: w * within[c] for c, w in of.items()} for group, of in group_weights.items()},
        layout,
    )
    scale = (
        noise_multiplier
        * clip_norm
        * max((w for of in group_weights.values() for w in of.values()), default=0.0)
    )
    for group, runs in layout.group_slices().items():
        moved = any(group_weights.get(group, {}).values())
        for part in (
            slice(at, min(at + BLOCK_SIZE, r.stop))
            for r in runs
            if moved
            for at in range(r.start, r.stop, BLOCK_SIZE)
        ):
            torch.from_numpy(update[part]).add_(secure_gaussian(part.stop - part.start), alpha=scale)
    for part in frozen:
        update[part] = 0
    return update


def frozen_slices(run: Run, stage: Stage) -> list[slice]:
    """What an honest centre does not change, so that noise need not either: frozen weights, and buffers."""
    names = {e.name for e in run.layout.match_patterns(stage.freeze)} if stage.freeze else set()
    if stage.freeze_fraction:
        names |= shallow_parameter_names(
            make_model(run.config.backbone, run.config.tasks, 0), stage.freeze_fraction
        )
    return [e.span for e in run.layout.floats if e.name in names or not e.is_parameter]


def adapt_clip(clip_norm: float, norms: list[float], quantile: float, noise_multiplier: float) -> float:
    """The next clip: `C exp(-0.2 (b - quantile))`, b the noisy share of norms within C. One norm moves the count, less a half each, by a half."""
    spread = COUNT_NOISE_RATIO * noise_multiplier / 2
    share = (sum((norm <= clip_norm) - 0.5 for norm in norms) + spread * float(secure_gaussian(1)[0])) / len(
        norms
    ) + 0.5
    return clip_norm * math.exp(-CLIP_LEARNING_RATE * (share - quantile))


def record_spent(path: Path, noise_multiplier: float, delta: float) -> float:
    """The run's epsilon with one more round, written down first: a round that is done again after a crash has been seen twice and costs twice."""
    spent = (
        [*json.loads(path.read_text())["noise"], noise_multiplier] if path.exists() else [noise_multiplier]
    )
    atomic_write(path, json.dumps({"noise": spent}).encode())
    return compute_epsilon(tuple((of, 1.0, 1) for of in spent), delta)
