"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A place to write a file to, which gets the name `path` when the block ends, even when the power fails; never when the block does. Raises
    OSError."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield part
        _fsync_path(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    _fsync_path(path.parent)  # the new name itself


def atomic_write(path: Path, data: bytes, mode: int = 0o666) -> None:
    """All of it under this name, or nothing. Raises OSError."""
    with (
        atomic_path(path) as part,
        open(part, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file,
    ):
        file.write(data)


def hash_file(path: Path) -> str:
    """SHA-256 of a file. Raises OSError."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync_path(path: Path) -> None:
    """To the disk: a file or a folder."""
    opened = os.open(path, os.O_RDONLY)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)
