"""Changes in the run's codec: what rounding takes is not lost, a round sent again is the same bits, and nothing stays behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from client.federation.error_feedback import ROUNDS_KEPT, delete_residuals, encode_with_feedback
from common.config.schema import BackboneConfig, Compression, Task
from common.modeling.model import make_model
from common.modeling.parameters import Weights, build_layout
from common.protocol.messages import TrainReply, TrainRequest, pack_message, unpack_message
from common.protocol.update_codec import decode_update

LAYOUT = build_layout(make_model(BackboneConfig(), {"covid": Task()}, 1))
NOBODY = Weights(np.empty(0, np.float32), np.empty(0, np.int64))


def request(round: int, stage: str = "main") -> TrainRequest:
    return TrainRequest("run", {}, stage, round, NOBODY)


def deltas(count: int) -> list[np.ndarray]:
    draws = np.random.default_rng(0)
    return [1e-3 * draws.standard_normal(LAYOUT.size, dtype=np.float32) for _ in range(count)]


@pytest.mark.parametrize(("codec", "bound"), [("fp16", 2e-4), ("int8", 4e-3), ("int4", 6e-2)])
def test_over_rounds_nothing_is_lost_but_the_last_rounding(
    tmp_path: Path, codec: Compression, bound: float
) -> None:
    """Relative L2 of the sum of eight rounds; without what was kept back it would be larger in every codec."""
    sent = deltas(8)
    arrived = sum(
        decode_update(encode_with_feedback(tmp_path, request(n), d, LAYOUT, codec), LAYOUT, codec)
        for n, d in enumerate(sent, 1)
    )
    alone = sum(
        decode_update(encode_with_feedback(tmp_path / str(n), request(n), d, LAYOUT, codec), LAYOUT, codec)
        for n, d in enumerate(sent, 1)
    )
    norm = np.linalg.norm(sum(sent))
    assert np.linalg.norm(arrived - sum(sent)) / norm < bound
    assert np.linalg.norm(arrived - sum(sent)) < 0.6 * np.linalg.norm(alone - sum(sent))


def test_a_round_sent_again_is_the_same_bits_and_little_is_kept(tmp_path: Path) -> None:
    first = [
        encode_with_feedback(tmp_path, request(n), d, LAYOUT, "int8") for n, d in enumerate(deltas(6), 1)
    ]
    for n in (5, 6):  # a run resumed at round 5
        again = encode_with_feedback(tmp_path, request(n), deltas(6)[n - 1], LAYOUT, "int8")
        assert all(np.array_equal(again[key], first[n - 1][key]) for key in again)
    other = encode_with_feedback(
        tmp_path, request(6, "another"), deltas(6)[5], LAYOUT, "int8"
    )  # a stage of its own begins with nothing kept back
    assert not np.array_equal(other["codes"], first[5]["codes"])
    assert len(list((tmp_path / "wire" / "run" / "main").iterdir())) == ROUNDS_KEPT
    delete_residuals(tmp_path, "run")
    assert not (tmp_path / "wire" / "run").exists()


def test_a_coded_change_crosses_the_wall_whole() -> None:
    arrays = {
        "codes": np.array([1, -2], np.int8),
        "scales": np.array([3], np.uint16),
        "rest": np.array([0.5], np.float32),
    }
    sent = TrainReply(
        "c", np.empty(0, np.float32), np.empty(0, np.int64), 1, 1, {"covid": [1.0, 2.0]}, 0.1, arrays
    )
    came = unpack_message(*pack_message(sent))
    assert isinstance(came, TrainReply)
    assert came.encoded_delta.keys() == arrays.keys()
    assert all(
        came.encoded_delta[key].dtype == a.dtype and np.array_equal(came.encoded_delta[key], a)
        for key, a in arrays.items()
    )
