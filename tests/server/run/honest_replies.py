"""Requests of every kind to the centre west, and what an honest centre replies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np

import tests.upgrade.tiny_backbone  # noqa: F401  # registers tiny_net
from common.config.compose import compose_config
from common.config.parse import config_to_dict
from common.config.schema import Config
from common.modeling.model import make_model
from common.modeling.parameters import EMPTY_PARAMS, build_layout, get_model_weights
from common.privacy.masked_layout import empty_score_sums
from common.privacy.secure_aggregation import derive_public_key
from common.protocol.image_statistics import IMAGE_STATISTICS
from common.protocol.messages import (
    BaseWeightsMissing,
    JoinReply,
    JoinRequest,
    MaskedInputReply,
    MaskedInputRequest,
    Refusal,
    Reply,
    Request,
    ShareKeysReply,
    ShareKeysRequest,
    StatisticsReply,
    StatisticsRequest,
    Sums,
    TrainReply,
    TrainRequest,
    UnmaskReply,
    UnmaskRequest,
)
from common.protocol.update_codec import encode_update
from server.run.run_state import ModelState, Run

CENTRES = ["north", "east", "south", "west"]
SETTINGS = [
    f"federation.centres=[{','.join(CENTRES)}]",
    "tasks.source.classes=[a,b,c]",
    "backbone.name=tiny_net",
    "evaluation.histogram_bins=8",
]
POOLED = "evaluation.reduction=pooled"
PLAIN = compose_config(SETTINGS)
EXACT = compose_config([*SETTINGS, "aggregation.compression=fp32"])
INT4 = compose_config([*SETTINGS, "aggregation.compression=int4"])
MASKED = compose_config([*SETTINGS, "privacy=secagg"])
HIDDEN = compose_config(
    [*SETTINGS, "privacy=secagg", "privacy.secagg.scope=all", "evaluation.reduction=pooled"]
)
MODEL = make_model(PLAIN.backbone, PLAIN.tasks, 0)
LAYOUT = build_layout(MODEL)
WEIGHTS = get_model_weights(MODEL, LAYOUT)


@dataclass(frozen=True)
class Exchange:
    """A request and its honest reply."""

    config: Config
    request: Request
    reply: Reply


def make_run(config: Config) -> Run:
    """Return a run of which all centres are members."""
    run = Run("r", config, Path("unused"), cast(Any, None), cast(Any, None), ModelState(LAYOUT, WEIGHTS))
    for centre in CENTRES:
        run.membership.members[centre] = make_join(centre)
    return run


def make_join(centre: str) -> JoinReply:
    return JoinReply(
        centre=centre,
        cohorts=[centre],
        fingerprint="0123456789abcdef",
        sources=["scanner A", "Zürich"],
        columns=["covid", "source"],
        scans={"train": 80, "val": 10, "test": 10},
        skipped={"it is not there": 2},
        versions={"torch": "2.8"},
        device="cuda:0",
        notes=["a remark"],
        policy={"epsilon": 3.0, "labels": ["covid"], "allowed_hours": "22:00-06:00"},
    )


def make_exchanges() -> dict[str, Exchange]:
    """Return one exchange of every kind, by name."""
    plain = config_to_dict(PLAIN)

    def ask(name: str, task: str = "", centroids: np.ndarray | None = None) -> StatisticsRequest:
        weights = None if name in ("counts", "quality") else WEIGHTS
        return StatisticsRequest("r", plain, name, "main", "val", task, weights, [], centroids)

    centroids = np.zeros((2, 8))
    cached = StatisticsRequest("r", plain, "scores", "main", base_digest="a", target_digest="b")
    exchanges = {
        "join": Exchange(PLAIN, JoinRequest("r", plain), make_join("west")),
        "counts": Exchange(PLAIN, ask("counts"), StatisticsReply("west", _make_counts(), 0.5)),
        "scores": Exchange(PLAIN, ask("scores"), StatisticsReply("west", _make_scores(PLAIN), 0.5)),
        "quality": Exchange(PLAIN, ask("quality"), StatisticsReply("west", _make_image_statistics(), 0.5)),
        "moments": Exchange(PLAIN, ask("moments", "source"), StatisticsReply("west", _make_moments())),
        "clusters": Exchange(
            PLAIN, ask("clusters", "source", centroids), StatisticsReply("west", _make_clusters())
        ),
        "missing": Exchange(PLAIN, cached, BaseWeightsMissing("west")),
        "refusal": Exchange(PLAIN, ask("counts"), Refusal("west", "the disk is full")),
    }
    masked_counts = StatisticsReply("west", {}, 0.5, "sum", make_public_keys())
    exchanges["hidden"] = Exchange(HIDDEN, ask("counts"), masked_counts)
    for config in (PLAIN, EXACT, INT4, MASKED):
        name = "train masked" if config is MASKED else f"train {config.aggregation.compression}"
        exchanges[name] = Exchange(config, _make_train_request(config), _make_training(config))
    return exchanges | _make_secure_steps(plain)


def _make_secure_steps(config: dict[str, Any]) -> dict[str, Exchange]:
    roster = dict.fromkeys(CENTRES, make_public_keys())
    encrypted = dict.fromkeys(["north", "east", "south"], np.zeros(85, np.uint8))
    revealed = dict.fromkeys(CENTRES, np.zeros(16, np.uint8)) | {"east": np.zeros(32, np.uint8)}
    masked = MaskedInputReply("west", np.zeros(64, np.uint8), np.zeros(3, np.uint64))
    survivors = ["north", "south", "west"]
    return {
        "share keys": Exchange(
            MASKED, ShareKeysRequest("r", config, "sum", roster), ShareKeysReply("west", {**encrypted})
        ),
        "masked input": Exchange(MASKED, MaskedInputRequest("r", config, "sum", {**encrypted}), masked),
        "unmask": Exchange(
            MASKED, UnmaskRequest("r", config, "sum", survivors), UnmaskReply("west", {**revealed})
        ),
    }


def make_public_keys() -> np.ndarray:
    keys = derive_public_key(b"\1" * 32) + derive_public_key(b"\2" * 32) + b"\3" * 32
    return np.frombuffer(keys, np.uint8)


def _make_train_request(config: Config) -> TrainRequest:
    return TrainRequest("r", config_to_dict(config), "main", 1, WEIGHTS)


def _make_training(config: Config) -> TrainReply:
    delta = np.random.default_rng(1).normal(size=LAYOUT.size).astype(np.float32)
    losses = {"covid": [8.0, 80.0], "source": [9.0, 80.0]}
    reply = TrainReply("west", EMPTY_PARAMS, WEIGHTS.int_buffers + 5, 80, 20, losses, 1.5)
    if config.privacy.secagg:
        reply.sum_id = "sum"
        reply.public_keys = make_public_keys()
    elif config.aggregation.compression == "fp32":
        reply.delta = delta
    else:
        reply.encoded_delta = encode_update(delta, LAYOUT, config.aggregation.compression).arrays
    return reply


def _make_counts() -> Sums:
    return {f"west/{split}/covid": np.array([30.0, 40.0, 10.0]) for split in ("train", "val", "test")}


def _make_scores(config: Config) -> Sums:
    sums: Sums = {}
    for task in ("covid", "source"):
        for statistic, zeros in empty_score_sums(config.tasks[task], 8).items():
            sums[f"west/{task}/{statistic}"] = zeros + 3
    return sums


def _make_image_statistics() -> Sums:
    return {f"west/quality/{name}": s.bin_edges[1:] * 0.1 for name, s in IMAGE_STATISTICS.items()}


def _make_moments() -> Sums:
    features = np.random.default_rng(2).normal(size=(30, 8))
    one_hot = np.eye(3)[np.arange(30) % 2]
    return {"n": one_hot.sum(0), "sum": one_hot.T @ features, "square": features.T @ features}


def _make_clusters() -> Sums:
    features = np.random.default_rng(3).normal(size=(30, 8))
    one_hot = np.eye(2)[np.arange(30) % 2]
    return {"n": one_hot.sum(0), "sum": one_hot.T @ features, "square": one_hot.T @ (features**2).sum(1)}
