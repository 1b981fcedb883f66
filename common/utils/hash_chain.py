"""A chain of entries: each holds the hash of the one before it, so that a changed or missing one shows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

GENESIS_HASH = "0" * 64


def append_hash(entry: Mapping[str, Any], previous_hash: str) -> dict[str, Any]:
    """The entry (JSON values) with `previous` and its own `hash`."""
    entry = {**entry, "previous": previous_hash}
    return {**entry, "hash": _hash_entry(entry)}


def verify_link(entry: Mapping[str, Any], previous_hash: str) -> bool:
    """Is it unchanged, and the one after the entry of hash `previous`? Raises KeyError for what is no entry."""
    return bool(entry["previous"] == previous_hash and entry["hash"] == _hash_entry(entry))


def _hash_entry(entry: Mapping[str, Any]) -> str:
    """Of all that it holds but this hash itself; `previous` is part of it."""
    return hashlib.sha256(
        json.dumps({k: v for k, v in entry.items() if k != "hash"}, sort_keys=True).encode()
    ).hexdigest()
