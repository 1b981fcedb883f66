"""Identify the code that runs: the coordinator compares its own with every centre's at the start of a run.

Flower's simulation imports packages from the SuperLink's working directory, so an outdated copy could run
unnoticed. A hospital's policy approves code by this hash.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

SOURCE_ROOT = Path(__file__).resolve().parents[2]


def fingerprint_code() -> str:
    """Return 16 hex digits of the SHA-256 of the names and contents of all sources that a centre runs."""
    paths: list[Path] = []
    for package in ("client", "common"):
        paths.extend((SOURCE_ROOT / package).rglob("*.py"))
    digest = hashlib.sha256()
    for path in sorted(paths):
        name = path.relative_to(SOURCE_ROOT).as_posix()
        digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
