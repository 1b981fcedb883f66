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

from common.chain import START, follows, linked
from common.errors import ConsiliumError, Refused
from common.messages import Reply, Request, facts_json, pack

NAME = "egress.jsonl"


def record(folder: Path, request: Request, reply: Reply) -> None:
    """Write the line of a message before it leaves. Raises Refused when it cannot be written: what is not recorded does not leave."""
    arrays, facts = pack(reply)
    entry: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "run": request.run,
        "stage": getattr(request, "stage", ""),
        "round": getattr(request, "round", None),
        "kind": facts["kind"],
        "query": getattr(request, "name", getattr(request, "sum", "")),
        "fields": {name: f"{array.dtype}{list(array.shape)}" for name, array in sorted(arrays.items())} | {"facts": sorted(facts)},
        "bytes": sum(array.nbytes for array in arrays.values()) + len(facts_json(facts)),
        "digest": digest_of(reply),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / NAME).open("a+b") as log:
            fcntl.flock(log, fcntl.LOCK_EX)
            log.write(json.dumps(linked(entry, _last_hash(log)), sort_keys=True).encode() + b"\n")
            log.flush()
            os.fsync(log.fileno())
    except (OSError, ValueError, KeyError) as error:
        raise Refused(f"its egress log cannot be written ({type(error).__name__}), and what is not recorded does not leave") from error


def digest_of(message: Request | Reply) -> str:
    """Equal for messages of equal content."""
    arrays, facts = pack(message)
    digest = hashlib.sha256(facts_json(facts).encode())
    for name in sorted(arrays):
        digest.update(name.encode() + np.ascontiguousarray(arrays[name]).tobytes())
    return digest.hexdigest()


def _last_hash(log: Any) -> str:
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
            return str(json.loads(lines[-1])["hash"]) if lines else START
        size *= 4
    return START


def read(folder: Path) -> Iterator[dict[str, Any]]:
    """The lines, checked one after another. Raises ConsiliumError naming the first that does not follow from the one before."""
    path, previous = folder / NAME, START
    if not path.is_file():
        raise ConsiliumError(f"{path} is not there: nothing has left from here, or the log was removed")
    with path.open("rb") as log:
        for number, line in enumerate(log, 1):
            try:
                entry = json.loads(line)
                sound = follows(entry, previous)
            except (ValueError, KeyError, TypeError):
                sound = False
            if not sound:
                raise ConsiliumError(f"{path}: line {number} was changed, or lines before it were removed")
            previous = entry["hash"]
            yield entry
