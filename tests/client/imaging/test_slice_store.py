"""The slice store and preprocessing, with concurrent writers and killed processes."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from client.data.cohort import load_cohort
from client.imaging.failure_reasons import KILLED_REASON
from client.imaging.jobs import make_jobs
from client.imaging.preprocess import load_slices, preprocess_cohort
from client.imaging.slice_store import SliceStore
from client.imaging.worker_pool import run_in_pool
from client.phantom.federation import write_centre
from common.config.schema import PhantomConfig, PreprocessConfig
from common.utils.errors import ConsiliumError
from tests.client.killed_preprocess import kill_on_marked_scan

SMALL = PreprocessConfig(image_size=32)
REPO = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def centre(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_centre(
        tmp_path_factory.mktemp("phantom"), "west", PhantomConfig(scale=0.001, num_slices=10, image_size=64)
    )


@pytest.fixture
def cohort(centre: Path) -> pd.DataFrame:
    return load_cohort(centre, "west").head(4)


def read_write_times(store: SliceStore) -> dict[str, int]:
    """Return the time of writing of every stored array by file name."""
    return {f.name: f.stat().st_mtime_ns for f in store.folder.glob("*/*.npy")}


def start_python(code: str, *arguments: object) -> subprocess.Popen[bytes]:
    """Start a Python process that runs `code` in the repository."""
    return subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], cwd=REPO)


@settings(max_examples=25)
@given(slices=arrays(np.uint8, st.tuples(*[st.integers(1, 6)] * 3)))
def test_stored_slices_and_metadata_are_returned(
    tmp_path_factory: pytest.TempPathFactory, slices: np.ndarray
) -> None:
    store = SliceStore(tmp_path_factory.mktemp("store"))
    assert store.get("abcd") is None
    store.put("abcd", slices, {"notes": ["a sentence"]})
    stored = store.get("abcd")
    assert isinstance(stored, np.memmap)
    np.testing.assert_array_equal(stored, slices)
    assert store.read_metadata("abcd")["notes"] == ["a sentence"]


def test_arrays_other_than_uint8_stacks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"uint8 \[S, H, W\]"):
        SliceStore(tmp_path).put("abcd", np.zeros((2, 3, 3), np.float32), {})  # type: ignore[arg-type]


def test_damaged_entry_is_not_returned(tmp_path: Path) -> None:
    store, slices = SliceStore(tmp_path), np.arange(48, dtype=np.uint8).reshape(3, 4, 4)
    array, metadata = tmp_path / "ab" / "abcd.npy", tmp_path / "ab" / "abcd.json"
    for damage in (
        lambda: array.write_bytes(array.read_bytes()[:-5]),
        lambda: array.write_bytes(array.read_bytes()[:-1] + b"\xff"),
        lambda: array.write_bytes(b""),
        lambda: array.unlink(),
        lambda: metadata.unlink(),
        lambda: metadata.write_text("{"),
        lambda: metadata.write_text("[]"),
    ):
        store.put("abcd", slices, {})
        assert store.get("abcd") is not None
        damage()
        assert store.get("abcd") is None


def test_slices_are_recomputed_only_when_setting_or_file_changes(
    centre: Path, cohort: pd.DataFrame, tmp_path: Path
) -> None:
    store = SliceStore(tmp_path / "store")
    keys, skipped = preprocess_cohort(cohort, centre, SMALL, store, show_progress=False)
    assert not skipped
    assert len(set(keys)) == len(cohort)
    first = read_write_times(store)
    assert len(first) == len(cohort)
    assert all(s.shape == (8, 32, 32) for s in load_slices(store, keys))
    assert len(store.read_metadata(keys[0])["indices"]) == 8

    assert preprocess_cohort(cohort, centre, SMALL, store, show_progress=False)[0] == keys
    assert read_write_times(store) == first

    for changed in (
        PreprocessConfig(image_size=33),
        PreprocessConfig(image_size=32, selection="zquantile"),
        PreprocessConfig(image_size=32, window=(-900, 300)),
    ):
        assert not set(preprocess_cohort(cohort, centre, changed, store, show_progress=False)[0]) & set(keys)
    windowed_keys = preprocess_cohort(
        cohort.assign(window_low=-500.0, window_high=[200.0, np.nan, 200.0, 200.0]),
        centre,
        SMALL,
        store,
        show_progress=False,
    )[0]
    assert [a == b for a, b in zip(windowed_keys, keys, strict=True)] == [False, True, False, False]


def test_touched_but_equal_files_are_not_recomputed(
    centre: Path, cohort: pd.DataFrame, tmp_path: Path
) -> None:
    shutil.copytree(centre, tmp_path / "data")
    store = SliceStore(tmp_path / "store")
    keys, _ = preprocess_cohort(cohort, tmp_path / "data", SMALL, store, show_progress=False)
    before = read_write_times(store)
    files = sorted((tmp_path / "data" / cohort["path"][0]).iterdir())
    os.utime(files[0], ns=(1, 1))
    assert store.cached_key(tmp_path / "data" / cohort["path"][0], SMALL) is None  # it looks changed ...
    assert (
        preprocess_cohort(cohort, tmp_path / "data", SMALL, store, show_progress=False)[0] == keys
    )  # ... and is not
    assert read_write_times(store) == before

    data, stat = bytearray(files[0].read_bytes()), files[0].stat()
    data[-100] ^= 1  # one bit of one pixel, same size, and the time set back
    files[0].write_bytes(data)
    os.utime(files[0], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    new_keys, _ = preprocess_cohort(cohort, tmp_path / "data", SMALL, store, show_progress=False)
    assert new_keys[0] != keys[0]
    assert new_keys[1:] == keys[1:]


def test_damaged_entry_is_recomputed(centre: Path, cohort: pd.DataFrame, tmp_path: Path) -> None:
    store = SliceStore(tmp_path)
    keys, _ = preprocess_cohort(cohort, centre, SMALL, store, show_progress=False)
    expected = [np.array(s) for s in load_slices(store, keys)]
    array = next(tmp_path.glob(f"*/{keys[1]}.npy"))
    array.write_bytes(array.read_bytes()[:200])
    for note, partials in zip(
        sorted(tmp_path.glob("*/*.content")), (b"", b"\0" * 40, b"abc"), strict=False
    ):  # as a power cut leaves them
        note.write_bytes(partials)
    assert preprocess_cohort(cohort, centre, SMALL, store, show_progress=False)[0] == keys
    np.testing.assert_array_equal(load_slices(store, keys), expected)


def test_unreadable_scans_are_listed_and_log_holds_no_names(
    centre: Path, cohort: pd.DataFrame, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "Meier").mkdir()
    (tmp_path / "Meier" / "1.dcm").write_bytes(b"\0" * 128 + b"DICM" + b"nonsense")
    bad_cohort = cohort.head(3).copy()
    bad_cohort["path"] = [
        str(centre / bad_cohort["path"][0]),
        str(tmp_path / "Meier"),
        str(tmp_path / "gone"),
    ]
    with caplog.at_level(logging.INFO):
        keys, skipped = preprocess_cohort(
            bad_cohort, centre, SMALL, SliceStore(tmp_path / "store"), show_progress=False
        )
    assert [bool(k) for k in keys] == [True, False, False]
    assert [Path(s.path).name for s in skipped] == ["Meier", "gone"]
    assert "damaged" in skipped[0].reason
    assert skipped[1].reason == "it is not there"
    assert "2 of 3 scans" in caplog.text
    assert "Meier" not in caplog.text
    assert not any("Meier" in s.reason or os.sep in s.reason for s in skipped)


def test_several_processes_give_same_slices_as_one(
    centre: Path, cohort: pd.DataFrame, tmp_path: Path
) -> None:
    serial, parallel = SliceStore(tmp_path / "one"), SliceStore(tmp_path / "two")
    keys, _ = preprocess_cohort(cohort, centre, SMALL, serial, show_progress=False)
    assert preprocess_cohort(cohort, centre, SMALL, parallel, num_workers=2, show_progress=False) == (
        keys,
        [],
    )
    np.testing.assert_array_equal(load_slices(serial, keys), load_slices(parallel, keys))


def test_killed_worker_loses_only_its_own_scan(centre: Path, tmp_path: Path) -> None:
    cohort = load_cohort(centre, "west").head(6)
    cohort["series"] = [None, "deadly", None, None, None, None]
    jobs = make_jobs(cohort, centre, SMALL, SliceStore(tmp_path))
    outcome = dict(run_in_pool(jobs, range(len(jobs)), 2, kill_on_marked_scan))
    assert outcome[1] == ("", KILLED_REASON, [])
    assert all(key and not reason for row, (key, reason, _) in outcome.items() if row != 1)
    assert len(outcome) == 6


def test_writer_killed_during_write_leaves_no_entry(tmp_path: Path) -> None:
    code = """
import sys, numpy as np
from pathlib import Path
from client.imaging.slice_store import SliceStore
SliceStore(Path(sys.argv[1])).put("abcd", np.full((64, 1024, 1024), 7, np.uint8), {})
"""
    process = start_python(code, tmp_path)
    while process.poll() is None and not any(
        f.stat().st_size > 1 << 20 for f in tmp_path.glob("ab/.writing-*")
    ):
        time.sleep(0.001)
    process.kill()
    process.wait()
    partials = list(tmp_path.glob("ab/.writing-*"))
    assert partials, "the process ended before it could be killed"
    store = SliceStore(tmp_path)
    assert store.get("abcd") is None
    slices = np.full((2, 3, 3), 9, np.uint8)
    store.put("abcd", slices, {})
    np.testing.assert_array_equal(store.get("abcd"), slices)
    store.remove_stale()
    assert partials[0].exists()  # young: its writer might live
    os.utime(partials[0], (0, 0))
    store.remove_stale()
    assert not partials[0].exists()


def test_two_writers_and_reader_work_concurrently(tmp_path: Path) -> None:
    code = """
import sys, numpy as np
from pathlib import Path
from client.imaging.slice_store import SliceStore
for k in range(60):
    SliceStore(Path(sys.argv[1])).put(f"ab{k % 3}", np.full((4, 64, 64), k % 3, np.uint8), {})
"""
    processes = [start_python(code, tmp_path) for _ in range(2)]
    store, seen = SliceStore(tmp_path), 0
    while any(p.poll() is None for p in processes):
        for k in range(3):
            stored = store.get(f"ab{k}")
            if stored is not None:
                assert (stored == k).all()
                seen += 1
    assert [p.returncode for p in processes] == [0, 0]
    assert seen
    assert not list(tmp_path.glob("*/.writing-*"))


def test_two_processes_preprocess_same_cohort_concurrently(
    centre: Path, cohort: pd.DataFrame, tmp_path: Path
) -> None:
    code = """
import sys
from pathlib import Path
from client.data.cohort import load_cohort
from client.imaging.preprocess import preprocess_cohort
from client.imaging.slice_store import SliceStore
from common.config.schema import PreprocessConfig
base, store = Path(sys.argv[1]), SliceStore(Path(sys.argv[2]))
cohort = load_cohort(base, "west").head(4)
keys, skipped = preprocess_cohort(cohort, base, PreprocessConfig(image_size=32), store, show_progress=False)
assert all(keys) and not skipped
"""
    processes = [start_python(code, centre, tmp_path) for _ in range(2)]
    assert [p.wait(60) for p in processes] == [0, 0]
    store = SliceStore(tmp_path)
    keys = [store.cached_key(centre / p, SMALL) for p in cohort["path"]]
    assert all(keys)
    assert len(read_write_times(store)) == 4


def test_unwritable_store_is_named_as_reason(centre: Path, cohort: pd.DataFrame, tmp_path: Path) -> None:
    (tmp_path / "store").write_text("a file where the folder should be")
    keys, skipped = preprocess_cohort(
        cohort.head(1), centre, SMALL, SliceStore(tmp_path / "store"), show_progress=False
    )
    assert keys == [""]
    assert "the store cannot be used" in skipped[0].reason


def test_loading_removed_slices_is_refused(tmp_path: Path) -> None:
    SliceStore(tmp_path).put("abcd", np.zeros((1, 2, 2), np.uint8), {})
    with pytest.raises(ConsiliumError, match="1 of 2 preprocessed scans"):
        load_slices(SliceStore(tmp_path), ["abcd", "ef01"])
