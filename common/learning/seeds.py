"""Seeds that depend on nothing but what is being done: a resumed round draws what the interrupted one drew."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *parts: str | int) -> int:
    """A seed in [0, 2^63) from the run's seed and e.g. (stage, round, centre)."""
    text = "\0".join([str(seed), *map(str, parts)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
