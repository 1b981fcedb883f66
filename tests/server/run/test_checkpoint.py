"""Checkpoints: they come back bit for bit, whatever happens in between."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.utils.errors import ConsiliumError
from server.run.checkpoint import (
    Arrays,
    Checkpoint,
    load_latest,
    load_weights,
    weights_path,
    write_checkpoint,
)
from server.run.records import BestRound, RoundRecord, RunResult, StageRecord


def make_result(config: dict[str, Any] | None = None, stages: list[StageRecord] | None = None) -> RunResult:
    """A result whose free-form field, the configuration, and whose stages are given."""
    return RunResult("r", "recipe", "federated", 1, "2026-01-01", config or {}, stages=stages or [])


def make_checkpoint(
    round_number: int, stage: str = "main", best: int | None = None, size: int = 10
) -> Checkpoint:
    weights: Arrays = {
        "floats": np.full(size, round_number, np.float32),
        "integers": np.array([round_number], np.int64),
    }
    record = StageRecord(stage)
    if best is not None:
        record.best = BestRound(stage, best, 0.5)
    config = {"random": np.random.default_rng(round_number).bit_generator.state}
    return Checkpoint(
        stage,
        round_number,
        weights,
        make_result(config, [record]),
        {"m": np.full(size, -round_number, np.float32)},
    )


def list_rounds(run_dir: Path, suffix: str = ".json") -> list[int]:
    """The rounds of the stage "main" that have a file with this suffix."""
    return sorted(int(path.name[5:10]) for path in (run_dir / "checkpoints").glob(f"main-?????{suffix}"))


@settings(deadline=None)  # a disk's
@given(
    st.dictionaries(
        st.text(min_size=1, max_size=9),
        st.sampled_from(["float32", "float16", "int64", "uint8", "bool"]),
        max_size=4,
    ),
    st.integers(0, 99_999),
    st.text(min_size=1, max_size=9),
)
def test_checkpoint_is_loaded_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, kinds: dict[str, str], round_number: int, stage: str
) -> None:
    run_dir = tmp_path_factory.mktemp("run")
    random_bits = np.random.default_rng(1)
    arrays: Arrays = {"scalar": np.array(3.5, np.float32)}
    for name, kind in kinds.items():
        bits = random_bits.integers(0, 2, (3, 4, 8), np.uint8)
        arrays[name] = bits.astype(kind).swapaxes(0, 2)  # not contiguous
    result = make_result({"values": [1, None, "ü"]})
    path = write_checkpoint(run_dir, Checkpoint(stage, round_number, arrays, result, dict(arrays)))
    assert path == weights_path(run_dir, stage, round_number)
    loaded = load_latest(run_dir)
    assert loaded is not None
    assert (loaded.stage, loaded.round) == (stage, round_number)
    assert (loaded.result, loaded.recovery_note) == (result, "")
    for loaded_arrays in (loaded.weights, loaded.optimiser_state, load_weights(path)):
        assert loaded_arrays.keys() == arrays.keys()
        for name, array in arrays.items():
            assert (loaded_arrays[name].dtype, loaded_arrays[name].shape) == (array.dtype, array.shape)
            np.testing.assert_array_equal(loaded_arrays[name], array)


def test_random_state_is_restored(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    generator.normal(size=5)
    result = make_result({"random": generator.bit_generator.state})
    write_checkpoint(tmp_path, Checkpoint("main", 1, {}, result))
    expected = generator.normal(size=5)
    loaded = load_latest(tmp_path)
    assert loaded is not None
    restored = np.random.default_rng()
    restored.bit_generator.state = loaded.result.config["random"]
    np.testing.assert_array_equal(restored.normal(size=5), expected)


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert load_latest(tmp_path) is None
    assert load_latest(tmp_path / "nowhere") is None


def test_newest_two_and_their_best_rounds_are_kept(tmp_path: Path) -> None:
    for round_number, best in ((1, 1), (2, 2), (3, 2), (4, 2)):
        write_checkpoint(tmp_path, make_checkpoint(round_number, best=best))
    assert list_rounds(tmp_path) == list_rounds(tmp_path, ".safetensors") == [2, 3, 4]
    write_checkpoint(tmp_path, make_checkpoint(5, best=5))
    assert list_rounds(tmp_path) == [2, 4, 5]  # 4 still names 2
    write_checkpoint(tmp_path, make_checkpoint(6, best=5))
    for suffix in (".json", ".safetensors", ".optimiser.safetensors"):
        assert list_rounds(tmp_path, suffix) == [5, 6]
    np.testing.assert_array_equal(load_weights(weights_path(tmp_path, "main", 5))["floats"], np.full(10, 5))


def test_later_stage_is_newer_whatever_its_name(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, make_checkpoint(9, stage="pretraining"))
    write_checkpoint(tmp_path, make_checkpoint(1, stage="finetuning"))
    loaded = load_latest(tmp_path)
    assert loaded is not None
    assert (loaded.stage, loaded.round) == ("finetuning", 1)


@pytest.mark.parametrize("suffix", [".safetensors", ".optimiser.safetensors", ".json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_damaged_newest_checkpoint_is_skipped_with_a_note(tmp_path: Path, suffix: str, damage: str) -> None:
    write_checkpoint(tmp_path, make_checkpoint(1))
    write_checkpoint(tmp_path, make_checkpoint(2))
    damaged = tmp_path / "checkpoints" / f"main-00002{suffix}"
    content = bytearray(damaged.read_bytes())
    if damage == "gone":
        damaged.unlink()
    elif damage == "cut":
        damaged.write_bytes(content[: len(content) // 2])
    elif suffix != ".json":
        content[-1] ^= 1  # a bit of the last array
        damaged.write_bytes(content)
    else:
        damaged.write_bytes(b"[]")
    loaded = load_latest(tmp_path)
    assert loaded is not None
    assert loaded.round == 1
    note = "checkpoint main-00002 is damaged; resumed from main-00001"
    assert loaded.recovery_note == ("" if suffix == ".json" else note)
    write_checkpoint(tmp_path, make_checkpoint(2))  # the round is repeated
    assert load_latest(tmp_path).round == 2  # type: ignore[union-attr]


def test_history_grows_by_one_file_a_round_and_each_checkpoint_has_its_part(tmp_path: Path) -> None:
    def write(round_number: int, history: list[float]) -> None:
        """Write a checkpoint whose rounds are told apart by their seconds."""
        rounds = [RoundRecord(number, seconds) for number, seconds in enumerate(history)]
        result = make_result(stages=[StageRecord("main", rounds=rounds)])
        write_checkpoint(tmp_path, Checkpoint("main", round_number, {"w": np.ones(3)}, result))

    def load_history() -> list[float]:
        loaded = load_latest(tmp_path)
        assert loaded is not None
        return [record.seconds for record in loaded.result.stages[0].rounds]

    history_dir = tmp_path / "checkpoints" / "history"
    write(1, [0.5])
    write(2, [0.5, 1.5])
    write(2, [0.5, 1.5])  # as at a stage's end
    first_written = (history_dir / "000000.json").stat().st_mtime_ns
    write(3, [0.5, 1.5, 3.0])
    assert load_history() == [0.5, 1.5, 3.0]
    weights_path(tmp_path, "main", 3).unlink()
    assert load_history() == [0.5, 1.5]
    write(3, [0.5, 1.5, 3.5])
    write(4, [0.5, 1.5, 3.5, 4.0])
    assert load_history() == [0.5, 1.5, 3.5, 4.0]
    assert (history_dir / "000000.json").stat().st_mtime_ns == first_written  # not written again
    (history_dir / "000003.json").write_text("{")
    loaded = load_latest(tmp_path)
    assert loaded is not None
    assert loaded.round == 3
    assert "main-00004 is damaged" in loaded.recovery_note


def test_history_of_two_stages_is_given_back_to_each(tmp_path: Path) -> None:
    stages = [
        StageRecord("first", rounds=[RoundRecord(0), RoundRecord(1, 2.5)], finished=True),
        StageRecord("second", rounds=[RoundRecord(0, 7.0)]),
    ]
    write_checkpoint(tmp_path, Checkpoint("second", 0, {"w": np.ones(3)}, make_result(stages=stages)))
    loaded = load_latest(tmp_path)
    assert loaded is not None
    assert loaded.result.stages == stages


def test_run_without_an_intact_checkpoint_is_not_started_from_scratch(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, make_checkpoint(1))
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ConsiliumError, match=r"damaged: main-00001.*start a new run"):
        load_latest(tmp_path)
    with pytest.raises(ConsiliumError, match="are not an intact safetensors file"):
        load_weights(path)
    with pytest.raises(ConsiliumError, match="cannot be read: No such file"):
        load_weights(tmp_path / "absent.safetensors")


def test_unwritable_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    with pytest.raises(ConsiliumError, match="cannot be written to"):
        write_checkpoint(tmp_path, make_checkpoint(1))


WRITER = """
import sys; from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_checkpoint import load_latest, make_checkpoint, write_checkpoint
run_dir = Path(sys.argv[1])
latest = load_latest(run_dir)
last = latest.round if latest else 0
print(last, flush=True)
for number in range(last + 1, 99_999):
    best = number - number % 4 or None
    write_checkpoint(run_dir, make_checkpoint(number, best=best, size=200_000))
    # Again, as at a stage's end: it must not be lost meanwhile.
    write_checkpoint(run_dir, make_checkpoint(number, best=best, size=200_000))
"""


def write_until_killed(run_dir: Path, seconds: float) -> int:
    """Write checkpoints in another process, kill it, and return the round from which it continued."""
    command = [sys.executable, "-c", WRITER, str(run_dir), str(Path(__file__).parent)]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    continued_from = int(writer.stdout.readline())
    time.sleep(seconds)
    writer.send_signal(signal.SIGKILL)
    writer.communicate()
    return continued_from


def test_kill_at_any_moment_leaves_a_loadable_checkpoint(tmp_path: Path) -> None:
    moments = random.Random(5)
    last = 0
    for _ in range(6):
        assert write_until_killed(tmp_path, moments.uniform(0.02, 0.25)) == last
        loaded = load_latest(tmp_path)
        if loaded is None:  # killed before the first one was complete
            assert last == 0
            continue
        assert loaded.recovery_note == ""
        assert loaded.round >= last
        last = loaded.round
        np.testing.assert_array_equal(loaded.weights["floats"], np.full(200_000, last, np.float32))
        np.testing.assert_array_equal(loaded.optimiser_state["m"], np.full(200_000, -last, np.float32))
        best = loaded.result.stages[0].best
        if best:  # its files are there and intact
            load_weights(weights_path(tmp_path, best.stage, best.round))
            header = weights_path(tmp_path, "main", best.round).with_suffix(".json")
            assert json.loads(header.read_text())["round"] == best.round
    assert last > 0
    write_checkpoint(tmp_path, make_checkpoint(last + 1))
    assert not list((tmp_path / "checkpoints").glob("*.part"))
