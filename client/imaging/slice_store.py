"""The centre's store of preprocessed slices: uint8 arrays on local disk, memory-mapped.

A key is a hash of the preprocessing settings, the scan's own window and the content of its files, so a
changed setting or file is computed anew and an unchanged one never is. A file's content is hashed only when
its size or times have changed since the last time. Entries appear complete or not at all (written beside,
then renamed); two writers of one key write the same bytes.
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
from typing import IO, Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from common.config.schema import PreprocessConfig

# Raise it when readers, lungs, selection or resizing give other pixels: every stored slice is then computed
# anew.
ALGORITHM_VERSION = 2
# The same for the segmentation behind a crop to the lungs, or a mask: slices of other crops are kept.
LUNG_FINDER_VERSION = 1

PARTIAL_PREFIX = ".writing-"
STALE_SECONDS = 3600  # after which a partial file's writer is taken for dead
HASH_BYTES = 20

# Keys are made of the settings under the names that they had in 0.1.0, so that stores made then stay valid.
KEY_NAMES = {
    "full_lung_search": "exact",
    "num_slices": "slices",
    "num_views": "draws",
    "view": "draw",
    "image_size": "size",
}


class SliceStore:
    """Slices by key in one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def compute_key(
        self,
        path: Path,
        settings: PreprocessConfig,
        window: tuple[float, float] | None = None,
        series_uid: str | None = None,
        lung_source: str = "",
    ) -> str:
        """Return the key of a scan's slices; files that changed since the last call are read.

        `lung_source` says what the lungs of a crop to the lungs are made from, if not by segmenting the scan
        itself.

        Raises:
            FileNotFoundError: The scan is not there.
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
        """Return the key if no file of the scan looks changed and its slices are stored intact; else None.

        No file of the scan is read.
        """
        try:
            content_hash = self.cached_hash(path)
        except OSError:
            return None
        key = _build_key(content_hash, settings, window, series_uid, lung_source)
        if self.get(key) is None:
            return None
        return key

    def compute_mask_key(self, slices_key: str, mask_source: str) -> str:
        """Return the key of a mask of the scan whose slices have `slices_key`.

        `mask_source` says what it is made from: its column's kind and its file's content.
        """
        return _hash_json(["mask", LUNG_FINDER_VERSION, slices_key, mask_source])

    def hash_content(self, path: Path) -> str:
        """Return a hash of the scan's files; they are read only when a size or a time has changed."""
        note = self._hash_note_path(path)
        with contextlib.suppress(OSError):
            return _read_hash_note(note)
        file_hashes = [[name, _hash_file(file)] for name, file in _list_scan_files(path)]
        content_hash = _hash_json(file_hashes)
        _write_atomic(note, content_hash.encode())
        return content_hash

    def cached_hash(self, path: Path) -> str:
        """Return the hash of the scan's files without reading them.

        Raises:
            OSError: A file is not there, or looks changed since it was hashed.
        """
        return _read_hash_note(self._hash_note_path(path))

    def get(self, key: str, verify: bool = True) -> NDArray[np.uint8] | None:
        """Return the slices uint8 [S, H, W], read-only and memory-mapped; None where missing or damaged.

        `verify` also compares the pixels' checksum, which reads them.
        """
        try:
            metadata = json.loads(self._entry_path(key, ".json").read_text())
            array_path = self._entry_path(key, ".npy")
            slices: NDArray[np.uint8] = np.load(array_path, mmap_mode="r", allow_pickle=False)
            is_intact = slices.dtype == np.uint8 and list(slices.shape) == metadata["shape"]
            if is_intact and verify:
                is_intact = zlib.crc32(slices.data) == metadata["crc32"]
        except (OSError, ValueError, KeyError, TypeError, EOFError):
            return None
        if not is_intact:
            return None
        return slices

    def put(self, key: str, slices: NDArray[np.uint8], metadata: dict[str, Any]) -> None:
        """Store slices [S, H, W] under the key, with metadata in a JSON file beside them.

        Raises:
            ValueError: The array is not uint8 with three dimensions.
        """
        if slices.dtype != np.uint8 or slices.ndim != 3:
            raise ValueError(f"slices are {slices.dtype} {slices.shape}; the store keeps uint8 [S, H, W]")
        slices = np.ascontiguousarray(slices)
        with _open_atomic(self._entry_path(key, ".npy")) as file:
            np.save(file, slices, allow_pickle=False)
        document = {**metadata, "shape": slices.shape, "crc32": zlib.crc32(slices.data)}
        _write_atomic(self._entry_path(key, ".json"), json.dumps(document).encode())

    def read_metadata(self, key: str) -> dict[str, Any]:
        """Return the metadata beside the slices, for `SliceMetadata.from_json`; empty where there is none."""
        try:
            return dict(json.loads(self._entry_path(key, ".json").read_text()))
        except (OSError, ValueError):
            return {}

    def remove_stale(self) -> None:
        """Remove the partial files of writers that were killed, once they are an hour old."""
        for partial in self.folder.glob(f"*/{PARTIAL_PREFIX}*"):
            with contextlib.suppress(OSError):
                if time.time() - partial.stat().st_mtime > STALE_SECONDS:
                    partial.unlink()

    def _entry_path(self, key: str, suffix: str) -> Path:
        return self.folder / key[:2] / (key + suffix)

    def _hash_note_path(self, path: Path) -> Path:
        """Return where the content's hash is noted for files of these names, sizes and times."""
        looks = []
        for name, file in _list_scan_files(path):
            stat = os.stat(file)
            looks.append((name, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns))
        return self._entry_path(_hash_json([str(path.resolve()), looks]), ".content")


def _build_key(
    content_hash: str,
    settings: PreprocessConfig,
    window: tuple[float, float] | None,
    series_uid: str | None,
    lung_source: str,
) -> str:
    settings_in_key = {KEY_NAMES.get(name, name): value for name, value in asdict(settings).items()}
    # These say which scans are taken, and how often, not what is kept of one.
    del settings_in_key["modality"], settings_in_key["draws"]
    if not settings.view:
        del settings_in_key["draw"]
    ingredients = {
        "algorithm": ALGORITHM_VERSION,
        "settings": settings_in_key,
        "window": window,
        "series": series_uid,
        "content": content_hash,
    }
    if settings.crop == "lungs":
        ingredients |= {"lungs": lung_source, "finder": LUNG_FINDER_VERSION}
    return _hash_json(ingredients, sort_keys=True)


def _hash_json(value: Any, sort_keys: bool = False) -> str:
    text = json.dumps(value, sort_keys=sort_keys)
    return hashlib.blake2b(text.encode(), digest_size=HASH_BYTES).hexdigest()


def _read_hash_note(note: Path) -> str:
    """Return a noted hash. Raises OSError where there is none, or a power cut left half of one."""
    noted = note.read_text(errors="replace")
    if len(noted) != 2 * HASH_BYTES or not set(noted) <= set("0123456789abcdef"):
        raise FileNotFoundError(note)
    return noted


def _hash_file(file: str) -> str:
    with open(file, "rb", buffering=0) as stream:
        return xxhash.xxh3_128_hexdigest(stream.read())


def _list_scan_files(path: Path) -> list[tuple[str, str]]:
    """Return the scan's files as (name below the scan, path) in a fixed order, hidden ones left out."""
    if not path.is_dir():
        return [(path.name, str(path))]
    files = []
    for root, folders, names in os.walk(path):
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
        below = os.path.relpath(root, path)
        for name in sorted(names):
            if not name.startswith("."):
                files.append((os.path.normpath(f"{below}/{name}"), f"{root}/{name}"))
    return files


@contextlib.contextmanager
def _open_atomic(target: Path) -> Iterator[IO[bytes]]:
    """Open a file that becomes `target` in one step; a process killed on the way leaves no target.

    Nothing waits for the disk: the checksum shows what a power cut spoilt, and it is computed again.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(prefix=PARTIAL_PREFIX, dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
        os.replace(partial, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise


def _write_atomic(target: Path, data: bytes) -> None:
    with _open_atomic(target) as file:
        file.write(data)
