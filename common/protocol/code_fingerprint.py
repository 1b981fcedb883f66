"""Which code is running: the coordinator and every centre compare this at the start of a run.

Flower's simulation imports packages from the SuperLink's working directory, so an older copy can run silently; a hospital approves code by
this hash.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

SOURCE_ROOT = Path(__file__).resolve().parent.parent


def fingerprint_code() -> str:
    """SHA-256 (16 hex digits) of the sources that a centre runs: `common/` and `client/` beside this package, by name and content."""
    digest = hashlib.sha256()
    for path in sorted(p for room in ("client", "common") for p in (SOURCE_ROOT / room).rglob("*.py")):
        digest.update(path.relative_to(SOURCE_ROOT).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
