"""Flat weights: nothing is lost on the way into the buffer, over the wire and back."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.config.schema import BackboneConfig, Task
from common.modeling.model import make_model
from common.modeling.parameters import Weights, build_layout, get_model_weights, set_model_weights
from common.protocol.flower_records import from_records, to_records
from common.protocol.messages import (
    StatisticsReply,
    TrainReply,
    TrainRequest,
    add_sums,
    metadata_to_json,
    pack_message,
    unpack_message,
)
from common.utils.errors import ConsiliumError

TASKS = {"covid": Task(), "source": Task(type="multiclass", classes=["a", "b"])}


def test_round_trip_is_exact_and_keeps_types() -> None:
    model, other = (
        make_model(BackboneConfig(), TASKS, 1),
        make_model(BackboneConfig(), TASKS, 2, channels_last=True),
    )
    model.state_dict()["encoder.bn1.num_batches_tracked"].fill_(2**40 + 1)  # a float32 could not hold it
    layout = build_layout(model)
    assert layout == build_layout(other)
    set_model_weights(other, layout, get_model_weights(model, layout))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
        assert tensor.dtype == other.state_dict()[name].dtype
    named = layout.to_state_dict(get_model_weights(model, layout))
    again = layout.from_state_dict(named)
    np.testing.assert_array_equal(again.floats, get_model_weights(model, layout).floats)


def test_groups_cover_every_weight_once() -> None:
    layout = build_layout(make_model(BackboneConfig(), TASKS, 1))
    covered = np.zeros(layout.size, int)
    for runs in layout.group_slices().values():
        for run in runs:
            covered[run] += 1
    assert (covered == 1).all()
    assert set(layout.group_slices()) == {"backbone", "covid", "source"}
    statistics = [e.name for e in layout.floats if not e.is_parameter]
    assert statistics
    assert all("running" in name for name in statistics)
    assert all(e.is_batch_norm for e in layout.floats if "bn" in e.name)


def test_the_decoder_is_a_group_of_its_own() -> None:
    tasks = {**TASKS, "lesion": Task(type="segmentation"), "outcome": Task(head_input="map", hidden_dims=[4])}
    model = make_model(BackboneConfig(), tasks, 1)
    layout = build_layout(model)
    plain = build_layout(make_model(BackboneConfig(), TASKS, 1))
    sizes = {
        group: sum(run.stop - run.start for run in runs) for group, runs in layout.group_slices().items()
    }
    assert list(sizes) == ["backbone", "decoder", "covid", "source", "lesion", "outcome"]
    assert sizes["backbone"] == sum(run.stop - run.start for run in plain.group_slices()["backbone"])
    assert sizes["decoder"] == sum(
        t.numel() for t in model.decoder.state_dict().values() if t.is_floating_point()
    )  # type: ignore[union-attr]
    assert sizes["lesion"] == 16 + 1
    assert sizes["outcome"] == 585 * 16 * 4 + 4 + 4 + 1
    assert {e.group for e in layout.match_patterns(["decoder.*"])} == {"decoder"}


def test_wrong_weights_are_named() -> None:
    model = make_model(BackboneConfig(), TASKS, 1)
    layout = build_layout(model)
    named = layout.to_state_dict(get_model_weights(model, layout))
    with pytest.raises(ConsiliumError, match=r"lack 'encoder\.conv1\.0\.weight'"):
        layout.from_state_dict({k: v for k, v in named.items() if k != "encoder.conv1.0.weight"})
    with pytest.raises(ConsiliumError, match="shape"):
        layout.from_state_dict(named | {"heads.covid.1.bias": np.zeros(3)})
    with pytest.raises(ConsiliumError, match=r"other|different"):
        set_model_weights(model, layout, Weights(np.zeros(3, np.float32), np.zeros(0, np.int64)))
    with pytest.raises(ConsiliumError, match=r"matches no weight"):
        layout.match_patterns(["encoder.nothing.*"])


def test_messages_survive_packing_and_flower() -> None:
    weights = Weights(np.arange(5, dtype=np.float32), np.array([2**40], dtype=np.int64))
    train = TrainRequest("run", {"a": [1, 2]}, "main", 3, weights, {"covid": [4.0, 5.0]}, [("main", 2)], [1])
    back = from_records(to_records(train))
    assert isinstance(back, TrainRequest)
    np.testing.assert_array_equal(back.weights.floats, weights.floats)
    assert back.weights.int_buffers.dtype == np.int64
    assert back.weights.int_buffers[0] == 2**40
    assert (back.config, back.stage, back.round, back.rounds_to_keep) == ({"a": [1, 2]}, "main", 3, [1])
    answer = StatisticsReply("north", {"north/covid/hist": np.ones((2, 4)), "n": np.zeros(0)}, 1.5)
    again = unpack_message(*pack_message(answer))
    assert isinstance(again, StatisticsReply)
    assert set(again.sums) == set(answer.sums)
    empty = TrainReply("c", np.empty(0, np.float32), np.empty(0, np.int64), 1, 1, {"covid": [1.0, 2.0]}, 0.1)
    assert from_records(to_records(empty)).delta.shape == (0,)  # type: ignore[union-attr]
    assert metadata_to_json({"b": 1, "a": 2}) == '{"a": 2, "b": 1}'


def test_sums_add_by_key() -> None:
    total = add_sums(
        add_sums({}, {"a": np.array([1.0, 2.0])}), {"a": np.array([3.0, 4.0]), "b": np.array([1.0])}
    )
    np.testing.assert_array_equal(total["a"], [4, 6])
    np.testing.assert_array_equal(total["b"], [1])
    with pytest.raises(ValueError, match="shape"):
        add_sums(total, {"a": np.zeros(3)})
