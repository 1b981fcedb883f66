"""Derive seeds from their context only, so that a resumed round draws what the interrupted one drew."""

from __future__ import annotations

import hashlib


def derive_seed(seed: int, *parts: str | int) -> int:
    """Return a seed in [0, 2^63) from the run's seed and a context such as (stage, round, centre)."""
    text = "\0".join([str(seed), *map(str, parts)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
