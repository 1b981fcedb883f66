"""What left this hospital: one line for every message out, each chained to the one before by its hash, so that a changed or missing line shows.

`egress.jsonl` in the state folder: time, run, stage, round, kind, names, types and shapes of what was sent, bytes, a digest of the content. No
content, no identifier. The last line's hash, noted elsewhere, also shows that nothing was cut off at the end.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from common.protocol.messages import Reply, Request, metadata_to_json, pack_message
from common.utils.errors import ConsiliumError, Refused
from common.utils.hash_chain import GENESIS_HASH, append_hash, verify_link

LOG_FILENAME = "egress.jsonl"


def record_reply(folder: Path, request: Request, reply: Reply) -> None:
    """Write the line of a message before it leaves. Raises Refused when it cannot be written: what is not recorded does not leave."""
    arrays, facts = pack_message(reply)
    entry: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "run": request.run_id,
        "stage": getattr(request, "stage", ""),
        "round": getattr(request, "round", None),
        "kind": facts["kind"],
        "query": getattr(request, "name", getattr(request, "sum_id", "")),
        "fields": {name: f"{array.dtype}{list(array.shape)}" for name, array in sorted(arrays.items())}
        | {"facts": sorted(facts)},
        "bytes": sum(array.nbytes for array in arrays.values()) + len(metadata_to_json(facts)),
        "digest": hash_message(reply),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / LOG_FILENAME).open("a+b") as log:
            fcntl.flock(log, fcntl.LOCK_EX)
            log.write(json.dumps(append_hash(entry, _read_last_hash(log)), sort_keys=True).encode() + b"\n")
            log.flush()
            os.fsync(log.fileno())
    except (OSError, ValueError, KeyError) as error:
        raise Refused(
            f"its egress log cannot be written ({type(error).__name__}), and what is not recorded does not leave"
        ) from error


def hash_message(message: Request | Reply) -> str:
    """Equal for messages of equal content."""
    arrays, facts = pack_message(message)
    digest = hashlib.sha256(metadata_to_json(facts).encode())
    for name in sorted(arrays):
        digest.update(name.encode() + np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def _read_last_hash(log: Any) -> str:
    """The hash of the file's last line; of an empty file the start of the chain. A line that a full disk or a power cut has cut short is taken
    away: its message never left."""
    end = log.seek(0, os.SEEK_END)
    size = 4096
    while end:
        log.seek(max(0, end - size))
        tail = log.read()
        whole = tail[: tail.rfind(b"\n") + 1]
        lines = whole.splitlines()
        if len(lines) > 1 or size >= end:
            if len(whole) < len(tail):
                log.truncate(end - len(tail) + len(whole))
            return str(json.loads(lines[-1])["hash"]) if lines else GENESIS_HASH
        size *= 4
    return GENESIS_HASH


def read_entries(folder: Path) -> Iterator[dict[str, Any]]:
    """The lines, checked one after another. Raises ConsiliumError naming the first that does not follow from the one before."""
    path, previous = folder / LOG_FILENAME, GENESIS_HASH
    if not path.is_file():
        raise ConsiliumError(f"{path} is not there: nothing has left from here, or the log was removed")
    with path.open("rb") as log:
        for number, line in enumerate(log, 1):
            try:
                entry = json.loads(line)
                sound = verify_link(entry, previous)
            except (ValueError, KeyError, TypeError):
                sound = False
            if not sound:
                raise ConsiliumError(f"{path}: line {number} was changed, or lines before it were removed")
            previous = entry["hash"]
            yield entry
