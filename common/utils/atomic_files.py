"""Write files that are either complete or absent, even after a power failure."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path that is renamed to `path` if the block ends without an error, and else deleted.

    Raises:
        OSError: The file cannot be written or renamed.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        _flush_to_disk(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    _flush_to_disk(path.parent)  # makes the new name durable


def atomic_write(path: Path, data: bytes, mode: int = 0o666) -> None:
    """Write a file completely or not at all.

    Raises:
        OSError: The file cannot be written.
    """

    def open_with_mode(name: str, flags: int) -> int:
        return os.open(name, flags, mode)

    with atomic_path(path) as temporary, open(temporary, "wb", opener=open_with_mode) as file:
        file.write(data)


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file.

    Raises:
        OSError: The file cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush_to_disk(path: Path) -> None:
    """Wait until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
