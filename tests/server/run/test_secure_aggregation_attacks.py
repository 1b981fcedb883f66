"""Secure sums are safe against a dishonest coordinator and against dishonest or faulty centres."""

from __future__ import annotations

import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from client.federation import secure_aggregation as centre_side
from client.site.policy import Policy
from common.config.parse import config_to_dict
from common.config.schema import SecureAggregationConfig
from common.privacy import secure_aggregation
from common.privacy.masked_layout import empty_sums
from common.protocol.messages import (
    MaskedInputReply,
    MaskedInputRequest,
    Request,
    ShareKeysReply,
    ShareKeysRequest,
    StatisticsReply,
    StatisticsRequest,
    UnmaskReply,
    UnmaskRequest,
)
from common.utils.errors import ConsiliumError, Refused
from server.run.run_state import RunPaused
from server.run.transport import ReceivedReply
from tests.secure_sums import Wire
from tests.server.run.five_centre_sums import (
    ALL_SCOPE,
    LAYOUT,
    MODEL_SCOPE,
    NAMES,
    add_counts,
    make_counts,
    make_updates,
    mask_updates,
    sum_counts,
    sum_updates,
)

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


def test_shares_can_be_read_by_their_receiver_only(tmp_path: Path) -> None:
    """The coordinator forwards ciphertext: what it has seen contains no share that is revealed later."""
    wire = Wire(tmp_path, ALL_SCOPE)
    sum_counts(wire, make_counts(3))
    shares: list[bytes] = []
    for reply in wire.seen:
        if isinstance(reply, ShareKeysReply):
            shares += [share.tobytes() for share in reply.shares.values()]
    assert len({share[:12] for share in shares}) == len(shares) == 20  # a pair has one key for both ways
    forwarded = b"".join(shares)
    for reply in wire.seen:
        if isinstance(reply, UnmaskReply):
            assert all(share.tobytes() not in forwarded for share in reply.shares.values())


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


def test_fewest_survivors_are_a_majority_and_at_least_three() -> None:
    """Two groups of a half each could reveal both secrets of a centre."""
    secagg = SecureAggregationConfig(threshold=0.5)
    half = replace(MODEL_SCOPE, privacy=replace(MODEL_SCOPE.privacy, secagg=secagg))
    needed = [secure_aggregation.compute_min_survivors(half, started) for started in (2, 3, 4, 5, 6, 10)]
    assert needed == [3, 3, 3, 3, 4, 6]
    default = [secure_aggregation.compute_min_survivors(MODEL_SCOPE, started) for started in (3, 5, 10)]
    assert default == [3, 4, 7]


# --- dishonest or faulty centres


def flip_bits(share: np.ndarray) -> np.ndarray:
    return share ^ np.uint8(1)


def cut_off(share: np.ndarray) -> np.ndarray:
    return share[:5]


class CorruptWire(Wire):
    """A federation in which north reveals a wrong share of west's secret."""

    corrupt: Callable[[np.ndarray], np.ndarray] = staticmethod(flip_bits)

    def send_and_receive(self, requests: Mapping[str, Request], timeout: float) -> Iterator[ReceivedReply]:
        for received in super().send_and_receive(requests, timeout):
            if isinstance(received.reply, UnmaskReply) and received.centre == "north":
                received.reply.shares["west"] = self.corrupt(received.reply.shares["west"])
            yield received


def test_corrupt_shares_are_detected(tmp_path: Path) -> None:
    with pytest.raises(RunPaused, match="the shares of west's secret do not fit together"):
        sum_counts(CorruptWire(tmp_path, ALL_SCOPE), make_counts(1))


def test_shares_of_another_length_are_left_out_and_the_others_open_the_sum(tmp_path: Path) -> None:
    wire = CorruptWire(tmp_path, ALL_SCOPE)
    wire.corrupt = cut_off
    counts = make_counts(1)
    result = sum_counts(wire, counts)
    assert result.survivors == sorted(NAMES)
    np.testing.assert_array_equal(result.sums["all/train/covid"], add_counts(counts, NAMES))


def test_numbers_that_cannot_be_summed_are_refused_before_anything_is_sent(tmp_path: Path) -> None:
    wire = Wire(tmp_path, MODEL_SCOPE)
    with pytest.raises(Refused, match="not finite"):
        mask_updates(wire, {"north": np.full(LAYOUT.size, np.nan, np.float32)})
    with pytest.raises(Refused, match="'covid' that is not part of this secure sum"):
        sum_counts(Wire(tmp_path, ALL_SCOPE), {"north": {"north/train/covid": np.zeros(7)}})
    with pytest.raises(ConsiliumError, match="cannot be answered in a secure sum"):
        empty_sums(StatisticsRequest("r", {}, "names", ""), ALL_SCOPE, LAYOUT)
