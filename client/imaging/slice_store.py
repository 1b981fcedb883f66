"""The centre's store of preprocessed slices: uint8 arrays on local disk, memory-mapped, each under a key made of what it was made from.

The key is a hash of the preprocessing settings, the scan's own window and the content of its files, so a changed setting or file is
computed anew and an unchanged one never is. A file is content-hashed only when its size or times have changed since the last look.
Entries appear whole or not at all (written beside, renamed); two writers of one key write the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from common.config.schema import PreprocessConfig

ALGORITHM_VERSION = 2  # raise it when readers, lungs, selection or resizing give other pixels: every stored slice is then computed anew
LUNG_FINDER_VERSION = 1  # the same for the lungs that a crop to the lungs, or a mask, is made from: slices of other crops are kept

PARTIAL_PREFIX = ".writing-"


class SliceStore:
    """Slices by key in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def _entry_path(self, key: str, suffix: str) -> Path:
        return self.folder / key[:2] / (key + suffix)

    def compute_key(
        self,
        path: Path,
        settings: PreprocessConfig,
        window: tuple[float, float] | None = None,
        series_uid: str | None = None,
        lung_source: str = "",
    ) -> str:
        """The key of a scan's slices. `lungs` says where the lungs of a crop to the lungs come from, if not from our finder by itself.

        Raises FileNotFoundError when the scan is not there.
        """
        return _build_key(self.hash_content(path), settings, window, series_uid, lung_source)

    def cached_key(
        self,
        path: Path,
        settings: PreprocessConfig,
        window: tuple[float, float] | None = None,
        series_uid: str | None = None,
        lung_source: str = "",
    ) -> str | None:
        """The key when the scan's files are as they were at the last look and its slices are in the store, whole; else None. Cheap."""
        try:
            key = _build_key(self.cached_hash(path), settings, window, series_uid, lung_source)
        except OSError:
            return None
        return key if self.get(key) is not None else None

    def compute_mask_key(self, slices_key: str, mask_source: str) -> str:
        """The key of a mask of the scan whose slices have `key`: what it was made from is its column's kind and its file's content."""
        return _hash_bytes(json.dumps(["mask", LUNG_FINDER_VERSION, slices_key, mask_source]).encode())

    def _hash_note_path(self, path: Path) -> Path:
        """Where the content's hash is noted for files of these names, sizes and times."""
        looks = [(name, os.stat(file)) for name, file in _list_scan_files(path)]
        quick = [str(path.resolve()), [(n, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for n, s in looks]]
        return self._entry_path(_hash_bytes(json.dumps(quick).encode()), ".content")

    def cached_hash(self, path: Path) -> str:
        """The content's hash where it is known without reading a byte. Raises OSError where it is not, or the files are not there."""
        return _read_hash_note(self._hash_note_path(path))

    def hash_content(self, path: Path) -> str:
        """A hash of the scan's files, names and bytes; the bytes are read only when a size or a time has changed."""
        note = self._hash_note_path(path)
        with contextlib.suppress(OSError):
            return _read_hash_note(note)
        files = [[name, _hash_file(file)] for name, file in _list_scan_files(path)]
        whole = _hash_bytes(json.dumps(files).encode())
        _write_atomic(note, whole.encode())
        return whole

    def get(self, key: str, verify: bool = True) -> NDArray[np.uint8] | None:
        """The slices `[S, H, W]` uint8, read-only and memory-mapped, or None when they are not there or damaged.

        `verify` also compares the pixels' checksum, which reads them.
        """
        try:
            facts = json.loads(self._entry_path(key, ".json").read_text())
            slices = np.load(self._entry_path(key, ".npy"), mmap_mode="r", allow_pickle=False)
            whole = slices.dtype == np.uint8 and list(slices.shape) == facts["shape"]
            return slices if whole and (not verify or zlib.crc32(slices.data) == facts["crc32"]) else None
        except (OSError, ValueError, KeyError, TypeError, EOFError):
            return None

    def put(self, key: str, slices: NDArray[np.uint8], metadata: dict[str, Any]) -> None:
        """Keep slices `[S, H, W]` under the key, with facts for a person (chosen indices, box, notes) in a JSON file beside them."""
        if slices.dtype != np.uint8 or slices.ndim != 3:
            raise ValueError(f"slices are {slices.dtype} {slices.shape}; the store keeps uint8 [S, H, W]")
        slices = np.ascontiguousarray(slices)
        with _open_atomic(self._entry_path(key, ".npy")) as file:
            np.save(file, slices, allow_pickle=False)
        _write_atomic(
            self._entry_path(key, ".json"),
            json.dumps({**metadata, "shape": slices.shape, "crc32": zlib.crc32(slices.data)}).encode(),
        )

    def read_metadata(self, key: str) -> dict[str, Any]:
        """What was kept beside the slices; empty when there is nothing."""
        try:
            return dict(json.loads(self._entry_path(key, ".json").read_text()))
        except (OSError, ValueError):
            return {}

    def remove_stale(self) -> None:
        """Remove what writers that were killed have left half written, once it is an hour old."""
        for left in self.folder.glob(f"*/{PARTIAL_PREFIX}*"):
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > 3600:
                    left.unlink()


# A key is made of the settings under the names that they had in 0.1.0, so that stores made then stay valid.
KEY_NAMES = {
    "full_lung_search": "exact",
    "num_slices": "slices",
    "num_views": "draws",
    "view": "draw",
    "image_size": "size",
}


def _build_key(
    content_hash: str,
    settings: PreprocessConfig,
    window: tuple[float, float] | None,
    series_uid: str | None,
    lung_source: str,
) -> str:
    wanted = {KEY_NAMES.get(name, name): value for name, value in asdict(settings).items()}
    del wanted["modality"], wanted["draws"]  # which scans are taken, and how often: not what is kept of one
    if not settings.view:
        del wanted["draw"]
    made_from = {
        "algorithm": ALGORITHM_VERSION,
        "settings": wanted,
        "window": window,
        "series": series_uid,
        "content": content_hash,
    }
    if settings.crop == "lungs":
        made_from |= {"lungs": lung_source, "finder": LUNG_FINDER_VERSION}
    return _hash_bytes(json.dumps(made_from, sort_keys=True).encode())


def _hash_bytes(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=20).hexdigest()


def _read_hash_note(note: Path) -> str:
    """A noted hash. Raises OSError where there is none, or a power cut left half of one."""
    noted = note.read_text(errors="replace")
    if len(noted) != 40 or not set(noted) <= set("0123456789abcdef"):
        raise FileNotFoundError(note)
    return noted


def _hash_file(file: str) -> str:
    with open(file, "rb", buffering=0) as opened:
        return xxhash.xxh3_128_hexdigest(opened.read())


def _list_scan_files(path: Path) -> list[tuple[str, str]]:
    """The scan's files with their names below it, hidden ones left out, in a fixed order."""
    if not path.is_dir():
        return [(path.name, str(path))]
    found = []
    for root, folders, names in os.walk(path):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        below = os.path.relpath(root, path)
        found += [
            (os.path.normpath(f"{below}/{n}"), f"{root}/{n}") for n in sorted(names) if not n.startswith(".")
        ]
    return found


@contextlib.contextmanager
def _open_atomic(target: Path) -> Iterator[Any]:
    """A file to write that becomes `target` in one step; a process killed on the way leaves no target. Nothing waits for the disk: what a
    power cut may spoil is seen by its checksum, and computed again."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=PARTIAL_PREFIX, dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _write_atomic(target: Path, data: bytes) -> None:
    with _open_atomic(target) as file:
        file.write(data)
