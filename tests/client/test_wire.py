"""Changes in the run's codec: what rounding takes is not lost, a round sent again is the same bits, and nothing stays behind."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from client.wire import KEPT, coded, forget
from common.codec import decode
from common.messages import Contribution, Train, pack, unpack
from common.model import make_model
from common.schema import Backbone, Codec, Task
from common.weights import Weights, layout_of

LAYOUT = layout_of(make_model(Backbone(), {"covid": Task()}, 1))
NOBODY = Weights(np.empty(0, np.float32), np.empty(0, np.int64))


def request(round: int, stage: str = "main") -> Train:
    return Train("run", {}, stage, round, NOBODY)


def deltas(count: int) -> list[np.ndarray]:
    draws = np.random.default_rng(0)
    return [1e-3 * draws.standard_normal(LAYOUT.size, dtype=np.float32) for _ in range(count)]


@pytest.mark.parametrize(("codec", "bound"), [("fp16", 2e-4), ("int8", 4e-3), ("int4", 6e-2)])
def test_over_rounds_nothing_is_lost_but_the_last_rounding(tmp_path: Path, codec: Codec, bound: float) -> None:
    """Relative L2 of the sum of eight rounds; without what was kept back it would be larger in every codec."""
    sent = deltas(8)
    arrived = sum(decode(coded(tmp_path, request(n), d, LAYOUT, codec), LAYOUT, codec) for n, d in enumerate(sent, 1))
    alone = sum(decode(coded(tmp_path / str(n), request(n), d, LAYOUT, codec), LAYOUT, codec) for n, d in enumerate(sent, 1))
    norm = np.linalg.norm(sum(sent))
    assert np.linalg.norm(arrived - sum(sent)) / norm < bound
    assert np.linalg.norm(arrived - sum(sent)) < 0.6 * np.linalg.norm(alone - sum(sent))


def test_a_round_sent_again_is_the_same_bits_and_little_is_kept(tmp_path: Path) -> None:
    first = [coded(tmp_path, request(n), d, LAYOUT, "int8") for n, d in enumerate(deltas(6), 1)]
    for n in (5, 6):  # a run resumed at round 5
        again = coded(tmp_path, request(n), deltas(6)[n - 1], LAYOUT, "int8")
        assert all(np.array_equal(again[key], first[n - 1][key]) for key in again)
    other = coded(tmp_path, request(6, "another"), deltas(6)[5], LAYOUT, "int8")  # a stage of its own begins with nothing kept back
    assert not np.array_equal(other["codes"], first[5]["codes"])
    assert len(list((tmp_path / "wire" / "run" / "main").iterdir())) == KEPT
    forget(tmp_path, "run")
    assert not (tmp_path / "wire" / "run").exists()


def test_a_coded_change_crosses_the_wall_whole() -> None:
    arrays = {"codes": np.array([1, -2], np.int8), "scales": np.array([3], np.uint16), "rest": np.array([0.5], np.float32)}
    sent = Contribution("c", np.empty(0, np.float32), np.empty(0, np.int64), 1, 1, {"covid": [1.0, 2.0]}, 0.1, arrays)
    came = unpack(*pack(sent))
    assert isinstance(came, Contribution)
    assert came.coded.keys() == arrays.keys()
    assert all(came.coded[key].dtype == a.dtype and np.array_equal(came.coded[key], a) for key, a in arrays.items())
