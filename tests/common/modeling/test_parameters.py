"""Flat weights: nothing is lost between a model and its buffers, and wrong weights are rejected."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from common.config.schema import BackboneConfig, Task
from common.modeling.model import make_model
from common.modeling.parameters import Weights, build_layout, get_model_weights, set_model_weights
from common.utils.errors import ConsiliumError

TASKS = {"covid": Task(), "source": Task(type="multiclass", classes=["a", "b"])}


def count_values(slices: list[slice]) -> int:
    return sum(part.stop - part.start for part in slices)


def test_round_trip_is_exact_and_keeps_types() -> None:
    model = make_model(BackboneConfig(), TASKS, 1)
    other = make_model(BackboneConfig(), TASKS, 2, channels_last=True)
    model.state_dict()["encoder.bn1.num_batches_tracked"].fill_(2**40 + 1)  # not representable in float32
    layout = build_layout(model)
    assert layout == build_layout(other)
    weights = get_model_weights(model, layout)
    set_model_weights(other, layout, weights)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
        assert tensor.dtype == other.state_dict()[name].dtype
    restored = layout.from_state_dict(layout.to_state_dict(weights))
    np.testing.assert_array_equal(restored.floats, weights.floats)


def test_groups_cover_every_weight_once() -> None:
    layout = build_layout(make_model(BackboneConfig(), TASKS, 1))
    times_covered = np.zeros(layout.size, int)
    for slices in layout.group_slices().values():
        for part in slices:
            times_covered[part] += 1
    assert (times_covered == 1).all()
    assert set(layout.group_slices()) == {"backbone", "covid", "source"}


def test_batch_norm_statistics_are_not_parameters() -> None:
    layout = build_layout(make_model(BackboneConfig(), TASKS, 1))
    statistics = [slot.name for slot in layout.floats if not slot.is_parameter]
    assert statistics
    assert all("running" in name for name in statistics)
    assert all(slot.is_batch_norm for slot in layout.floats if "bn" in slot.name)


def test_decoder_is_a_group_of_its_own() -> None:
    tasks = {**TASKS, "lesion": Task(type="segmentation"), "outcome": Task(head_input="map", hidden_dims=[4])}
    model = make_model(BackboneConfig(), tasks, 1)
    layout = build_layout(model)
    sizes = {group: count_values(slices) for group, slices in layout.group_slices().items()}
    assert list(sizes) == ["backbone", "decoder", "covid", "source", "lesion", "outcome"]
    layout_without_decoder = build_layout(make_model(BackboneConfig(), TASKS, 1))
    assert sizes["backbone"] == count_values(layout_without_decoder.group_slices()["backbone"])
    assert model.decoder is not None
    decoder_tensors = model.decoder.state_dict().values()
    assert sizes["decoder"] == sum(t.numel() for t in decoder_tensors if t.is_floating_point())
    assert sizes["lesion"] == 16 + 1
    assert sizes["outcome"] == 585 * 16 * 4 + 4 + 4 + 1
    assert {slot.group for slot in layout.match_patterns(["decoder.*"])} == {"decoder"}


def test_error_names_the_wrong_weights() -> None:
    model = make_model(BackboneConfig(), TASKS, 1)
    layout = build_layout(model)
    state = layout.to_state_dict(get_model_weights(model, layout))
    incomplete = {name: array for name, array in state.items() if name != "encoder.conv1.0.weight"}
    with pytest.raises(ConsiliumError, match=r"lack 'encoder\.conv1\.0\.weight'"):
        layout.from_state_dict(incomplete)
    with pytest.raises(ConsiliumError, match="shape"):
        layout.from_state_dict(state | {"heads.covid.1.bias": np.zeros(3)})
    with pytest.raises(ConsiliumError, match=r"other|different"):
        set_model_weights(model, layout, Weights(np.zeros(3, np.float32), np.zeros(0, np.int64)))
    with pytest.raises(ConsiliumError, match=r"matches no weight"):
        layout.match_patterns(["encoder.nothing.*"])
