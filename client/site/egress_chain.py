"""Append lines to the egress log and check it against its anchors (client/site/egress_anchor.py)."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from client.site.egress_anchor import (
    ANCHOR_FILENAME,
    ANCHORED_KIND,
    FILE_FOUND_KIND,
    LOG_FILENAME,
    RECORD_KINDS,
    Anchor,
    FileState,
    add_line,
    confirm_files,
    read_anchors,
    write_anchors,
)
from common.utils.atomic_files import hash_file
from common.utils.errors import PermanentlyRefused, RefusalCode, Refused
from common.utils.hash_chain import GENESIS_HASH, append_hash, verify_link

logger = logging.getLogger("consilium.centre")

LOCK_FILENAME = "egress.lock"
FILES_BEFORE_ANCHORS = ("budget/spent.json",)  # versions without anchors wrote them too
REMEDY = (
    "restore it from a backup at the centre, or accept the loss with `consilium-centre accept-loss` there"
)


@dataclass(frozen=True)
class EgressEntry:
    """A line of the log. Its field names are the keys in the file."""

    time: str  # ISO 8601, UTC
    run: str
    stage: str
    round: int | None
    kind: str  # class of the reply, or one of RECORD_KINDS
    query: str  # name of the query, id of the secure sum, or name of a file
    fields: Mapping[str, Any]  # {array: its type and shape}, and under `facts` the names of all other fields
    bytes: int
    digest: str  # SHA-256 of the message
    previous: str = ""  # hash of the line before
    hash: str = ""


@dataclass
class OpenLog:
    """The log while one writer holds its lock."""

    folder: Path
    outer_anchor: Path | None
    anchor: Anchor  # of the log as it is now


@contextlib.contextmanager
def lock_log(folder: Path) -> Iterator[None]:
    """Let one process or thread at a time work on the log and its anchors. Raises Refused for an OSError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / LOCK_FILENAME).open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield
    except (OSError, ValueError, KeyError) as error:
        reason = f"the centre's egress log cannot be written ({type(error).__name__})"
        raise Refused(f"{reason}, and nothing leaves unrecorded", RefusalCode.ERROR) from error


@contextlib.contextmanager
def open_log(folder: Path, outer_anchor: Path | None) -> Iterator[OpenLog]:
    """Open the log for writing, with every file that it vouches for known as written or not.

    Raises Refused when the log cannot be written, or when lines of it are missing.
    """
    with lock_log(folder):
        anchor = check_log(folder, outer_anchor)
        if anchor is None:
            log = OpenLog(folder, outer_anchor, scan_log(folder))
            _start_anchors(log)
        else:
            log = OpenLog(folder, outer_anchor, anchor)
            _warn_of_missing_anchor(log)
            _settle_files(log)
        yield log


def append_line(log: OpenLog, values: Mapping[str, Any]) -> None:
    """Append a line, and then write the anchors. What an interrupted writer left half-written is removed."""
    line = append_hash(values, log.anchor.last_hash)
    data = json.dumps(line, sort_keys=True).encode() + b"\n"
    with (log.folder / LOG_FILENAME).open("ab") as file:
        file.truncate(log.anchor.bytes)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    log.anchor = add_line(log.anchor, line, len(data))
    write_anchors(log.folder, log.outer_anchor, log.anchor)


def describe_record(kind: str, name: str, fields: Mapping[str, Any], digest: str) -> dict[str, Any]:
    """Return the entry of a line that is no message, without its hashes."""
    entry = EgressEntry(
        time=datetime.now(UTC).isoformat(timespec="seconds"),
        run="",
        stage="",
        round=None,
        kind=kind,
        query=name,
        fields=fields,
        bytes=0,
        digest=digest,
    )
    return without_hashes(entry)


def append_file_line(log: OpenLog, kind: str, name: str, state: FileState) -> None:
    """Append a line that vouches for a file."""
    append_line(log, describe_record(kind, name, {"entries": state.entries}, state.digest))


def confirm_written(log: OpenLog) -> None:
    """Note in the anchors that the files are written as their lines say."""
    log.anchor = dataclasses.replace(log.anchor, files=confirm_files(log.anchor.files))
    write_anchors(log.folder, log.outer_anchor, log.anchor)


def check_log(folder: Path, outer_anchor: Path | None) -> Anchor | None:
    """Return the anchor of the log as it is now, or None for a log that never had an anchor.

    A complete line after the last anchored one is from a writer that was interrupted before it wrote the
    anchors. Raises PermanentlyRefused when lines are missing, were changed, or when the anchors were removed;
    OSError for a file that cannot be read, ValueError for a log without anchors whose chain is broken.
    """
    try:
        anchors = read_anchors(folder, outer_anchor)
    except ValueError as error:
        raise _not_intact(f"an anchor of the centre's egress log is damaged; {REMEDY}") from error
    if not anchors:
        for line, _ in _iterate_lines(folder):
            if line["kind"] in RECORD_KINDS:
                raise _not_intact(f"the anchors of the centre's egress log are missing; {REMEDY}")
        return None
    current = None
    for anchor in anchors:
        extended = _extend_anchor(folder, anchor)
        confirmed = dataclasses.replace(extended, files=confirm_files(extended.files))
        if current is None:
            current = extended
        elif confirmed != dataclasses.replace(current, files=confirm_files(current.files)):
            raise _not_intact(f"the anchors of the centre's egress log contradict each other; {REMEDY}")
        if extended == confirmed:
            current = extended  # one place was written before an interruption, and the other was not
    return current


def without_hashes(entry: EgressEntry) -> dict[str, Any]:
    """Return the values of an entry whose hashes are not known yet."""
    values = dataclasses.asdict(entry)
    del values["previous"], values["hash"]  # `append_hash` sets them
    return values


def scan_log(folder: Path) -> Anchor:
    """Return the anchor that belongs to the log, by all its lines. Raises ValueError for a broken chain."""
    anchor = Anchor()
    for line, num_bytes in _iterate_lines(folder):
        anchor = add_line(anchor, line, num_bytes)
    return anchor


def state_file(folder: Path, name: str) -> str:
    """Return the digest of a file of the state folder; empty when there is no file."""
    path = folder / name
    return hash_file(path) if path.exists() else ""


def _start_anchors(log: OpenLog) -> None:
    """Adopt the log and the files of a version without anchors, or begin a new log."""
    write_anchors(log.folder, log.outer_anchor, log.anchor)
    for name in FILES_BEFORE_ANCHORS:
        digest = state_file(log.folder, name)
        if digest:
            append_file_line(log, FILE_FOUND_KIND, name, FileState(0, digest))
    append_line(log, describe_record(ANCHORED_KIND, "", {}, ""))


def _warn_of_missing_anchor(log: OpenLog) -> None:
    """Log that an anchor is written again: its place is new, or it was deleted."""
    places = {ANCHOR_FILENAME: log.folder / ANCHOR_FILENAME, "the outer anchor": log.outer_anchor}
    for name, path in places.items():
        if path is not None and not path.exists():
            logger.warning("%s of the egress log is not there and is written again", name)


def _settle_files(log: OpenLog) -> None:
    """Find out whether an interrupted writer wrote its file. If not, a line says that the earlier one holds.

    A file that is neither is left as it is: whoever reads it is refused.
    """
    for name, state in log.anchor.files.items():
        if state.replaced_digest is None:
            continue
        digest = state_file(log.folder, name)
        if digest == state.replaced_digest and digest != state.digest:
            append_file_line(log, FILE_FOUND_KIND, name, FileState(max(0, state.entries - 1), digest))


def _extend_anchor(folder: Path, anchor: Anchor) -> Anchor:
    """Return the anchor advanced over the complete lines after it.

    Raises PermanentlyRefused where lines are missing or were changed.
    """
    path = folder / LOG_FILENAME
    size = path.stat().st_size if path.exists() else 0
    if size < anchor.bytes:
        state = f"is missing although {anchor.lines} lines were written"
        if size:
            state = f"was cut: the last of its {anchor.lines} lines are missing"
        raise _not_intact(f"the centre's egress log {state}; {REMEDY}")
    if not anchor.bytes and not size:
        return anchor
    try:
        if _read_hash_before(path, anchor.bytes) != anchor.last_hash:
            raise ValueError("another line")
        for line, num_bytes in _iterate_lines(folder, anchor):
            anchor = add_line(anchor, line, num_bytes)
    except (ValueError, KeyError, TypeError) as error:
        raise _not_intact(
            f"the centre's egress log was changed near line {anchor.lines}; {REMEDY}"
        ) from error
    return anchor


def _read_hash_before(path: Path, end: int) -> str:
    """Return the hash of the line that ends at a byte. Raises ValueError or KeyError where no line ends."""
    if not end:
        return GENESIS_HASH
    with path.open("rb") as file:
        size = 4096
        while True:
            file.seek(max(0, end - size))
            tail = file.read(min(size, end))
            lines = tail.splitlines()
            if len(lines) > 1 or size >= end:
                break
            size *= 4
    if not tail.endswith(b"\n"):
        raise ValueError("no line ends here")
    return str(json.loads(lines[-1])["hash"])


def _iterate_lines(folder: Path, start: Anchor | None = None) -> Iterator[tuple[dict[str, Any], int]]:
    """Iterate over complete lines and their lengths, from an anchor on, and check the chain.

    Raises ValueError, KeyError or TypeError for the first line that does not follow.
    """
    start = start or Anchor()
    path = folder / LOG_FILENAME
    if not path.exists():
        return
    previous = start.last_hash
    with path.open("rb") as file:
        file.seek(start.bytes)
        for data in file:
            if not data.endswith(b"\n"):
                return  # cut short by a full disk or a power failure: its message never left
            line = json.loads(data)
            if not verify_link(line, previous):
                raise ValueError("the line does not follow from the one before")
            previous = line["hash"]
            yield line, len(data)


def _not_intact(reason: str) -> PermanentlyRefused:
    return PermanentlyRefused(reason, RefusalCode.POLICY)
