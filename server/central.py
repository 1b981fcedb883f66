"""`privacy=central`: noise on the sum of the contributions, so that the model does not tell what any one centre brought in.

DP-FedAvg (McMahan et al., "Learning differentially private recurrent language models", ICLR 2018) with every centre in every round. A contribution is
clipped to the norm C; in the weighted sum it then moves the weights by C times its largest weight at most, and Gaussian noise of sigma times that is
added to every value that can move. The unit is the centre: its contribution against none (all zeros) in its place, everybody's counts, weights and
presence being known. `privacy.quantile` lets C follow that quantile of the norms (Andrew et al., "Differentially private learning with adaptive
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

from common.accountant import epsilon, noise_for
from common.files import write_whole
from common.model import make_model, shallow
from common.noise import normals
from common.schema import Config, Stage
from common.weights import Layout
from server.aggregation import BLOCK, Spooled, weighted_sum
from server.state import Run

RATE = 0.2  # of the clip's steps, as in Andrew et al., section 3
COUNT = 3.0  # the noise multiplier of the count within the clip, as a multiple of the round's: it costs the sum 6 % more noise
ROUNDED = 1e-4  # a norm added up in float32 may be short of the true one by this share


def protected(
    run: Run, stage: Stage, spooled: list[Spooled], weights: Mapping[str, Mapping[str, float]]
) -> tuple[NDArray[np.float32], dict[str, float]]:
    """The noisy update [P], and what it cost: {"epsilon" of the run so far, "clip" of this round}. It is charged before it is returned."""
    clip = float(run.result.setdefault("clip", run.config.privacy.clip))
    noise = multiplier(run.config)
    spent = charged(run.folder / "privacy.json", noise, run.config.privacy.delta)
    update = noisy_sum(spooled, weights, run.layout, clip, noise_of_sum(noise, run.config), still(run, stage))
    if run.config.privacy.quantile:
        run.result["clip"] = adapted(clip, [one.norm for one in spooled], run.config.privacy.quantile, noise)
    return update, {"epsilon": spent, "clip": clip}


def multiplier(config: Config) -> float:
    """The noise multiplier of a round: given, or as all rounds of the run together may cost `privacy.epsilon`."""
    rounds = sum(stage.rounds for stage in config.stages.values())
    return config.privacy.noise or noise_for(config.privacy.epsilon, config.privacy.delta, ((1.0, rounds),))


def noise_of_sum(noise: float, config: Config) -> float:
    """What is left for the sum: 1/noise^2 = 1/sum^2 + 1/count^2."""
    return noise * (1 - COUNT**-2) ** -0.5 if config.privacy.quantile else noise


def noisy_sum(
    spooled: list[Spooled], weights: Mapping[str, Mapping[str, float]], layout: Layout, clip: float, noise: float, still: list[slice]
) -> NDArray[np.float32]:
    """`sum_c w_c delta_c min(1, C / |delta_c|) + sigma C max w N(0, 1)` [P]; what is `still`, and groups without weights, do not move."""
    within = {one.centre: min(1.0, clip / (one.norm * (1 + ROUNDED))) if one.norm else 1.0 for one in spooled}
    update = weighted_sum(spooled, {group: {c: w * within[c] for c, w in of.items()} for group, of in weights.items()}, layout)
    scale = noise * clip * max((w for of in weights.values() for w in of.values()), default=0.0)
    for group, runs in layout.groups().items():
        moved = any(weights.get(group, {}).values())
        for part in (slice(at, min(at + BLOCK, r.stop)) for r in runs if moved for at in range(r.start, r.stop, BLOCK)):
            torch.from_numpy(update[part]).add_(normals(part.stop - part.start), alpha=scale)
    for part in still:
        update[part] = 0
    return update


def still(run: Run, stage: Stage) -> list[slice]:
    """What an honest centre does not change, so that noise need not either: frozen weights, and buffers."""
    names = {e.name for e in run.layout.matching(stage.freeze)} if stage.freeze else set()
    if stage.freeze_share:
        names |= shallow(make_model(run.config.backbone, run.config.tasks, 0), stage.freeze_share)
    return [e.where for e in run.layout.floats if e.name in names or not e.parameter]


def adapted(clip: float, norms: list[float], quantile: float, noise: float) -> float:
    """The next clip: `C exp(-0.2 (b - quantile))`, b the noisy share of norms within C. One norm moves the count, less a half each, by a half."""
    spread = COUNT * noise / 2
    share = (sum((norm <= clip) - 0.5 for norm in norms) + spread * float(normals(1)[0])) / len(norms) + 0.5
    return clip * math.exp(-RATE * (share - quantile))


def charged(book: Path, noise: float, delta: float) -> float:
    """The run's epsilon with one more round, written down first: a round that is done again after a crash has been seen twice and costs twice."""
    spent = [*json.loads(book.read_text())["noise"], noise] if book.exists() else [noise]
    write_whole(book, json.dumps({"noise": spent}).encode())
    return epsilon(tuple((of, 1.0, 1) for of in spent), delta)
