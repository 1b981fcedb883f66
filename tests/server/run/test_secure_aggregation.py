"""Secure sums between the centres' code and the coordinator's are exact, also after dropouts and repeats."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.federation import secure_aggregation as centre_side
from common.config.parse import config_to_dict
from common.modeling.parameters import EMPTY_PARAMS
from common.privacy import secure_aggregation
from common.protocol.messages import (
    MaskedInputRequest,
    Refusal,
    ShareKeysRequest,
    TrainReply,
    TrainRequest,
    UnmaskReply,
    UnmaskRequest,
)
from common.utils.errors import RefusalCode
from server.run.secure_aggregation import NotEnoughCentres
from tests.secure_sums import Wire
from tests.server.run.five_centre_sums import (
    ALL_SCOPE,
    LABEL_WEIGHTS,
    LAYOUT,
    MODEL_SCOPE,
    NAMES,
    add_counts,
    make_counts,
    make_updates,
    mask_updates,
    mean_update,
    sum_counts,
    sum_updates,
    zero_weights,
)

# --- the sum is right


@settings(deadline=None, max_examples=6)
@given(st.lists(st.integers(20_000, 10**6), min_size=5, max_size=5))  # of like size: nobody refuses
def test_secure_sum_of_counts_is_the_sum(
    tmp_path_factory: pytest.TempPathFactory, numbers: list[int]
) -> None:
    sums = {}
    for centre, n in zip(NAMES, numbers, strict=True):
        sums[centre] = {
            f"{centre}/val/covid": np.array([n, n % 7, 1.0]),
            f"{centre}/train/covid": np.array([1.0, 2, n]),
        }
    result = sum_counts(Wire(tmp_path_factory.mktemp("sum"), ALL_SCOPE), sums)
    for split in ("val", "train"):
        expected = np.sum([own[f"{centre}/{split}/covid"] for centre, own in sums.items()], axis=0)
        np.testing.assert_array_equal(result.sums[f"all/{split}/covid"], expected)
    assert not result.sums["all/test/covid"].any()
    assert result.survivors == sorted(NAMES)


def test_mean_update_is_the_weighted_mean_within_the_quantization_bound(tmp_path: Path) -> None:
    wire = Wire(tmp_path, MODEL_SCOPE)
    updates = make_updates(1)
    result = sum_updates(wire, mask_updates(wire, updates))
    expected = sum(LABEL_WEIGHTS[centre] / 15 * updates[centre].astype(np.float64) for centre in NAMES)
    trained = np.zeros(LAYOUT.size, bool)
    for slot in LAYOUT.floats:
        trained[slot.span] = slot.group in ("backbone", "covid")
    secagg = secure_aggregation.require_secagg_config(MODEL_SCOPE)
    bound = 5 * secagg.clip_value / 2**secagg.quantization_bits + 1e-8
    assert np.abs(mean_update(result) - expected)[trained].max() <= bound
    assert result.sums["clipped"] == 0


# --- dropouts


@pytest.mark.parametrize("step", [ShareKeysRequest, MaskedInputRequest, UnmaskRequest])
def test_one_of_five_centres_may_drop_out_at_each_step(tmp_path: Path, step: type) -> None:
    wire = Wire(tmp_path, ALL_SCOPE, {(step, "east")})
    counts = make_counts(7)
    result = sum_counts(wire, counts)
    # A centre that has sent its masked numbers is in the sum, whether or not it replies in the last step.
    is_last_step = step is UnmaskRequest
    survivors = [centre for centre in NAMES if centre != "east" or is_last_step]
    assert result.survivors == sorted(survivors)
    np.testing.assert_array_equal(result.sums["all/train/covid"], add_counts(counts, survivors))
    no_reply = Refusal("east", "no reply", code=RefusalCode.OFFLINE)
    assert result.dropouts == ({} if is_last_step else {"east": no_reply})


@pytest.mark.parametrize("step", [ShareKeysRequest, MaskedInputRequest])
def test_mean_update_after_a_dropout_is_that_of_the_others(tmp_path: Path, step: type) -> None:
    wire = Wire(tmp_path, MODEL_SCOPE, {(step, "west")})
    updates = make_updates(2)
    mean = mean_update(sum_updates(wire, mask_updates(wire, updates)))
    backbone = LAYOUT.group_slices()["backbone"][0]
    expected = sum(
        LABEL_WEIGHTS[centre] / 11 * updates[centre][backbone] for centre in NAMES if centre != "west"
    )
    np.testing.assert_allclose(mean[backbone], expected, atol=1e-6)


@pytest.mark.parametrize("step", [ShareKeysRequest, MaskedInputRequest, UnmaskRequest])
def test_nothing_is_revealed_below_the_threshold_and_the_sum_can_be_started_again(
    tmp_path: Path, step: type
) -> None:
    wire = Wire(tmp_path, ALL_SCOPE, {(step, "east"), (step, "west")})
    counts = make_counts(1)
    with pytest.raises(
        NotEnoughCentres, match=r"3 centres stayed in a secure sum that needs 4 \(east, west: no reply\)"
    ):
        sum_counts(wire, counts)
    if step is not UnmaskRequest:
        assert not any(isinstance(reply, UnmaskReply) for reply in wire.seen)
    wire.lost.clear()
    result = sum_counts(wire, counts)
    np.testing.assert_array_equal(result.sums["all/train/covid"], add_counts(counts, NAMES))


# --- a sum again


def test_sum_is_not_repeated_with_other_centres(tmp_path: Path) -> None:
    """The difference of the two sums would show one centre."""
    wire = Wire(tmp_path, ALL_SCOPE)
    counts = make_counts(1)
    sum_counts(wire, counts)
    sum_counts(wire, counts)  # with the same centres, which reveals nothing new
    wire.lost.add((MaskedInputRequest, "east"))
    with pytest.raises(
        NotEnoughCentres,
        match=r"this sum was opened before, with centre, east, north, south, west, .* same centres only",
    ):
        sum_counts(wire, counts)
    updates = make_updates(3)
    sum_updates(Wire(tmp_path, MODEL_SCOPE), mask_updates(wire, updates))
    # A round is the same round with other updates and weights.
    doubled = {centre: 2 * update for centre, update in updates.items()}
    repeated = mask_updates(wire, doubled, LABEL_WEIGHTS | {"north": 9.0})
    with pytest.raises(NotEnoughCentres, match="same centres only"):
        sum_updates(replace(wire, config=MODEL_SCOPE), repeated)


def test_repeated_round_is_the_same_sum_with_new_keys(tmp_path: Path) -> None:
    weights = zero_weights()
    request = TrainRequest(
        "r", config_to_dict(MODEL_SCOPE), "main", 1, weights, total_label_weight={"covid": 15.0}
    )
    reply = TrainReply(
        "north", make_updates(5)["north"], weights.int_buffers, 5, 2, {"covid": [1.5, 3]}, 0.1, epsilon=1.25
    )
    assert centre_side.cached_update(tmp_path, request) is None
    own_weights = LABEL_WEIGHTS | {"covid": 1.0}
    first = centre_side.mask_update(tmp_path, MODEL_SCOPE, request, reply, own_weights)
    second = centre_side.cached_update(tmp_path, request)
    assert second is not None
    assert second.public_keys is not None
    assert not np.array_equal(second.public_keys, cast(Any, first.public_keys))
    no_arrays: dict[str, Any] = {"public_keys": None, "delta": EMPTY_PARAMS, "int_buffers": EMPTY_PARAMS}
    assert replace(second, **no_arrays) == replace(first, **no_arrays)
    assert centre_side.cached_update(tmp_path, replace(request, lr_scale=0.5)) is None
    centre_side.delete_train_sum(tmp_path, "r")
    assert centre_side.cached_update(tmp_path, request) is None
