"""A small model and random updates of it, for the tests of aggregation."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from common.config.schema import BackboneConfig, Task
from common.modeling.model import make_model
from common.modeling.parameters import Layout, Weights, build_layout, get_model_weights
from common.protocol.messages import TrainReply
from server.aggregation.stored_updates import StoredUpdate, store_update

TASKS = {"covid": Task(), "source": Task(type="multiclass", classes=["a", "b"])}
MODEL = make_model(BackboneConfig(), TASKS, 1)
LAYOUT: Layout = build_layout(MODEL)
START: Weights = get_model_weights(MODEL, LAYOUT)
CENTRES = ["north", "east", "south"]


def make_reply(centre: str, seed: int, counter: int = 7) -> TrainReply:
    """Return a reply with a random delta and all integer buffers equal to `counter`."""
    delta = np.random.default_rng(seed).normal(size=LAYOUT.size).astype(np.float32)
    return TrainReply(centre, delta, np.full(LAYOUT.int_buffer_size, counter, np.int64), 10, 5, {}, 0.1)


def store_random_updates(folder: Path, *seeds: int) -> list[StoredUpdate]:
    """Return one stored update a seed, of the first centres."""
    return [
        store_update(make_reply(centre, seed, 7 + seed), LAYOUT, folder)
        for centre, seed in zip(CENTRES, seeds, strict=False)
    ]
