"""Chain log entries by hash: each holds its predecessor's, which reveals changed and missing entries."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

GENESIS_HASH = "0" * 64  # the predecessor's hash in the first entry


def append_hash(entry: Mapping[str, Any], previous_hash: str) -> dict[str, Any]:
    """Return the entry, which must consist of JSON values, with `previous` and its own `hash`."""
    linked = {**entry, "previous": previous_hash}
    return {**linked, "hash": _hash_entry(linked)}


def verify_link(entry: Mapping[str, Any], previous_hash: str) -> bool:
    """Return whether an entry is unchanged and follows the entry with the given hash.

    Raises:
        KeyError: The entry has no `previous` or `hash`.
    """
    follows = entry["previous"] == previous_hash
    return bool(follows and entry["hash"] == _hash_entry(entry))


def _hash_entry(entry: Mapping[str, Any]) -> str:
    """Return the SHA-256 of an entry without its own hash; `previous` is included."""
    content = {key: value for key, value in entry.items() if key != "hash"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
