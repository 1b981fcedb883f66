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

from common.schema import Preprocess

ALGORITHM = 2  # raise it when readers, lungs, selection or resizing give other pixels: every stored slice is then computed anew
FINDER = 1  # the same for the lungs that a crop to the lungs, or a mask, is made from: slices of other crops are kept

WRITING = ".writing-"


class Store:
    """Slices by key in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def _at(self, key: str, suffix: str) -> Path:
        return self.folder / key[:2] / (key + suffix)

    def key(
        self, path: Path, settings: Preprocess, window: tuple[float, float] | None = None, series: str | None = None, lungs: str = ""
    ) -> str:
        """The key of a scan's slices. `lungs` says where the lungs of a crop to the lungs come from, if not from our finder by itself.

        Raises FileNotFoundError when the scan is not there.
        """
        return _key(self.content(path), settings, window, series, lungs)

    def ready(
        self, path: Path, settings: Preprocess, window: tuple[float, float] | None = None, series: str | None = None, lungs: str = ""
    ) -> str | None:
        """The key when the scan's files are as they were at the last look and its slices are in the store, whole; else None. Cheap."""
        try:
            key = _key(self.noted(path), settings, window, series, lungs)
        except OSError:
            return None
        return key if self.get(key) is not None else None

    def mask_key(self, key: str, made_from: str) -> str:
        """The key of a mask of the scan whose slices have `key`: what it was made from is its column's kind and its file's content."""
        return _hash(json.dumps(["mask", FINDER, key, made_from]).encode())

    def _note(self, path: Path) -> Path:
        """Where the content's hash is noted for files of these names, sizes and times."""
        looks = [(name, os.stat(file)) for name, file in _files(path)]
        quick = [str(path.resolve()), [(n, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for n, s in looks]]
        return self._at(_hash(json.dumps(quick).encode()), ".content")

    def noted(self, path: Path) -> str:
        """The content's hash where it is known without reading a byte. Raises OSError where it is not, or the files are not there."""
        return _digest(self._note(path))

    def content(self, path: Path) -> str:
        """A hash of the scan's files, names and bytes; the bytes are read only when a size or a time has changed."""
        note = self._note(path)
        with contextlib.suppress(OSError):
            return _digest(note)
        files = [[name, _xxh3(file)] for name, file in _files(path)]
        whole = _hash(json.dumps(files).encode())
        _write(note, whole.encode())
        return whole

    def get(self, key: str, verify: bool = True) -> NDArray[np.uint8] | None:
        """The slices `[S, H, W]` uint8, read-only and memory-mapped, or None when they are not there or damaged.

        `verify` also compares the pixels' checksum, which reads them.
        """
        try:
            facts = json.loads(self._at(key, ".json").read_text())
            slices = np.load(self._at(key, ".npy"), mmap_mode="r", allow_pickle=False)
            whole = slices.dtype == np.uint8 and list(slices.shape) == facts["shape"]
            return slices if whole and (not verify or zlib.crc32(slices.data) == facts["crc32"]) else None
        except (OSError, ValueError, KeyError, TypeError, EOFError):
            return None

    def put(self, key: str, slices: NDArray[np.uint8], facts: dict[str, Any]) -> None:
        """Keep slices `[S, H, W]` under the key, with facts for a person (chosen indices, box, notes) in a JSON file beside them."""
        if slices.dtype != np.uint8 or slices.ndim != 3:
            raise ValueError(f"slices are {slices.dtype} {slices.shape}; the store keeps uint8 [S, H, W]")
        slices = np.ascontiguousarray(slices)
        with _beside(self._at(key, ".npy")) as file:
            np.save(file, slices, allow_pickle=False)
        _write(self._at(key, ".json"), json.dumps({**facts, "shape": slices.shape, "crc32": zlib.crc32(slices.data)}).encode())

    def facts(self, key: str) -> dict[str, Any]:
        """What was kept beside the slices; empty when there is nothing."""
        try:
            return dict(json.loads(self._at(key, ".json").read_text()))
        except (OSError, ValueError):
            return {}

    def sweep(self) -> None:
        """Remove what writers that were killed have left half written, once it is an hour old."""
        for left in self.folder.glob(f"*/{WRITING}*"):
            with contextlib.suppress(OSError):
                if time.time() - left.stat().st_mtime > 3600:
                    left.unlink()


def _key(content: str, settings: Preprocess, window: tuple[float, float] | None, series: str | None, lungs: str) -> str:
    wanted = asdict(settings)
    del wanted["modality"], wanted["draws"]  # which scans are taken, and how often: not what is kept of one
    if not settings.draw:
        del wanted["draw"]
    made_from = {"algorithm": ALGORITHM, "settings": wanted, "window": window, "series": series, "content": content}
    if settings.crop == "lungs":
        made_from |= {"lungs": lungs, "finder": FINDER}
    return _hash(json.dumps(made_from, sort_keys=True).encode())


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=20).hexdigest()


def _digest(note: Path) -> str:
    """A noted hash. Raises OSError where there is none, or a power cut left half of one."""
    noted = note.read_text(errors="replace")
    if len(noted) != 40 or not set(noted) <= set("0123456789abcdef"):
        raise FileNotFoundError(note)
    return noted


def _xxh3(file: str) -> str:
    with open(file, "rb", buffering=0) as opened:
        return xxhash.xxh3_128_hexdigest(opened.read())


def _files(path: Path) -> list[tuple[str, str]]:
    """The scan's files with their names below it, hidden ones left out, in a fixed order."""
    if not path.is_dir():
        return [(path.name, str(path))]
    found = []
    for root, folders, names in os.walk(path):
        folders[:] = sorted(f for f in folders if not f.startswith("."))
        below = os.path.relpath(root, path)
        found += [(os.path.normpath(f"{below}/{n}"), f"{root}/{n}") for n in sorted(names) if not n.startswith(".")]
    return found


@contextlib.contextmanager
def _beside(target: Path) -> Iterator[Any]:
    """A file to write that becomes `target` in one step; a process killed on the way leaves no target. Nothing waits for the disk: what a
    power cut may spoil is seen by its checksum, and computed again."""
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=WRITING, dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise


def _write(target: Path, data: bytes) -> None:
    with _beside(target) as file:
        file.write(data)
