"""Keep the egress log: a line for every message that left, chained by hashes so that tampering shows.

`egress.jsonl` in the state folder holds of each message its time, run, stage, round, kind, the names, types
and shapes of its arrays, its bytes and a digest of its content: no content and no identifier. Each line holds
the hash of the one before, so a changed or missing line is found; keep the last hash elsewhere to find lines
cut off at the end as well.
"""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from common.protocol.message_packing import metadata_to_json, pack_message
from common.protocol.messages import Reply, Request
from common.utils.errors import ConsiliumError, RefusalCode, Refused
from common.utils.hash_chain import GENESIS_HASH, append_hash, verify_link

LOG_FILENAME = "egress.jsonl"
TAIL_BYTES = 4096  # read from the log's end to find its last line; more where the line is longer


@dataclass(frozen=True)
class EgressEntry:
    """A line of the log. Its field names are the keys in the file."""

    time: str  # ISO 8601, UTC
    run: str
    stage: str
    round: int | None
    kind: str  # class of the reply
    query: str  # name of the query, or id of the secure sum
    fields: Mapping[str, Any]  # {array: its type and shape}, and under `facts` the names of all other fields
    bytes: int
    digest: str  # SHA-256 of the message
    previous: str = ""  # hash of the line before
    hash: str = ""


def record_reply(folder: Path, request: Request, reply: Reply) -> None:
    """Write the line of a reply before it leaves.

    Raises Refused when it cannot be written: then the reply stays.
    """
    entry = _describe_reply(request, reply)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / LOG_FILENAME).open("a+b") as log:
            fcntl.flock(log, fcntl.LOCK_EX)
            line = append_hash(entry, _read_last_hash(log))
            log.write(json.dumps(line, sort_keys=True).encode() + b"\n")
            log.flush()
            os.fsync(log.fileno())
    except (OSError, ValueError, KeyError) as error:
        reason = f"the centre's egress log cannot be written ({type(error).__name__})"
        raise Refused(f"{reason}, and nothing leaves unrecorded", RefusalCode.ERROR) from error


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
    values = dataclasses.asdict(entry)
    del values["previous"], values["hash"]  # `append_hash` sets them
    return values


def hash_message(message: Request | Reply) -> str:
    """Return a digest of a message's content: its metadata and every array."""
    arrays, metadata = pack_message(message)
    digest = hashlib.sha256(metadata_to_json(metadata).encode())
    for name in sorted(arrays):
        digest.update(name.encode() + np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def _read_last_hash(log: BinaryIO) -> str:
    """Return the hash of the log's last line, or the start of the chain for an empty log.

    A last line without an end was cut short by a full disk or a power failure. It is removed: its message
    never left.
    """
    end = log.seek(0, os.SEEK_END)
    size = TAIL_BYTES
    while end:
        log.seek(max(0, end - size))
        tail = log.read()
        complete = tail[: tail.rfind(b"\n") + 1]
        lines = complete.splitlines()
        if len(lines) > 1 or size >= end:
            if len(complete) < len(tail):
                log.truncate(end - len(tail) + len(complete))
            return str(json.loads(lines[-1])["hash"]) if lines else GENESIS_HASH
        size *= 4
    return GENESIS_HASH


def read_entries(folder: Path) -> Iterator[EgressEntry]:
    """Iterate over the log and check its chain. Raises ConsiliumError naming the first broken line."""
    path = folder / LOG_FILENAME
    if not path.is_file():
        raise ConsiliumError(f"{path} does not exist: nothing has left from here, or the log was removed")
    previous = GENESIS_HASH
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
            yield entry
