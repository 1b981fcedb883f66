"""A secure sum of honest centres shows no centre's own numbers, whatever the coordinator asks for."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.federation import secure_aggregation as centre_side
from client.federation import secure_sum_checks
from client.federation.secure_sum_store import HeldShares
from client.site.policy import Policy
from common.config.parse import config_to_dict
from common.config.schema import Config, SecureAggregationConfig
from common.learning.class_imbalance import weights_by_group
from common.modeling.parameters import Layout, TensorSlot
from common.privacy import secure_aggregation
from common.protocol.messages import (
    MaskedInputReply,
    MaskedInputRequest,
    TrainReply,
    TrainRequest,
    UnmaskReply,
)
from common.utils.errors import Refused
from server.run.secure_aggregation import NotEnoughCentres
from tests.secure_sums import Wire
from tests.server.run.five_centre_sums import (
    ALL_SCOPE,
    LABEL_WEIGHTS,
    LAYOUT,
    MODEL_SCOPE,
    NAMES,
    make_counts,
    make_updates,
    mask_updates,
    sum_counts,
    sum_updates,
    zero_weights,
)

TWO_TASKS = replace(MODEL_SCOPE, stages={"main": replace(MODEL_SCOPE.stages["main"], tasks=[])})


# --- attacks by way of the whole protocol


def with_loss_weight(config: Config, task: str, loss_weight: float) -> Config:
    tasks = dict(config.tasks)
    tasks[task] = replace(tasks[task], loss_weight=loss_weight)
    return replace(config, tasks=tasks)


def expect_nothing_opened(wire: Wire, replies: dict[str, TrainReply]) -> None:
    with pytest.raises(NotEnoughCentres):
        sum_updates(wire, replies)
    assert not any(isinstance(reply, UnmaskReply) for reply in wire.seen)


@pytest.mark.parametrize("loss_weight", [0.0, 1e-30, 1e-4])
def test_centre_that_alone_has_weight_sends_no_masked_update(tmp_path: Path, loss_weight: float) -> None:
    """Only north has labels for covid, and the task that the others have counts for nothing."""
    config = with_loss_weight(TWO_TASKS, "source", loss_weight)
    wire = Wire(tmp_path, config)
    replies = {}
    for centre, update in make_updates(1).items():
        weights = zero_weights()
        totals = {"covid": 2.0, "source": 5.0}
        request = TrainRequest("r", config_to_dict(config), "main", 1, weights, total_label_weight=totals)
        reply = TrainReply(centre, update, weights.int_buffers, 5, 2, {}, 0.1)
        own_weights = {"covid": 2.0 if centre == "north" else 0.0, "source": 1.0}
        replies[centre] = centre_side.mask_update(tmp_path / centre, config, request, reply, own_weights)
    result = sum_updates(wire, replies)
    assert "fewer than 2 other centres add in like measure" in result.dropouts["north"].reason
    masked = [reply.centre for reply in wire.seen if isinstance(reply, MaskedInputReply)]
    assert "north" not in masked


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e-3])
def test_centres_whose_changes_vanish_are_no_cover(tmp_path: Path, scale: float) -> None:
    """They trained nothing, or it is rounded to nothing (stage.freeze, drop_last, clip_value)."""
    wire = Wire(tmp_path, MODEL_SCOPE)
    updates = make_updates(2)
    for centre in NAMES[2:]:
        updates[centre] *= np.float32(scale)
    replies = mask_updates(wire, updates)
    with pytest.raises(NotEnoughCentres):
        sum_updates(wire, replies)
    masked = {reply.centre for reply in wire.seen if isinstance(reply, MaskedInputReply)}
    assert masked.isdisjoint(NAMES[:2])
    assert not any(isinstance(reply, UnmaskReply) for reply in wire.seen)


def test_change_that_needs_no_data_is_no_cover(tmp_path: Path) -> None:
    """Weight decay moves the weights of centres that learn nothing, by what the coordinator can compute."""
    wire = Wire(tmp_path, MODEL_SCOPE)
    updates = make_updates(7)
    replies = mask_updates(wire, {"north": updates["north"]})
    for centre in NAMES[1:]:
        known_change = updates[centre]
        replies |= mask_updates(wire, {centre: updates[centre]}, known_change=known_change)
    result = sum_updates(wire, replies)
    assert "fewer than 2 other centres add in like measure" in result.dropouts["north"].reason


def test_cover_is_found_piece_by_piece() -> None:
    def uncovered(*magnitudes: list[int]) -> list[int]:
        by_centre = {str(i): np.array(sizes, np.uint8) for i, sizes in enumerate(magnitudes)}
        return [int(piece) for piece in secure_aggregation.find_uncovered(by_centre, "0")]

    assert uncovered([10, 10, 10], [10, 4, 3], [10, 20, 10]) == [2]
    assert uncovered([3, 3, 0], [0, 3, 9], [3, 1, 0]) == [0]  # zeros cover nothing, and need no cover
    assert uncovered([3], [3]) == [0]


def test_one_tensor_that_a_single_centre_trains_is_enough_to_refuse(tmp_path: Path) -> None:
    wire = Wire(tmp_path, MODEL_SCOPE)
    updates = make_updates(3)
    tensor = LAYOUT.parameter_slots[3].span
    for centre in NAMES[1:]:
        updates[centre][tensor] = 0
    result = sum_updates(wire, mask_updates(wire, updates))
    assert result.survivors == sorted(NAMES[1:])
    assert "fewer than 2 other centres add in like measure to 'backbone'" in result.dropouts["north"].reason


def test_survivors_that_leave_a_centre_uncovered_are_not_unmasked(tmp_path: Path) -> None:
    """North, east and south cover each other until south drops out, after they have sent masked numbers."""
    wire = Wire(tmp_path, MODEL_SCOPE, {(MaskedInputRequest, "south")})
    updates = make_updates(4)
    for centre in ("west", "centre"):
        updates[centre][:] = 0
    expect_nothing_opened(wire, mask_updates(wire, updates))
    masked = {reply.centre for reply in wire.seen if isinstance(reply, MaskedInputReply)}
    assert masked == {"north", "east", "west", "centre"}


def test_policy_may_want_more_centres_to_cover_its_part(tmp_path: Path) -> None:
    updates = make_updates(5)
    updates["west"][:] = 0
    updates["centre"][:] = 0
    wire = Wire(tmp_path, MODEL_SCOPE)
    assert len(sum_updates(wire, mask_updates(wire, updates)).survivors) == 5
    wire = Wire(tmp_path, MODEL_SCOPE, policy=Policy(min_centres=4))
    with pytest.raises(NotEnoughCentres, match="fewer than 3 other centres"):
        sum_updates(wire, mask_updates(wire, updates, round_number=2))


def test_statistic_that_one_or_two_centres_have_is_not_opened(tmp_path: Path) -> None:
    """Under scope=all: a label column or a split that the others lack."""
    counts = make_counts(4)
    for centre in NAMES[1:]:
        counts[centre] = {f"{centre}/val/covid": np.array([4.0, 4.0, 0.0])}
    wire = Wire(tmp_path, ALL_SCOPE)
    result = sum_counts(wire, counts)
    assert result.survivors == sorted(NAMES[1:])
    assert "in like measure to 'all/train/covid'" in result.dropouts["north"].reason
    counts["east"] = make_counts(4)["east"]
    with pytest.raises(NotEnoughCentres):
        sum_counts(Wire(tmp_path / "two", ALL_SCOPE), counts)


def test_round_is_not_opened_again_with_another_request(tmp_path: Path) -> None:
    """Other weights between the same updates would give another equation for the same unknowns."""
    wire = Wire(tmp_path, MODEL_SCOPE)
    updates = make_updates(6)
    sum_updates(wire, mask_updates(wire, updates))
    sum_updates(wire, mask_updates(wire, updates))  # the same request: the same sum
    wire.seen.clear()
    replies = mask_updates(wire, updates, LABEL_WEIGHTS | {"north": 2.0, "east": 1.0, "south": 4.0})
    with pytest.raises(NotEnoughCentres, match="opened before with another request"):
        sum_updates(wire, replies)
    assert not any(isinstance(reply, UnmaskReply) for reply in wire.seen)


@pytest.mark.parametrize(
    ("totals", "reason"),
    [
        ({"covid": 15.0}, "does not name the tasks of the stage"),
        ({}, "does not name the tasks of the stage"),
        ({"covid": 15.0, "source": 5.0, "other": 1.0}, "does not name the tasks of the stage"),
        ({"covid": 0.5, "source": 5.0}, "of task 'covid' cannot be a sum with this centre's weight"),
        ({"covid": 15.0, "source": 0.0}, "of task 'source' cannot be a sum"),
        ({"covid": math.nan, "source": 5.0}, "of task 'covid' cannot be a sum"),
        ({"covid": math.inf, "source": 5.0}, "of task 'covid' cannot be a sum"),
        ({"covid": -15.0, "source": 5.0}, "of task 'covid' cannot be a sum"),
    ],
)
def test_total_that_is_no_sum_with_the_centres_own_weight_is_refused(
    totals: dict[str, float], reason: str
) -> None:
    request = TrainRequest("r", {}, "main", 1, zero_weights(), total_label_weight=totals)
    with pytest.raises(Refused, match=reason):
        secure_sum_checks.compute_shares_of_weight(TWO_TASKS, request, {"covid": 1.0, "source": 1.0})


# --- a search over what the coordinator can choose, without cryptography

SLOT_SIZE = 24
SLOTS = [("w", "backbone", True), ("mean", "backbone", False), ("a", "covid", True), ("b", "source", True)]
TINY = Layout(
    [
        TensorSlot(
            name, (SLOT_SIZE,), i * SLOT_SIZE, (i + 1) * SLOT_SIZE, group, is_parameter, not is_parameter
        )
        for i, (name, group, is_parameter) in enumerate(SLOTS)
    ]
)
THREE = NAMES[:3]
factor = st.sampled_from([0.0, 1e-12, 1e-6, 1e-3, 0.02, 1.0, 50.0])
label_weight = st.sampled_from([0.0, 1e-3, 1.0, 2.0, 40.0, 1000.0])
total_factor = st.sampled_from([0.0, 0.3, 1.0, 1.0, 1.0, 100.0, 1e6, 1e12])


class Request(NamedTuple):
    """What a dishonest coordinator asks for, and what it knows to be at the centres."""

    loss_weights: list[float]
    total_factors: list[float]  # of the true total of each task
    label_weights: list[list[float]]  # of each centre and task, as aggregation.tau and weight_by make them
    # By how much each tensor moves at each centre: stage.freeze, learning rates, steps, batch sizes, labels.
    moves: list[list[float]]
    clip_value: float
    quantization_bits: int


requests = st.builds(
    Request,
    st.lists(factor, min_size=2, max_size=2),
    st.lists(total_factor, min_size=2, max_size=2),
    st.lists(st.lists(label_weight, min_size=2, max_size=2), min_size=3, max_size=3),
    st.lists(st.lists(factor, min_size=4, max_size=4), min_size=3, max_size=3),
    st.sampled_from([1e-6, 1e-2, 4.0, 1e3, 1e6]),
    st.sampled_from([8, 16, 26, 32]),
)


def sum_up(request: Request, seed: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """The centres' updates [P], and the sum in steps [P] as the coordinator would read it. Raises Refused."""
    secagg = SecureAggregationConfig(
        clip_value=request.clip_value, quantization_bits=request.quantization_bits
    )
    config = replace(TWO_TASKS, privacy=replace(TWO_TASKS.privacy, secagg=secagg))
    for task, loss_weight in zip(("covid", "source"), request.loss_weights, strict=True):
        config = with_loss_weight(config, task, loss_weight)
    true_totals = np.sum(request.label_weights, axis=0)
    totals = dict(zip(("covid", "source"), true_totals * request.total_factors, strict=True))
    train = TrainRequest("r", {}, "main", 1, zero_weights(), total_label_weight=totals)
    updates, held = {}, {}
    total = np.zeros(TINY.size)
    for i, centre in enumerate(THREE):
        moves = np.repeat(request.moves[i], SLOT_SIZE)
        updates[centre] = np.random.default_rng([seed, i]).normal(0, 1e-2, TINY.size) * moves
        own_weights = dict(zip(("covid", "source"), request.label_weights[i], strict=True))
        shares = secure_sum_checks.compute_shares_of_weight(config, train, own_weights)
        weights = dict.fromkeys(TINY.group_slices(), 0.0) | weights_by_group(shares, config.tasks)
        delta = updates[centre].astype(np.float32)
        values, sums = secure_aggregation.quantize_weighted_update(delta, weights, TINY, secagg)
        pieces = secure_aggregation.measure_update(values, sums, TINY)
        held[centre] = HeldShares(b"", b"", pieces.magnitudes)
        total[TINY.parameter_mask()] += values
        total[~TINY.parameter_mask()] += np.rint(sums["buffers"] * 2**24)
    for centre in THREE:
        secure_sum_checks.require_own_cover(held, centre, pieces.names, 3)
    secure_sum_checks.require_cover_of_all(held, THREE)
    return updates, total


@settings(deadline=None, max_examples=1500, derandomize=True)
@given(requests, st.integers(0, 99))
def test_no_choice_of_a_request_shows_one_centres_update(request: Request, seed: int) -> None:
    """No multiple of a centre's update is within a thousandth of a tensor of the sum."""
    try:
        updates, total = sum_up(request, seed)
    except Refused:
        return
    for slot in TINY.floats:
        tensor_sum = total[slot.span]
        for update in updates.values():
            own = update[slot.span]
            if not tensor_sum.any() or not own.any():
                continue
            rest = tensor_sum - own * (tensor_sum @ own) / (own @ own)
            assert np.linalg.norm(rest) > 1e-3 * np.linalg.norm(tensor_sum)


def test_search_also_opens_sums(tmp_path: Path) -> None:
    """An honest request is among those searched, and is not refused."""
    honest = Request([1.0, 1.0], [1.0, 1.0], [[2.0, 1.0]] * 3, [[1.0] * 4] * 3, 4.0, 26)
    updates, total = sum_up(honest, 1)
    step = 2 * 4.0 / 2**26
    mean = np.mean(list(updates.values()), axis=0)
    np.testing.assert_allclose(total[:SLOT_SIZE] * step, mean[:SLOT_SIZE], atol=3 * step)
