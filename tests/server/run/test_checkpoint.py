"""Checkpoints: what is saved comes back bit for bit, whatever happens in between."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
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


def state(round: int, stage: str = "main", best: int | None = None, size: int = 10) -> Checkpoint:
    weights: Arrays = {"floats": np.full(size, round, np.float32), "integers": np.array([round], np.int64)}
    facts: dict[str, Any] = {"random": np.random.default_rng(round).bit_generator.state}
    if best is not None:
        facts["best"] = {"stage": stage, "round": best, "value": 0.5}
    return Checkpoint(stage, round, weights, {"m": np.full(size, -round, np.float32)}, facts)


def rounds(run: Path, suffix: str = ".json") -> list[int]:
    return sorted(int(path.name[5:10]) for path in (run / "checkpoints").glob(f"main-?????{suffix}"))


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
def test_what_is_saved_is_loaded_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, kinds: dict[str, str], round: int, stage: str
) -> None:
    run = tmp_path_factory.mktemp("run")
    bits = np.random.default_rng(1)
    arrays = {
        name: bits.integers(0, 2, (3, 4, 8), np.uint8).astype(kind).swapaxes(0, 2)
        for name, kind in kinds.items()
    }  # not contiguous
    arrays["scalar"] = np.array(3.5, np.float32)
    path = write_checkpoint(run, Checkpoint(stage, round, arrays, dict(arrays), {"history": [1, None, "ü"]}))
    assert path == weights_path(run, stage, round)
    got = load_latest(run)
    assert got is not None
    assert (got.stage, got.round, got.metadata, got.recovery_note) == (
        stage,
        round,
        {"history": [1, None, "ü"]},
        "",
    )
    for loaded in (got.weights, got.optimiser_state, load_weights(path)):
        assert loaded.keys() == arrays.keys()
        for name, value in arrays.items():
            assert (loaded[name].dtype, loaded[name].shape) == (value.dtype, value.shape)
            np.testing.assert_array_equal(loaded[name], value)


def test_a_random_state_goes_on_where_it_was(tmp_path: Path) -> None:
    generator = np.random.default_rng(3)
    generator.normal(size=5)
    write_checkpoint(tmp_path, Checkpoint("main", 1, {}, {}, {"random": generator.bit_generator.state}))
    expected = generator.normal(size=5)
    loaded = load_latest(tmp_path)
    assert loaded is not None
    again = np.random.default_rng()
    again.bit_generator.state = loaded.metadata["random"]
    np.testing.assert_array_equal(again.normal(size=5), expected)


def test_a_run_without_checkpoints_has_none(tmp_path: Path) -> None:
    assert load_latest(tmp_path) is None
    assert load_latest(tmp_path / "nowhere") is None


def test_the_newest_two_are_kept_and_the_best_of_both(tmp_path: Path) -> None:
    for round, best in ((1, 1), (2, 2), (3, 2), (4, 2)):
        write_checkpoint(tmp_path, state(round, best=best))
    assert rounds(tmp_path) == rounds(tmp_path, ".safetensors") == [2, 3, 4]
    write_checkpoint(tmp_path, state(5, best=5))
    assert rounds(tmp_path) == [2, 4, 5]  # 4 still names 2
    write_checkpoint(tmp_path, state(6, best=5))
    assert (
        rounds(tmp_path)
        == rounds(tmp_path, ".safetensors")
        == rounds(tmp_path, ".optimiser.safetensors")
        == [5, 6]
    )
    np.testing.assert_array_equal(load_weights(weights_path(tmp_path, "main", 5))["floats"], np.full(10, 5))


def test_a_later_stage_is_newer_whatever_its_name(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, state(9, stage="pretraining"))
    write_checkpoint(tmp_path, state(1, stage="finetuning"))
    loaded = load_latest(tmp_path)
    assert loaded is not None
    assert (loaded.stage, loaded.round) == ("finetuning", 1)


@pytest.mark.parametrize("suffix", [".safetensors", ".optimiser.safetensors", ".json"])
@pytest.mark.parametrize("damage", ["cut", "flip", "gone"])
def test_a_damaged_newest_falls_back_with_a_note(tmp_path: Path, suffix: str, damage: str) -> None:
    write_checkpoint(tmp_path, state(1))
    write_checkpoint(tmp_path, state(2))
    victim = tmp_path / "checkpoints" / f"main-00002{suffix}"
    data = bytearray(victim.read_bytes())
    if damage == "gone":
        victim.unlink()
    elif damage == "cut":
        victim.write_bytes(data[: len(data) // 2])
    elif suffix != ".json":
        data[-1] ^= 1  # a bit of the last array
        victim.write_bytes(data)
    else:
        victim.write_bytes(b"[]")
    loaded = load_latest(tmp_path)
    assert loaded is not None
    assert loaded.round == 1
    assert loaded.recovery_note == (
        "" if suffix == ".json" else "checkpoint main-00002 is damaged; went on from main-00001"
    )
    write_checkpoint(tmp_path, state(2))  # done again
    assert load_latest(tmp_path).round == 2  # type: ignore[union-attr]


def test_history_grows_by_a_file_a_save_and_each_checkpoint_has_its_own_part(tmp_path: Path) -> None:
    def saved(round: int, history: list[Any]) -> None:
        write_checkpoint(tmp_path, replace(state(round), history=history))

    saved(1, ["a"])
    saved(2, ["a", {"ü": 1}])
    saved(2, ["a", {"ü": 1}])  # as at a stage's end
    before = (tmp_path / "checkpoints" / "history" / "000000.json").stat().st_mtime_ns
    saved(3, ["a", {"ü": 1}, 3])
    assert load_latest(tmp_path).history == ["a", {"ü": 1}, 3]  # type: ignore[union-attr]
    weights_path(tmp_path, "main", 3).unlink()
    assert load_latest(tmp_path).history == ["a", {"ü": 1}]  # type: ignore[union-attr]
    saved(3, ["a", {"ü": 1}, "again"])
    saved(4, ["a", {"ü": 1}, "again", 4])
    assert load_latest(tmp_path).history == ["a", {"ü": 1}, "again", 4]  # type: ignore[union-attr]
    assert (
        tmp_path / "checkpoints" / "history" / "000000.json"
    ).stat().st_mtime_ns == before  # not written again
    (tmp_path / "checkpoints" / "history" / "000003.json").write_text("{")
    found = load_latest(tmp_path)
    assert found is not None
    assert (found.round, "main-00004 is damaged" in found.recovery_note) == (3, True)


def test_none_intact_is_one_sentence_and_never_a_new_beginning(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, state(1))
    path.write_bytes(path.read_bytes()[:20])
    with pytest.raises(ConsiliumError, match=r"damaged: main-00001.*start a new run"):
        load_latest(tmp_path)
    with pytest.raises(ConsiliumError, match="no intact safetensors file"):
        load_weights(path)
    with pytest.raises(ConsiliumError, match="cannot be read: No such file"):
        load_weights(tmp_path / "absent.safetensors")


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").touch()
    with pytest.raises(ConsiliumError, match="cannot be written to"):
        write_checkpoint(tmp_path, state(1))


WRITER = """
import sys; from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_checkpoint import load_latest, save, state
run = Path(sys.argv[1])
begun = load_latest(run)
print(begun.round if begun else 0, flush=True)
for round in range(begun.round + 1 if begun else 1, 99_999):
    save(run, state(round, best=round - round % 4 or None, size=200_000))
    save(run, state(round, best=round - round % 4 or None, size=200_000))  # again, as at a stage's end: must not lose it meanwhile
"""


def test_a_kill_at_any_moment_leaves_a_loadable_state(tmp_path: Path) -> None:
    moments = random.Random(5)
    last = 0
    for _ in range(6):
        writer = subprocess.Popen(
            [sys.executable, "-c", WRITER, tmp_path, str(Path(__file__).parent)],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert writer.stdout is not None
        assert int(writer.stdout.readline()) == last  # it goes on from what the killed one left
        time.sleep(moments.uniform(0.02, 0.25))
        writer.send_signal(signal.SIGKILL)
        writer.communicate()
        loaded = load_latest(tmp_path)
        if loaded is None:  # killed before its first was complete
            assert last == 0
            continue
        assert loaded.recovery_note == ""
        assert loaded.round >= last
        last = loaded.round
        np.testing.assert_array_equal(loaded.weights["floats"], np.full(200_000, last, np.float32))
        np.testing.assert_array_equal(loaded.optimiser_state["m"], np.full(200_000, -last, np.float32))
        best = loaded.metadata.get("best")
        if best:  # is there, and intact
            load_weights(weights_path(tmp_path, best["stage"], best["round"]))
            assert (
                json.loads(weights_path(tmp_path, "main", best["round"]).with_suffix(".json").read_text())[
                    "round"
                ]
                == best["round"]
            )
    assert last > 0
    write_checkpoint(tmp_path, state(last + 1))
    assert not list((tmp_path / "checkpoints").glob("*.part"))
