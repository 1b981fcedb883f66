"""Messages survive packing and Flower's records, and sums add by key."""

from __future__ import annotations

import numpy as np
import pytest

from common.modeling.parameters import Weights
from common.protocol.flower_records import from_records, to_records
from common.protocol.message_packing import metadata_to_json, pack_message, unpack_message
from common.protocol.messages import StatisticsReply, TrainReply, TrainRequest, add_sums
from common.protocol.sum_key import LabelCountKey, LabelWeightKey, SumKey, replace_cohort


def test_train_request_survives_flower_records() -> None:
    weights = Weights(np.arange(5, dtype=np.float32), np.array([2**40], dtype=np.int64))
    sent = TrainRequest("run", {"a": [1, 2]}, "main", 3, weights, {"covid": [4.0, 5.0]}, [("main", 2)], [1])
    received = from_records(to_records(sent))
    assert isinstance(received, TrainRequest)
    np.testing.assert_array_equal(received.weights.floats, weights.floats)
    assert received.weights.int_buffers.dtype == np.int64
    assert received.weights.int_buffers[0] == 2**40
    assert received.config == {"a": [1, 2]}
    assert received.stage == "main"
    assert received.round == 3
    assert received.rounds_to_keep == [1]


def test_sums_survive_packing() -> None:
    sent = StatisticsReply("north", {"north/covid/hist": np.ones((2, 4)), "n": np.zeros(0)}, 1.5)
    received = unpack_message(*pack_message(sent))
    assert isinstance(received, StatisticsReply)
    assert set(received.sums) == set(sent.sums)


def test_empty_array_survives_flower_records() -> None:
    sent = TrainReply("c", np.empty(0, np.float32), np.empty(0, np.int64), 1, 1, {"covid": [1.0, 2.0]}, 0.1)
    received = from_records(to_records(sent))
    assert isinstance(received, TrainReply)
    assert received.delta.shape == (0,)


def test_metadata_keys_are_sorted() -> None:
    assert metadata_to_json({"b": 1, "a": 2}) == '{"a": 2, "b": 1}'


def test_sums_add_by_key() -> None:
    total = add_sums({}, {"a": np.array([1.0, 2.0])})
    total = add_sums(total, {"a": np.array([3.0, 4.0]), "b": np.array([1.0])})
    np.testing.assert_array_equal(total["a"], [4, 6])
    np.testing.assert_array_equal(total["b"], [1])
    with pytest.raises(ValueError, match="shape"):
        add_sums(total, {"a": np.zeros(3)})


def test_sum_keys_are_read_from_their_text() -> None:
    assert SumKey.parse(str(SumKey("north", "covid", "hist"))) == SumKey("north", "covid", "hist")
    assert str(LabelCountKey("north", "train", "covid")) == "north/train/covid"
    assert LabelCountKey.parse("north/train/covid") == LabelCountKey("north", "train", "covid")
    assert str(LabelWeightKey("all", "covid")) == "all/mass/covid"
    with pytest.raises(ValueError, match="unpack"):
        SumKey.parse("north/covid")


def test_cohort_of_a_key_is_replaced() -> None:
    assert replace_cohort("north/covid/hist", "all") == "all/covid/hist"
    assert replace_cohort("square", "all") == "square"
