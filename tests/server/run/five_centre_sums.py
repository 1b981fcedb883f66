"""Five centres' counts and updates, masked by their code and added by the coordinator's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from client.federation import secure_aggregation as centre_side
from client.federation.parameter_cache import parameter_layout
from common.config.compose import compose_config
from common.config.parse import config_to_dict
from common.config.schema import Config
from common.modeling.parameters import Weights
from common.privacy import secure_aggregation
from common.privacy.masked_layout import empty_sums
from common.protocol.messages import StatisticsReply, StatisticsRequest, TrainReply, TrainRequest
from server.run.secure_aggregation import SecureSumResult, secure_sum
from tests.secure_sums import Wire, run_over

NAMES = ["north", "east", "south", "west", "centre"]


def make_config(*overrides: str) -> Config:
    config = compose_config(
        ["federation=folder", f"federation.centres=[{','.join(NAMES)}]", "privacy=secagg", *overrides]
    )
    tasks = dict(config.tasks)
    tasks["source"] = replace(tasks["source"], classes=NAMES)
    stages = {"main": replace(config.stages["main"], tasks=["covid"])}
    return replace(config, tasks=tasks, stages=stages)


MODEL_SCOPE = make_config()
ALL_SCOPE = make_config("privacy.secagg.scope=all", "evaluation.reduction=pooled")
LAYOUT = parameter_layout(MODEL_SCOPE)
NUM_PARAMETERS = sum(slot.stop - slot.start for slot in LAYOUT.floats if slot.is_parameter)
LABEL_WEIGHTS = dict(zip(NAMES, [1.0, 2.0, 3.0, 4.0, 5.0], strict=True))
SumsByCentre = Mapping[str, Mapping[str, np.ndarray]]


def sum_counts(wire: Wire, sums: SumsByCentre) -> SecureSumResult:
    """Add the centres' label counts in a secure sum."""
    query = StatisticsRequest("r", config_to_dict(wire.config), "counts", "")
    replies = {}
    for centre, centre_sums in sums.items():
        reply = StatisticsReply(centre, dict(centre_sums))
        replies[centre] = centre_side.mask_statistics(wire.folder / centre, wire.config, query, reply)
        assert not replies[centre].sums
    return secure_sum(run_over(wire, LAYOUT), replies, 0, empty_sums(query, wire.config, LAYOUT))


def make_counts(start: int) -> dict[str, dict[str, np.ndarray]]:
    return {c: {f"{c}/train/covid": np.array([start + i, 10.0 * i, 3])} for i, c in enumerate(NAMES)}


def add_counts(sums: SumsByCentre, survivors: list[str]) -> np.ndarray:
    return np.sum([next(iter(sums[centre].values())) for centre in survivors], axis=0)


def make_updates(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {centre: rng.normal(0, 1e-2, LAYOUT.size).astype(np.float32) for centre in NAMES}


def zero_weights(value: float = 0.0) -> Weights:
    return Weights(np.full(LAYOUT.size, value, np.float32), np.zeros(LAYOUT.int_buffer_size, np.int64))


def mask_updates(
    wire: Wire,
    updates: Mapping[str, np.ndarray],
    label_weights: Mapping[str, float] = LABEL_WEIGHTS,
    round_number: int = 1,
    deceived: str = "",
    known_change: np.ndarray | None = None,
) -> dict[str, TrainReply]:
    """The centres' replies to a TrainRequest. The `deceived` centre is sent another model than the others."""
    replies = {}
    for centre, update in updates.items():
        weights = zero_weights(float(centre == deceived))
        request = TrainRequest(
            "r",
            config_to_dict(wire.config),
            "main",
            round_number,
            weights,
            total_label_weight={"covid": sum(label_weights.values())},
        )
        reply = TrainReply(centre, update, weights.int_buffers, 5, 2, {}, 0.1)
        own_weights = {"covid": label_weights[centre], "source": 1.0}
        replies[centre] = centre_side.mask_update(
            wire.folder / centre, wire.config, request, reply, own_weights, known_change
        )
    return replies


def sum_updates(wire: Wire, replies: Mapping[str, TrainReply]) -> SecureSumResult:
    empty = secure_aggregation.empty_update_sums(LAYOUT)
    return secure_sum(run_over(wire, LAYOUT), replies, NUM_PARAMETERS, empty)


def mean_update(result: SecureSumResult) -> np.ndarray:
    settings = secure_aggregation.require_secagg_config(MODEL_SCOPE)
    return secure_aggregation.dequantize_mean(result.values, result.sums, LAYOUT, settings)
