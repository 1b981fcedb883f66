"""Keep the egress log: a line for every message that left, chained by hashes so that tampering shows.

`egress.jsonl` in the state folder holds of each message its time, run, stage, round, kind, the names, types
and shapes of its arrays, its bytes and a digest of its content: no content and no identifier. Each line holds
the hash of the one before, so a changed or missing line is found. Lines cut off at the end are found by the
anchors (client/site/egress_anchor.py), of which the outer one lies outside the state folder.

Lines of a kind in `RECORD_KINDS` are no messages: they vouch for other files of the state folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from client.site.egress_anchor import LOG_FILENAME, RECORD_KINDS, read_anchors
from client.site.egress_chain import (
    REMEDY,
    EgressEntry,
    append_line,
    open_log,
    without_hashes,
)
from common.protocol.message_packing import metadata_to_json, pack_message
from common.protocol.messages import Reply, Request
from common.utils.errors import ConsiliumError
from common.utils.hash_chain import GENESIS_HASH, verify_link


def record_reply(folder: Path, request: Request, reply: Reply, outer_anchor: Path | None = None) -> None:
    """Write the line of a reply before it leaves.

    Raises Refused when it cannot be written, or when lines are missing: then the reply stays.
    """
    values = _describe_reply(request, reply)
    with open_log(folder, outer_anchor) as log:
        append_line(log, values)


def _describe_reply(request: Request, reply: Reply) -> dict[str, Any]:
    """Return the entry of a reply without its hashes."""
    arrays, metadata = pack_message(reply)
    shapes: dict[str, Any] = {
        name: f"{array.dtype}{list(array.shape)}" for name, array in sorted(arrays.items())
    }
    array_bytes = sum(array.nbytes for array in arrays.values())
    entry = EgressEntry(
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        run=request.run_id,
        stage=getattr(request, "stage", ""),
        round=getattr(request, "round", None),
        kind=metadata["kind"],
        query=getattr(request, "name", getattr(request, "sum_id", "")),
        fields={**shapes, "facts": sorted(metadata)},
        bytes=array_bytes + len(metadata_to_json(metadata)),
        digest=hash_message(reply),
    )
    return without_hashes(entry)


def hash_message(message: Request | Reply) -> str:
    """Return a digest of a message's content: its metadata and every array."""
    arrays, metadata = pack_message(message)
    digest = hashlib.sha256(metadata_to_json(metadata).encode())
    for name in sorted(arrays):
        digest.update(name.encode() + np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def read_entries(folder: Path, outer_anchor: Path | None = None) -> Iterator[EgressEntry]:
    """Iterate over the messages in the log, as `read_lines`."""
    for entry in read_lines(folder, outer_anchor):
        if entry.kind not in RECORD_KINDS:
            yield entry


def read_lines(folder: Path, outer_anchor: Path | None = None) -> Iterator[EgressEntry]:
    """Iterate over all lines of the log, and check the chain and that it reaches as far as the anchors.

    Raises ConsiliumError naming the first broken line, or how many lines are missing at the end.
    """
    path = folder / LOG_FILENAME
    check_log_exists(folder, outer_anchor)
    previous = GENESIS_HASH
    hashes = [GENESIS_HASH]
    with path.open("rb") as log:
        for number, line in enumerate(log, 1):
            try:
                values = json.loads(line)
                is_intact = verify_link(values, previous)
                entry = EgressEntry(**values)
            except (ValueError, KeyError, TypeError):
                is_intact = False
            if not is_intact:
                raise ConsiliumError(f"{path}: line {number} was changed, or lines before it were removed")
            previous = entry.hash
            hashes.append(previous)
            yield entry
    for anchor in read_anchors(folder, outer_anchor):
        num_missing = anchor.lines + 1 - len(hashes)
        if num_missing > 0:
            raise ConsiliumError(
                f"{path} was cut: {num_missing} of {anchor.lines} lines are missing at its end"
            )
        if hashes[anchor.lines] != anchor.last_hash:
            raise ConsiliumError(f"{path}: line {anchor.lines} is not the one that was written")


def check_log_exists(folder: Path, outer_anchor: Path | None) -> None:
    """Raise ConsiliumError for a log that does not exist."""
    path = folder / LOG_FILENAME
    if path.is_file():
        return
    num_lines = max((anchor.lines for anchor in read_anchors(folder, outer_anchor)), default=0)
    if num_lines:
        raise ConsiliumError(f"{path} does not exist although {num_lines} lines were written; {REMEDY}")
    raise ConsiliumError(f"{path} does not exist: nothing has left from here, or the log was removed")
