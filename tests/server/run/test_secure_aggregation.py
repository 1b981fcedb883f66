"""Secure sums between real centres' code and the coordinator's: exact, whoever drops out and when; and what neither side may do."""

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
from common.config.compose import compose_config, config_to_dict
from common.config.schema import Config
from common.modeling.parameters import EMPTY_PARAMS, Weights
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
    TrainReply,
    TrainRequest,
    UnmaskReply,
    UnmaskRequest,
)
from common.utils.errors import ConsiliumError, Refused
from server.run.run_state import RunPaused
from server.run.secure_aggregation import NotEnoughCentres, SecureSumResult, secure_sum
from server.run.transport import ReceivedReply
from tests.secure_sums import Wire, run_over

NAMES = ["north", "east", "south", "west", "centre"]


def config_of(*overrides: str) -> Config:
    config = compose_config(
        ["federation=folder", f"federation.centres=[{','.join(NAMES)}]", "privacy=secagg", *overrides]
    )
    tasks = {n: replace(t, classes=NAMES) if n == "source" else t for n, t in config.tasks.items()}
    return replace(config, tasks=tasks)


MODEL = config_of()
ALL = config_of("privacy.secagg.scope=all", "evaluation.reduction=pooled")
LAYOUT = parameter_layout(MODEL)
SIZE = sum(e.stop - e.start for e in LAYOUT.floats if e.is_parameter)


def counts_of(
    wire: Wire, sums: Mapping[str, Mapping[str, np.ndarray]], name: str = "counts"
) -> SecureSumResult:
    query = StatisticsRequest("r", config_to_dict(wire.config), name, "")
    said = {
        c: centre_side.mask_statistics(wire.folder / c, wire.config, query, StatisticsReply(c, dict(of)))
        for c, of in sums.items()
    }
    assert not any(of.sums for of in said.values())
    return secure_sum(run_over(wire, LAYOUT), said, 0, empty_sums(query, wire.config, LAYOUT))


def cells(n: int) -> dict[str, dict[str, np.ndarray]]:
    return {c: {f"{c}/train/covid": np.array([n + i, 10.0 * i, 3])} for i, c in enumerate(NAMES)}


def added(sums: Mapping[str, Mapping[str, np.ndarray]], survivors: list[str]) -> np.ndarray:
    return np.sum([next(iter(sums[c].values())) for c in survivors], axis=0)


def changes(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {c: rng.normal(0, 1e-2, LAYOUT.size).astype(np.float32) for c in NAMES}


def model_of(
    wire: Wire, deltas: Mapping[str, np.ndarray], masses: Mapping[str, float], round: int = 1, told: str = ""
) -> dict[str, TrainReply]:
    """What the centres say to Train; `told`: this one is sent another model than the others."""
    said = {}
    for c, delta in deltas.items():
        weights = Weights(
            np.full(LAYOUT.size, float(c == told), np.float32), np.zeros(LAYOUT.int_buffer_size, np.int64)
        )
        request = TrainRequest(
            "r",
            config_to_dict(wire.config),
            "main",
            round,
            weights,
            total_label_weight={"covid": sum(masses.values())},
        )
        one = TrainReply(c, delta, weights.int_buffers, 5, 2, {}, 0.1)
        said[c] = centre_side.mask_update(
            wire.folder / c, wire.config, request, one, {"covid": masses[c], "source": 1.0}
        )
    return said


MASSES = dict(zip(NAMES, [1.0, 2.0, 3.0, 4.0, 5.0], strict=True))


@settings(deadline=None, max_examples=6)
@given(st.lists(st.integers(0, 10**6), min_size=5, max_size=5))
def test_a_secure_sum_of_counts_is_the_sum(
    tmp_path_factory: pytest.TempPathFactory, given_: list[int]
) -> None:
    sums = {
        c: {f"{c}/val/covid": np.array([n, n % 7, 1.0]), f"{c}/train/covid": np.array([1.0, 2, n])}
        for c, n in zip(NAMES, given_, strict=True)
    }
    found = counts_of(Wire(tmp_path_factory.mktemp("sum"), ALL), sums)
    np.testing.assert_array_equal(
        found.sums["all/val/covid"], np.sum([of[f"{c}/val/covid"] for c, of in sums.items()], axis=0)
    )
    np.testing.assert_array_equal(
        found.sums["all/train/covid"], np.sum([of[f"{c}/train/covid"] for c, of in sums.items()], axis=0)
    )
    assert not found.sums["all/test/covid"].any()
    assert found.survivors == sorted(NAMES)


def test_the_mean_change_is_the_weighted_mean_within_the_bound(tmp_path: Path) -> None:
    wire, deltas = Wire(tmp_path, MODEL), changes(1)
    found = secure_sum(
        run_over(wire, LAYOUT),
        model_of(wire, deltas, MASSES),
        SIZE,
        secure_aggregation.empty_update_sums(LAYOUT),
    )
    grid = secure_aggregation.require_secagg_config(MODEL)
    mean = secure_aggregation.dequantize_mean(found.values, found.sums, LAYOUT, grid)
    expected = sum(MASSES[c] / 15 * deltas[c].astype(np.float64) for c in NAMES)
    moved = np.concatenate(
        [np.arange(e.start, e.stop) for e in LAYOUT.floats if e.group in ("backbone", "covid")]
    )
    assert np.abs(mean - expected)[moved].max() <= 5 * grid.clip_value / 2**grid.quantization_bits + 1e-8
    assert found.sums["clipped"] == 0


@pytest.mark.parametrize("step", [ShareKeysRequest, MaskedInputRequest, UnmaskRequest])
def test_one_of_five_may_drop_out_at_each_step(tmp_path: Path, step: type) -> None:
    wire, sums = Wire(tmp_path, ALL, {(step, "east")}), cells(7)
    found = counts_of(wire, sums)
    stayed = [
        c for c in NAMES if c != "east" or step is UnmaskRequest
    ]  # who has sent its masked numbers is in the sum, heard of again or not
    assert found.survivors == sorted(stayed)
    np.testing.assert_array_equal(found.sums["all/train/covid"], added(sums, stayed))
    assert found.dropouts == ({} if step is UnmaskRequest else {"east": "no reply"})


@pytest.mark.parametrize("step", [ShareKeysRequest, MaskedInputRequest])
def test_a_drop_out_leaves_a_model_of_the_others(tmp_path: Path, step: type) -> None:
    wire, deltas = Wire(tmp_path, MODEL, {(step, "west")}), changes(2)
    found = secure_sum(
        run_over(wire, LAYOUT),
        model_of(wire, deltas, MASSES),
        SIZE,
        secure_aggregation.empty_update_sums(LAYOUT),
    )
    mean = secure_aggregation.dequantize_mean(
        found.values, found.sums, LAYOUT, secure_aggregation.require_secagg_config(MODEL)
    )
    where = LAYOUT.group_slices()["backbone"][0]
    np.testing.assert_allclose(
        mean[where], sum(MASSES[c] / 11 * deltas[c][where] for c in NAMES if c != "west"), atol=1e-6
    )


@pytest.mark.parametrize("step", [ShareKeysRequest, MaskedInputRequest, UnmaskRequest])
def test_below_the_threshold_nothing_is_opened_and_the_sum_can_be_begun_again(
    tmp_path: Path, step: type
) -> None:
    wire, sums = Wire(tmp_path, ALL, {(step, "east"), (step, "west")}), cells(1)
    with pytest.raises(
        NotEnoughCentres, match=r"3 centres stayed in a secure sum that needs 4 \(east, west: no reply\)"
    ):
        counts_of(wire, sums)
    if step is not UnmaskRequest:
        assert not any(isinstance(reply, UnmaskReply) for reply in wire.seen)
    wire.lost.clear()
    np.testing.assert_array_equal(counts_of(wire, sums).sums["all/train/covid"], added(sums, NAMES))


def test_repeated_with_others_its_difference_would_show_one_centre_and_is_refused(tmp_path: Path) -> None:
    wire, sums = Wire(tmp_path, ALL), cells(1)
    counts_of(wire, sums)
    counts_of(wire, sums)  # the same centres: nothing new is told
    wire.lost.add((MaskedInputRequest, "east"))
    with pytest.raises(
        NotEnoughCentres,
        match=r"it was in this sum before, with centre, east, north, south, west: .* same centres only",
    ):
        counts_of(wire, sums)
    deltas = changes(3)
    secure_sum(
        run_over(Wire(tmp_path, MODEL), LAYOUT),
        model_of(wire, deltas, MASSES),
        SIZE,
        secure_aggregation.empty_update_sums(LAYOUT),
    )
    again = model_of(
        wire, {c: 2 * d for c, d in deltas.items()}, MASSES | {"north": 9.0}
    )  # a round told otherwise is the same round
    with pytest.raises(NotEnoughCentres, match="same centres only"):
        secure_sum(
            run_over(replace(wire, config=MODEL), LAYOUT),
            again,
            SIZE,
            secure_aggregation.empty_update_sums(LAYOUT),
        )


def test_centres_that_were_told_different_things_do_not_add_up(tmp_path: Path) -> None:
    """A server that sends one centre another model: it is out of the sum; made to take part, the sum is noise."""
    wire, deltas = Wire(tmp_path, MODEL), changes(4)
    said = model_of(wire, deltas, MASSES, told="south")
    found = secure_sum(run_over(wire, LAYOUT), said, SIZE, secure_aggregation.empty_update_sums(LAYOUT))
    assert "south" not in found.survivors
    assert "means another sum" in found.dropouts["south"]
    for lie in ("roster", "members"):
        said, wire = (
            model_of(wire, deltas, MASSES, round=2 if lie == "roster" else 3),
            Lying(wire.folder, MODEL, lie=lie),
        )
        found = secure_sum(run_over(wire, LAYOUT), said, SIZE, secure_aggregation.empty_update_sums(LAYOUT))
        assert (
            np.abs(found.values).astype(np.float64).mean() > 2**28
        )  # of numbers modulo 2^32; the changes themselves are a few thousand


@dataclass
class Lying(Wire):
    """A server that tells `east` of another key of `west`, or that `west` dropped out."""

    lie: str = ""

    def send_and_receive(self, requests: Mapping[str, Request], timeout: float) -> Iterator[ReceivedReply]:
        east = requests["east"]
        if self.lie == "roster" and isinstance(east, ShareKeysRequest):
            other = np.frombuffer(secure_aggregation.derive_public_key(bytes(31) + b"1"), np.uint8)
            east = replace(
                east, roster=east.roster | {"west": np.concatenate([other, east.roster["west"][32:]])}
            )
        elif self.lie == "members" and isinstance(east, MaskedInputRequest):
            east = replace(east, shares={c: s for c, s in east.shares.items() if c != "west"})
        yield from super().send_and_receive({**requests, "east": east}, timeout)


def test_what_the_coordinator_sees_is_noise(tmp_path: Path) -> None:
    """Each byte of what one centre sends is uniform (chi-square), and twice the same change has nothing in common."""
    wire, deltas = Wire(tmp_path, MODEL), dict.fromkeys(NAMES, np.full(LAYOUT.size, 1e-3, np.float32))
    seen = []
    for round in (1, 2):
        wire.seen.clear()
        said = model_of(wire, deltas, dict.fromkeys(NAMES, 1.0), round)
        assert all(not of.delta.size and not of.encoded_delta for of in said.values())
        found = secure_sum(run_over(wire, LAYOUT), said, SIZE, secure_aggregation.empty_update_sums(LAYOUT))
        assert (
            len(np.unique(found.values[: LAYOUT.group_slices()["backbone"][0].stop // 2])) == 1
        )  # the sum is as plain as the changes
        seen.append({of.centre: of for of in wire.seen if isinstance(of, MaskedInputReply)})
    for centre in NAMES:
        one, two = seen[0][centre].values, seen[1][centre].values
        for place in range(4):
            observed = np.bincount(one[place::4], minlength=256)
            expected = len(one) / 4 / 256
            assert ((observed - expected) ** 2 / expected).sum() < 255 + 6 * np.sqrt(2 * 255)
        assert abs((one == two).mean() - 1 / 256) < 1e-3
        assert not np.array_equal(seen[0][centre].fixed_point_sums, seen[1][centre].exact)
    assert (
        abs(np.corrcoef(seen[0]["north"].values.view("<u4"), seen[0]["east"].values.view("<u4"))[0, 1]) < 0.02
    )


def test_of_nobody_both_secrets_are_opened_and_each_step_is_taken_once(tmp_path: Path) -> None:
    wire = Wire(tmp_path, ALL, {(MaskedInputRequest, "east")})
    counts_of(wire, cells(2))
    opened = [reply for reply in wire.seen if isinstance(reply, UnmaskReply)]
    for reply in opened:
        assert {c: len(share) for c, share in reply.shares.items()} == {
            c: 32 if c == "east" else 16 for c in NAMES
        }
    unmask = next(request for request in wire.asked if isinstance(request, UnmaskRequest))
    with pytest.raises(
        Refused, match="no part in this sum any more"
    ):  # east now among the survivors: the other secret of it
        centre_side.handle_step(tmp_path / "north", ALL, "north", replace(unmask, survivors=NAMES), Policy())
    assert not (tmp_path / "north" / "secagg" / "r" / "query").exists()


def test_a_step_out_of_turn_or_a_second_time_is_refused(tmp_path: Path) -> None:
    query = StatisticsRequest("r", config_to_dict(ALL), "counts", "")
    said = {
        c: centre_side.mask_statistics(tmp_path / c, ALL, query, StatisticsReply(c, cells(1)[c]))
        for c in NAMES
    }
    roster = {c: of.public_keys for c, of in said.items() if of.public_keys is not None}
    name = said["north"].sum_id

    def step(request: Any, policy: Policy | None = None, centre: str = "north") -> Any:
        return centre_side.handle_step(tmp_path / centre, ALL, centre, request, policy or Policy())

    share = ShareKeysRequest("r", {}, name, roster)
    with pytest.raises(Refused, match="3 centres is not opened here: 9 are needed"):
        step(replace(share, roster={c: roster[c] for c in NAMES[:3]}), Policy(min_centres=9))
    with pytest.raises(Refused, match="is not opened here"):
        step(replace(share, roster={c: roster[c] for c in NAMES[:2]}))
    with pytest.raises(Refused, match="another key for it"):
        step(replace(share, roster=roster | {"north": roster["east"]}))
    with pytest.raises(Refused, match="a name that is no centre"):
        step(replace(share, roster=roster | {"stranger": roster["east"]}))
    with pytest.raises(Refused, match="one key twice"):
        step(replace(share, roster=roster | {"west": roster["east"]}))
    boxes = {c: step(share, centre=c).shares for c in NAMES}
    with pytest.raises(Refused, match="taken this step"):
        step(share)
    incoming = {c: boxes[c]["north"] for c in NAMES if c != "north"}
    with pytest.raises(Refused, match="was not made for it, or was changed"):
        step(MaskedInputRequest("r", {}, name, incoming | {"east": boxes["east"]["south"]}))
    with pytest.raises(Refused, match="is not opened here"):
        step(MaskedInputRequest("r", {}, name, {c: incoming[c] for c in ("east", "south")}))
    with pytest.raises(Refused, match="not of those who masked"):
        step(UnmaskRequest("r", {}, name, NAMES))
    step(MaskedInputRequest("r", {}, name, incoming))
    with pytest.raises(Refused, match="taken this step"):
        step(MaskedInputRequest("r", {}, name, {c: incoming[c] for c in ("east", "south", "west")}))
    with pytest.raises(Refused, match="not opened here: 4 are needed"):
        step(UnmaskRequest("r", {}, name, ["north", "east", "south"]))
    with pytest.raises(Refused, match="not opened here: 5 are needed"):
        step(UnmaskRequest("r", {}, name, ["north", "east", "south", "west"]), Policy(min_centres=5))
    kept = tmp_path / "north" / "secagg" / "r" / "query"
    assert {path.name: stat.S_IMODE(path.stat().st_mode) for path in kept.iterdir()} == {
        "numbers.npz": 0o600,
        "state.json": 0o600,
    }
    assert stat.S_IMODE(kept.stat().st_mode) == 0o700
    step(UnmaskRequest("r", {}, name, NAMES))
    assert not kept.exists()


def test_shares_that_do_not_fit_are_found_out(tmp_path: Path) -> None:
    class Bad(Wire):
        spoilt: Callable[[np.ndarray], np.ndarray]

        def send_and_receive(
            self, requests: Mapping[str, Request], timeout: float
        ) -> Iterator[ReceivedReply]:
            for received in super().send_and_receive(requests, timeout):
                if isinstance(received.reply, UnmaskReply) and received.centre == "north":
                    received.reply.shares["west"] = self.spoilt(received.reply.shares["west"])
                yield received

    for number, spoilt in enumerate((lambda share: share ^ np.uint8(1), lambda share: share[:5])):
        wire = Bad(tmp_path / str(number), ALL)
        wire.folder.mkdir()
        wire.spoilt = spoilt
        with pytest.raises(RunPaused, match="the shares of west's secret do not fit together"):
            counts_of(wire, cells(1))


def test_numbers_that_cannot_be_summed_are_refused_before_anything_is_sent(tmp_path: Path) -> None:
    wire = Wire(tmp_path, MODEL)
    with pytest.raises(Refused, match="not finite"):
        model_of(wire, {"north": np.full(LAYOUT.size, np.nan, np.float32)}, MASSES)
    with pytest.raises(Refused, match="'covid' that no other centre's would have"):
        counts_of(Wire(tmp_path, ALL), {"north": {"north/train/covid": np.zeros(7)}})
    with pytest.raises(ConsiliumError, match="cannot be answered in a secure sum"):
        empty_sums(StatisticsRequest("r", {}, "names", ""), ALL, LAYOUT)


def test_a_repeated_round_is_the_same_sum_with_new_keys(tmp_path: Path) -> None:
    weights = Weights(np.zeros(LAYOUT.size, np.float32), np.zeros(LAYOUT.int_buffer_size, np.int64))
    request = TrainRequest("r", config_to_dict(MODEL), "main", 1, weights, total_label_weight={"covid": 15.0})
    one = TrainReply(
        "north", changes(5)["north"], weights.int_buffers, 5, 2, {"covid": [1.5, 3]}, 0.1, epsilon=1.25
    )
    assert centre_side.cached_update(tmp_path, request) is None
    first = centre_side.mask_update(tmp_path, MODEL, request, one, MASSES | {"covid": 1.0})
    again = centre_side.cached_update(tmp_path, request)
    assert again is not None
    assert again.public_keys is not None
    assert not np.array_equal(again.public_keys, cast(Any, first.public_keys))
    assert replace(again, public_keys=None, delta=EMPTY_PARAMS, int_buffers=EMPTY_PARAMS) == replace(
        first, public_keys=None, delta=EMPTY_PARAMS, int_buffers=EMPTY_PARAMS
    )  # type: ignore[arg-type]
    assert centre_side.cached_update(tmp_path, replace(request, lr_scale=0.5)) is None
    centre_side.delete_train_sum(tmp_path, "r")
    assert centre_side.cached_update(tmp_path, request) is None


def test_shares_are_of_use_to_their_receiver_only(tmp_path: Path) -> None:
    """The coordinator passes shares on, but its whole view of them is ciphertext: no share it will be opened is part of it."""
    wire = Wire(tmp_path, ALL)
    counts_of(wire, cells(3))
    boxes = b"".join(
        box.tobytes()
        for reply in wire.seen
        if isinstance(reply, ShareKeysReply)
        for box in reply.shares.values()
    )
    for reply in wire.seen:
        if isinstance(reply, UnmaskReply):
            assert all(share.tobytes() not in boxes for share in reply.shares.values())
