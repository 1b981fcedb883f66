"""Error feedback: rounding loses nothing over rounds, and a repeated round sends the same bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from client.federation.error_feedback import ROUNDS_KEPT, delete_residuals, encode_with_feedback
from common.config.schema import BackboneConfig, Compression, Task
from common.modeling.model import make_model
from common.modeling.parameters import Weights, build_layout
from common.protocol.message_packing import pack_message, unpack_message
from common.protocol.messages import TrainReply, TrainRequest
from common.protocol.update_codec import Arrays, decode_update

LAYOUT = build_layout(make_model(BackboneConfig(), {"covid": Task()}, 1))
NO_WEIGHTS = Weights(np.empty(0, np.float32), np.empty(0, np.int64))


def encode(
    folder: Path, round_number: int, delta: np.ndarray, codec: Compression, stage: str = "main"
) -> Arrays:
    request = TrainRequest("run", {}, stage, round_number, NO_WEIGHTS)
    return encode_with_feedback(folder, request, delta, LAYOUT, codec)


def random_deltas(count: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [1e-3 * rng.standard_normal(LAYOUT.size, dtype=np.float32) for _ in range(count)]


@pytest.mark.parametrize(("codec", "bound"), [("fp16", 2e-4), ("int8", 4e-3), ("int4", 6e-2)])
def test_only_the_last_rounding_is_lost_over_rounds(tmp_path: Path, codec: Compression, bound: float) -> None:
    """The bound is on the relative L2 error of the sum of eight rounds, which is larger without feedback."""
    deltas = random_deltas(8)
    with_feedback = np.zeros(LAYOUT.size, np.float32)
    without_feedback = np.zeros(LAYOUT.size, np.float32)
    for number, delta in enumerate(deltas, 1):
        with_feedback += decode_update(encode(tmp_path, number, delta, codec), LAYOUT, codec)
        alone = encode(tmp_path / str(number), number, delta, codec)
        without_feedback += decode_update(alone, LAYOUT, codec)
    expected = sum(deltas)
    error = np.linalg.norm(with_feedback - expected)
    assert error / np.linalg.norm(expected) < bound
    assert error < 0.6 * np.linalg.norm(without_feedback - expected)


def test_repeated_round_sends_the_same_bits_and_old_residuals_are_deleted(tmp_path: Path) -> None:
    deltas = random_deltas(6)
    sent = [encode(tmp_path, number, delta, "int8") for number, delta in enumerate(deltas, 1)]
    for number in (5, 6):  # a run resumed at round 5
        repeated = encode(tmp_path, number, deltas[number - 1], "int8")
        assert all(np.array_equal(repeated[name], sent[number - 1][name]) for name in repeated)
    other_stage = encode(tmp_path, 6, deltas[5], "int8", stage="another")  # starts without a residual
    assert not np.array_equal(other_stage["codes"], sent[5]["codes"])
    assert len(list((tmp_path / "wire" / "run" / "main").iterdir())) == ROUNDS_KEPT
    delete_residuals(tmp_path, "run")
    assert not (tmp_path / "wire" / "run").exists()


def test_encoded_update_is_packed_and_unpacked_unchanged() -> None:
    arrays = {
        "codes": np.array([1, -2], np.int8),
        "scales": np.array([3], np.uint16),
        "rest": np.array([0.5], np.float32),
    }
    reply = TrainReply(
        centre="c",
        delta=np.empty(0, np.float32),
        int_buffers=np.empty(0, np.int64),
        scans=1,
        steps=1,
        losses={"covid": [1.0, 2.0]},
        seconds=0.1,
        encoded_delta=arrays,
    )
    received = unpack_message(*pack_message(reply))
    assert isinstance(received, TrainReply)
    assert received.encoded_delta.keys() == arrays.keys()
    for name, array in arrays.items():
        assert received.encoded_delta[name].dtype == array.dtype
        assert np.array_equal(received.encoded_delta[name], array)
