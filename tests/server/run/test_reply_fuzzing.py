"""The gate against thousands of replies that were changed at random."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.protocol.messages import BaseWeightsMissing, Refusal, Reply, StatisticsReply, TrainReply
from common.utils.errors import RefusalCode
from server.aggregation.screening import decode_reply, find_validation_error
from server.run.flower_transport import to_reply
from server.run.reply_validation import validate_reply
from tests.hostile_replies import MARKER, Wire, change, put_on_wire
from tests.server.run.honest_replies import LAYOUT, Exchange, make_exchanges, make_run

EXCHANGES = make_exchanges()


class ReceivedMessage:
    """A Flower message with these records."""

    def __init__(self, wire: Wire) -> None:
        self.content = wire.to_records()

    def has_error(self) -> bool:
        return False


def receive(exchange: Exchange, wire: Wire) -> Reply:
    """Return what the coordinator makes of a message: the reply, or a refusal in its place."""
    message: Any = ReceivedMessage(wire)
    return validate_reply(make_run(exchange.config), "west", exchange.request, to_reply(message))


@pytest.mark.parametrize("name", EXCHANGES)
def test_honest_replies_are_accepted(name: str) -> None:
    exchange = EXCHANGES[name]
    assert type(receive(exchange, put_on_wire(exchange.reply))) is type(exchange.reply)


@settings(max_examples=4000, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**32 - 1))
def test_changed_replies_are_honest_ones_or_refused_with_a_plain_reason(seed: int) -> None:
    dice = random.Random(seed)
    exchange = EXCHANGES[dice.choice(list(EXCHANGES))]
    wire = put_on_wire(exchange.reply)
    change(wire, dice)
    received = receive(exchange, wire)
    if isinstance(received, Refusal):
        assert received.centre == "west"
        assert len(received.reason) <= 500
        assert received.reason.isprintable()
        if not isinstance(exchange.reply, Refusal):
            assert MARKER not in received.reason or received.code is not RefusalCode.BAD_REPLY
        return
    assert type(received) is type(exchange.reply) or isinstance(received, BaseWeightsMissing)
    assert received.centre == "west"
    if isinstance(received, StatisticsReply):
        assert_possible_sums(received, exchange)
    if isinstance(received, TrainReply):
        assert_possible_training(received, exchange)


def assert_possible_sums(received: StatisticsReply, exchange: Exchange) -> None:
    assert isinstance(exchange.reply, StatisticsReply)
    assert 0 <= received.seconds < np.inf
    for key, array in received.sums.items():
        assert key.split("/")[0] in ("west", "n", "sum", "square")
        assert np.isfinite(array).all()
        if key in exchange.reply.sums:
            assert array.shape == exchange.reply.sums[key].shape
        if key not in ("sum", "square"):
            assert array.min() >= 0


def assert_possible_training(received: TrainReply, exchange: Exchange) -> None:
    assert received.scans >= 0 <= received.steps
    assert 0 <= received.seconds < np.inf
    for loss in received.losses.values():
        assert len(loss) == 2
        assert np.isfinite(loss).all()
    if exchange.config.privacy.secagg:
        assert received.delta.shape == (0,)
        return
    try:
        decoded = decode_reply(received, LAYOUT, exchange.config.aggregation.compression)
    except ValueError:
        assert exchange.config.aggregation.compression == "int4"
        return
    assert decoded.delta.shape == (LAYOUT.size,)
    assert find_validation_error(decoded) or np.isfinite(decoded.delta).all()
