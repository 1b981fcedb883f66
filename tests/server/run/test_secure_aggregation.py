"""Secure sums between the centres' code and the coordinator's: exact, and safe against either side."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from client.federation import secure_aggregation as centre_side
from client.federation.parameter_cache import parameter_layout
from client.site.policy import Policy
from common.config.compose import compose_config
from common.config.parse import config_to_dict
from common.config.schema import Config
from common.modeling.parameters import EMPTY_PARAMS, Weights
from common.privacy import secure_aggregation
from common.privacy.masked_layout import empty_sums
from common.protocol.messages import (
    MaskedInputReply,
    MaskedInputRequest,
    Refusal,
    Request,
    ShareKeysReply,
    ShareKeysRequest,
    StatisticsReply,
    StatisticsRequest,
    TrainReply,
    TrainRequest,
    UnmaskReply,
    UnmaskRequest,
)
from common.utils.errors import ConsiliumError, RefusalCode, Refused
from server.run.run_state import RunPaused
from server.run.secure_aggregation import NotEnoughCentres, SecureSumResult, secure_sum
from server.run.transport import ReceivedReply
from tests.secure_sums import Wire, run_over

NAMES = ["north", "east", "south", "west", "centre"]


def make_config(*overrides: str) -> Config:
    config = compose_config(
        ["federation=folder", f"federation.centres=[{','.join(NAMES)}]", "privacy=secagg", *overrides]
    )
    tasks = dict(config.tasks)
    tasks["source"] = replace(tasks["source"], classes=NAMES)
    return replace(config, tasks=tasks)


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
            wire.folder / centre, wire.config, request, reply, own_weights
        )
    return replies


def sum_updates(wire: Wire, replies: Mapping[str, TrainReply]) -> SecureSumResult:
    empty = secure_aggregation.empty_update_sums(LAYOUT)
    return secure_sum(run_over(wire, LAYOUT), replies, NUM_PARAMETERS, empty)


def mean_update(result: SecureSumResult) -> np.ndarray:
    settings = secure_aggregation.require_secagg_config(MODEL_SCOPE)
    return secure_aggregation.dequantize_mean(result.values, result.sums, LAYOUT, settings)


# --- the sum is right


@settings(deadline=None, max_examples=6)
@given(st.lists(st.integers(0, 10**6), min_size=5, max_size=5))
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


# --- a dishonest coordinator


def test_centres_that_received_different_requests_do_not_add_up(tmp_path: Path) -> None:
    """A centre that was sent another model is left out; if it is made to take part, the sum is noise."""
    wire = Wire(tmp_path, MODEL_SCOPE)
    updates = make_updates(4)
    result = sum_updates(wire, mask_updates(wire, updates, deceived="south"))
    assert "south" not in result.survivors
    assert "means another sum" in result.dropouts["south"].reason
    for round_number, lie in ((2, "roster"), (3, "members")):
        replies = mask_updates(wire, updates, round_number=round_number)
        wire = LyingWire(wire.folder, MODEL_SCOPE, lie=lie)
        result = sum_updates(wire, replies)
        # Of numbers modulo 2^32; the updates themselves are a few thousand.
        assert np.abs(result.values).astype(np.float64).mean() > 2**28


@dataclass
class LyingWire(Wire):
    """A coordinator that sends east another public key of west, or says that west dropped out."""

    lie: str = ""

    def send_and_receive(self, requests: Mapping[str, Request], timeout: float) -> Iterator[ReceivedReply]:
        to_east = requests["east"]
        if self.lie == "roster" and isinstance(to_east, ShareKeysRequest):
            other_key = np.frombuffer(secure_aggregation.derive_public_key(bytes(31) + b"1"), np.uint8)
            keys_of_west = np.concatenate([other_key, to_east.roster["west"][32:]])
            to_east = replace(to_east, roster=to_east.roster | {"west": keys_of_west})
        elif self.lie == "members" and isinstance(to_east, MaskedInputRequest):
            shares = {centre: share for centre, share in to_east.shares.items() if centre != "west"}
            to_east = replace(to_east, shares=shares)
        yield from super().send_and_receive({**requests, "east": to_east}, timeout)


def test_coordinator_sees_uniform_noise(tmp_path: Path) -> None:
    """Each byte of a masked update is uniform (chi-square), and two maskings of one update are unrelated."""
    wire = Wire(tmp_path, MODEL_SCOPE)
    updates = dict.fromkeys(NAMES, np.full(LAYOUT.size, 1e-3, np.float32))
    masked: list[dict[str, MaskedInputReply]] = []
    for round_number in (1, 2):
        wire.seen.clear()
        replies = mask_updates(wire, updates, dict.fromkeys(NAMES, 1.0), round_number)
        for reply in replies.values():
            assert not reply.delta.size
            assert not reply.encoded_delta
        result = sum_updates(wire, replies)
        backbone_end = LAYOUT.group_slices()["backbone"][0].stop
        assert len(np.unique(result.values[: backbone_end // 2])) == 1  # the sum is as plain as the updates
        masked.append({reply.centre: reply for reply in wire.seen if isinstance(reply, MaskedInputReply)})
    first, second = masked
    for centre in NAMES:
        values = first[centre].values
        for byte in range(4):
            observed = np.bincount(values[byte::4], minlength=256)
            expected = len(values) / 4 / 256
            assert ((observed - expected) ** 2 / expected).sum() < 255 + 6 * np.sqrt(2 * 255)
        assert abs((values == second[centre].values).mean() - 1 / 256) < 1e-3
        assert not np.array_equal(first[centre].fixed_point_sums, second[centre].fixed_point_sums)
    of_north = first["north"].values.view("<u4")
    of_east = first["east"].values.view("<u4")
    assert abs(np.corrcoef(of_north, of_east)[0, 1]) < 0.02


def test_both_secrets_of_a_centre_are_never_revealed(tmp_path: Path) -> None:
    wire = Wire(tmp_path, ALL_SCOPE, {(MaskedInputRequest, "east")})
    sum_counts(wire, make_counts(2))
    expected_bytes = dict.fromkeys(NAMES, 16) | {"east": 32}
    for reply in wire.seen:
        if isinstance(reply, UnmaskReply):
            assert {centre: len(share) for centre, share in reply.shares.items()} == expected_bytes
    # A second request, with east among the survivors, would reveal its other secret.
    unmask = next(request for request in wire.asked if isinstance(request, UnmaskRequest))
    with pytest.raises(Refused, match="not part of the sum any more"):
        centre_side.handle_step(
            tmp_path / "north", ALL_SCOPE, "north", replace(unmask, survivors=NAMES), Policy()
        )
    assert not (tmp_path / "north" / "secagg" / "r" / "query").exists()


@dataclass
class Protocol:
    """The steps of a secure sum of counts, called one by one at the centres."""

    folder: Path
    sum_id: str
    roster: dict[str, np.ndarray]

    @classmethod
    def start(cls, folder: Path) -> Protocol:
        """Let all centres mask their counts and give their public keys."""
        query = StatisticsRequest("r", config_to_dict(ALL_SCOPE), "counts", "")
        roster = {}
        sum_id = ""
        for centre, counts in make_counts(1).items():
            reply = StatisticsReply(centre, counts)
            reply = centre_side.mask_statistics(folder / centre, ALL_SCOPE, query, reply)
            sum_id = reply.sum_id
            assert reply.public_keys is not None
            roster[centre] = reply.public_keys
        return cls(folder, sum_id, roster)

    def take_step(self, request: Any, policy: Policy | None = None, centre: str = "north") -> Any:
        return centre_side.handle_step(self.folder / centre, ALL_SCOPE, centre, request, policy or Policy())


def test_wrong_rosters_and_repeated_key_exchange_are_refused(tmp_path: Path) -> None:
    protocol = Protocol.start(tmp_path)
    take_step = protocol.take_step
    roster = protocol.roster
    share = ShareKeysRequest("r", {}, protocol.sum_id, roster)
    with pytest.raises(Refused, match="needs 9 centres, and this one has 3"):
        take_step(replace(share, roster={c: roster[c] for c in NAMES[:3]}), Policy(min_centres=9))
    with pytest.raises(Refused, match="a secure sum needs"):
        take_step(replace(share, roster={c: roster[c] for c in NAMES[:2]}))
    with pytest.raises(Refused, match="other public keys for this centre"):
        take_step(replace(share, roster=roster | {"north": roster["east"]}))
    with pytest.raises(Refused, match="a name that is not a centre"):
        take_step(replace(share, roster=roster | {"stranger": roster["east"]}))
    with pytest.raises(Refused, match="the same key twice"):
        take_step(replace(share, roster=roster | {"west": roster["east"]}))
    take_step(share)
    with pytest.raises(Refused, match="has taken this step"):
        take_step(share)


def test_steps_out_of_turn_and_repeated_steps_are_refused(tmp_path: Path) -> None:
    protocol = Protocol.start(tmp_path)
    take_step = protocol.take_step
    sum_id = protocol.sum_id
    share = ShareKeysRequest("r", {}, sum_id, protocol.roster)
    encrypted = {centre: take_step(share, centre=centre).shares for centre in NAMES}
    incoming = {centre: encrypted[centre]["north"] for centre in NAMES if centre != "north"}
    with pytest.raises(Refused, match="was not made for this centre, or was changed"):
        take_step(MaskedInputRequest("r", {}, sum_id, incoming | {"east": encrypted["east"]["south"]}))
    with pytest.raises(Refused, match="a secure sum needs"):
        take_step(MaskedInputRequest("r", {}, sum_id, {c: incoming[c] for c in ("east", "south")}))
    with pytest.raises(Refused, match="not among the centres that masked"):
        take_step(UnmaskRequest("r", {}, sum_id, NAMES))
    take_step(MaskedInputRequest("r", {}, sum_id, incoming))
    with pytest.raises(Refused, match="has taken this step"):
        take_step(MaskedInputRequest("r", {}, sum_id, {c: incoming[c] for c in ("east", "south", "west")}))
    with pytest.raises(Refused, match="needs 4 centres"):
        take_step(UnmaskRequest("r", {}, sum_id, ["north", "east", "south"]))
    with pytest.raises(Refused, match="needs 5 centres"):
        take_step(UnmaskRequest("r", {}, sum_id, ["north", "east", "south", "west"]), Policy(min_centres=5))
    sum_dir = tmp_path / "north" / "secagg" / "r" / "query"
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in sum_dir.iterdir()}
    assert modes == {"numbers.npz": 0o600, "state.json": 0o600}
    assert stat.S_IMODE(sum_dir.stat().st_mode) == 0o700
    take_step(UnmaskRequest("r", {}, sum_id, NAMES))
    assert not sum_dir.exists()


# --- dishonest or faulty centres


def flip_bits(share: np.ndarray) -> np.ndarray:
    return share ^ np.uint8(1)


def cut_off(share: np.ndarray) -> np.ndarray:
    return share[:5]


@pytest.mark.parametrize("corrupt", [flip_bits, cut_off])
def test_corrupt_shares_are_detected(tmp_path: Path, corrupt: Callable[[np.ndarray], np.ndarray]) -> None:
    class CorruptWire(Wire):
        def send_and_receive(
            self, requests: Mapping[str, Request], timeout: float
        ) -> Iterator[ReceivedReply]:
            for received in super().send_and_receive(requests, timeout):
                if isinstance(received.reply, UnmaskReply) and received.centre == "north":
                    received.reply.shares["west"] = corrupt(received.reply.shares["west"])
                yield received

    with pytest.raises(RunPaused, match="the shares of west's secret do not fit together"):
        sum_counts(CorruptWire(tmp_path, ALL_SCOPE), make_counts(1))


def test_numbers_that_cannot_be_summed_are_refused_before_anything_is_sent(tmp_path: Path) -> None:
    wire = Wire(tmp_path, MODEL_SCOPE)
    with pytest.raises(Refused, match="not finite"):
        mask_updates(wire, {"north": np.full(LAYOUT.size, np.nan, np.float32)})
    with pytest.raises(Refused, match="'covid' that is not part of this secure sum"):
        sum_counts(Wire(tmp_path, ALL_SCOPE), {"north": {"north/train/covid": np.zeros(7)}})
    with pytest.raises(ConsiliumError, match="cannot be answered in a secure sum"):
        empty_sums(StatisticsRequest("r", {}, "names", ""), ALL_SCOPE, LAYOUT)


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


def test_shares_can_be_read_by_their_receiver_only(tmp_path: Path) -> None:
    """The coordinator forwards ciphertext: what it has seen contains no share that is revealed later."""
    wire = Wire(tmp_path, ALL_SCOPE)
    sum_counts(wire, make_counts(3))
    forwarded = b""
    for reply in wire.seen:
        if isinstance(reply, ShareKeysReply):
            forwarded += b"".join(share.tobytes() for share in reply.shares.values())
    for reply in wire.seen:
        if isinstance(reply, UnmaskReply):
            assert all(share.tobytes() not in forwarded for share in reply.shares.values())
