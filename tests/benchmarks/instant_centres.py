"""Centres that answer at once with valid replies, computed from no scans.

In this process (`InstantCentres`) or behind Flower's simulation (`client_app`).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from common.config.compose import compose_config
from common.config.parse import parse_config
from common.config.schema import Config, Task
from common.learning.losses import class_names
from common.modeling.model import make_model
from common.modeling.parameters import build_layout
from common.protocol.code_fingerprint import fingerprint_code
from common.protocol.flower_records import from_records, to_records
from common.protocol.messages import (
    JoinReply,
    JoinRequest,
    Reply,
    Request,
    StatisticsReply,
    StatisticsRequest,
    Sums,
    TrainReply,
    TrainRequest,
)
from common.protocol.sum_key import LabelCountKey, SumKey
from common.protocol.update_codec import Arrays, encode_update, select_codec
from server.run.transport import ReceivedReply
from tests.in_process_federation import count_bytes

ROUNDS = 4  # three intervals between the beginnings of two; the first round's has what happens once
SOURCES = [f"scanner{number}" for number in range(8)]


def compose_federation(num_centres: int, backbone: str) -> Config:
    """The recipe `multisource` with so many centres."""
    names = [f"centre{number:03d}" for number in range(num_centres)]
    overrides = [
        f"federation.centres=[{','.join(names)}]",
        f"tasks.source.classes=[{','.join(SOURCES)}]",
        f"stage.rounds={ROUNDS}",
        "federation.join_timeout=300",
        f"backbone.name={backbone}",
        "evaluation.checkpoint_selection=last",
    ]
    return compose_config(overrides)


@dataclass(frozen=True)
class EncodedChange:
    """A round's change of the model as it travels; the same from every centre."""

    arrays: Arrays
    int_buffer_size: int


@functools.lru_cache(1)
def encode_change(backbone: str) -> EncodedChange:
    config = compose_federation(4, backbone)
    layout = build_layout(make_model(config.backbone, config.tasks, 0))
    delta = np.random.default_rng(1).standard_normal(layout.size, dtype=np.float32) * np.float32(1e-3)
    encoded = encode_update(delta, layout, select_codec(config))
    return EncodedChange(encoded.arrays, layout.int_buffer_size)


def answer(index: int, request: Request) -> Reply:
    """The reply of the centre with this index."""
    config = parse_config(request.config)
    centre = config.federation.centres[index]
    if isinstance(request, JoinRequest):
        return answer_join(centre, SOURCES[index % len(SOURCES)])
    if isinstance(request, TrainRequest):
        return answer_training(centre, config)
    assert isinstance(request, StatisticsRequest)
    sums: Sums = {}
    for name, task in config.tasks.items():
        if request.name == "counts":
            sums |= count_labels(centre, name, task)
        elif request.name == "scores":
            sums |= score_task(centre, name, task, config.evaluation.histogram_bins)
    return StatisticsReply(centre, sums)


def answer_join(centre: str, source: str) -> JoinReply:
    columns = ["covid", "source"]
    return JoinReply(centre, [centre], fingerprint_code(), [source], columns, {"train": 80}, {}, {}, "cpu")


def answer_training(centre: str, config: Config) -> TrainReply:
    change = encode_change(config.backbone.name)
    return TrainReply(
        centre,
        delta=np.empty(0, np.float32),
        int_buffers=np.zeros(change.int_buffer_size, np.int64),
        scans=80,
        steps=20,
        losses={"covid": [8.0, 80.0]},
        seconds=0.0,
        encoded_delta=change.arrays,
    )


def count_labels(centre: str, task_name: str, task: Task) -> Sums:
    counts = np.array([40.0] * len(class_names(task_name, task)) + [0.0])
    return {str(LabelCountKey(centre, split, task_name)): counts for split in ("train", "val", "test")}


def score_task(centre: str, task_name: str, task: Task, histogram_bins: int) -> Sums:
    loss_key = str(SumKey(centre, task_name, "loss"))
    loss = np.array([40.0, 80.0])
    if task.type == "binary":
        histogram_key = str(SumKey(centre, task_name, "hist"))
        return {histogram_key: np.ones((2, histogram_bins)), loss_key: loss}
    confusion_key = str(SumKey(centre, task_name, "confusion"))
    return {confusion_key: np.eye(len(class_names(task_name, task))) * 10, loss_key: loss}


class InstantCentres:
    """A transport in this process (server/run/transport.py).

    Requests and replies go through the records that travel, one at a time.
    """

    def discover(self, request: Request, expected: list[str], timeout: float) -> Iterator[ReceivedReply]:
        for index, centre in enumerate(expected):
            yield ReceivedReply(centre, answer(index, request))

    def send_and_receive(self, requests: Mapping[str, Request], timeout: float) -> Iterator[ReceivedReply]:
        train_records = None
        for index, (centre, request) in enumerate(requests.items()):
            bytes_down = count_bytes(from_records(to_records(request)))
            reply = answer(index, request)
            if isinstance(reply, TrainReply):
                if train_records is None:  # packed once: that is the centres' work
                    train_records = to_records(reply)
                reply = replace(cast(TrainReply, from_records(train_records)), centre=centre)
            yield ReceivedReply(centre, reply, count_bytes(reply), bytes_down)


client_app = ClientApp()


def reply_to_flower(message: Message, context: Context) -> Message:
    request = cast(Request, from_records(message.content))
    reply = answer(int(context.node_config["partition-id"]), request)
    return Message(content=to_records(reply), reply_to=message)


client_app.query()(reply_to_flower)
client_app.train()(reply_to_flower)
