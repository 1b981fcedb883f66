"""The audit trail's chain of hashes: each entry holds the hash of the one before, so that tampering shows.

A hash covers the names of an entry's fields as well as their values. They are those of version 0.1.0,
whatever the columns are called today, so that a trail that began then still verifies.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from common.utils.hash_chain import GENESIS_HASH, append_hash, verify_link

# {column: name that the hash covers}; a column that is missing here has the same name in both.
HASHED_NAMES = {
    "actor": "who",
    "action": "what",
    "run_id": "run",
    "reason": "why",
    "previous_hash": "previous",
    "entry_hash": "hash",
}
_COLUMNS = {hashed_name: column for column, hashed_name in HASHED_NAMES.items()}


def seal_entry(row: Mapping[str, Any], previous_hash: str) -> dict[str, Any]:
    """Return a new row of the audit table with `previous_hash` and its own `entry_hash`."""
    sealed = append_hash(_to_hashed_names(row), previous_hash)
    return {_COLUMNS.get(name, name): value for name, value in sealed.items()} | {"time": row["time"]}


def first_broken_link(rows: Iterable[Mapping[str, Any]]) -> int | None:
    """Return the id of the first entry that was changed or that follows a removed one; None if intact.

    Args:
        rows: the whole audit table in the order of writing.
    """
    previous_hash = GENESIS_HASH
    for row in rows:
        if not verify_link(_to_hashed_names(row), previous_hash):
            return int(row["id"])
        previous_hash = row["entry_hash"]
    return None


def _to_hashed_names(row: Mapping[str, Any]) -> dict[str, Any]:
    entry = {HASHED_NAMES.get(column, column): value for column, value in row.items() if column != "id"}
    return entry | {"time": row["time"].isoformat()}
