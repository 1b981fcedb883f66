"""Read and write files of the state folder that must not be lost, rolled back or edited unnoticed.

The egress log vouches for them. A line with the digest of the new content is written first, then the anchors,
then the file, then the anchors once more, which confirm the file. After an interruption the file is either
the new one or the one before, and nothing can have left in between: both are accepted. Any other content,
and a missing file, is refused until it is restored or the hospital accepts the loss.

A caller that reads, changes and writes a file keeps other processes out by `lock_folder`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from client.site import egress_chain
from client.site.egress_anchor import (
    FILE_FOUND_KIND,
    FILE_WRITE_KIND,
    LOG_FILENAME,
    LOSS_KIND,
    Anchor,
    FileState,
    anchor_paths,
    has_records,
    read_anchor,
)
from common.utils.atomic_files import atomic_write
from common.utils.errors import PermanentlyRefused, RefusalCode


@dataclass(frozen=True)
class AnchoredFile:
    """A file of the state folder whose loss must not go unnoticed."""

    state_dir: Path  # the centre's state folder
    name: str  # the file's path in it: "budget/spent.json"
    description: str  # for error messages: "privacy budget"
    outer_anchor: Path | None = None  # as by `client.site.config.outer_anchor`

    @property
    def path(self) -> Path:
        """Return where the file is."""
        return self.state_dir / self.name


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Let one process or thread at a time change the files of a folder.

    Raises:
        OSError: The folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def read_anchored_file(file: AnchoredFile) -> bytes | None:
    """Return a file's content, or None when it was never written.

    Raises:
        PermanentlyRefused: The file is missing, older than the last one written, or was edited.
        Refused: The log or its anchors cannot be read.
        OSError: The file cannot be read.
    """
    if not has_records(file.state_dir, file.outer_anchor):  # nothing ever left: nothing vouches for it yet
        return _read_file(file)
    with egress_chain.lock_log(file.state_dir):
        anchor = egress_chain.check_log(file.state_dir, file.outer_anchor)
        data = _read_file(file)
    if anchor is not None:
        _check_content(file, data, anchor)
    return data


def write_anchored_file(file: AnchoredFile, data: bytes, num_entries: int) -> None:
    """Write a file so that its loss will be noticed; `num_entries` tells a person how much was lost.

    Raises:
        PermanentlyRefused: The file that would be replaced is not the one that was last written.
        Refused: The log or its anchors cannot be written.
        OSError: The file cannot be written; the one before still holds.
    """
    failure: OSError | None = None
    with egress_chain.open_log(file.state_dir, file.outer_anchor) as log:
        _check_content(file, _read_file(file), log.anchor)
        state = FileState(num_entries, hashlib.sha256(data).hexdigest())
        egress_chain.append_file_line(log, FILE_WRITE_KIND, file.name, state)
        try:
            file.path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(file.path, data)
        except OSError as error:
            failure = error
        else:
            egress_chain.confirm_written(log)
    if failure is not None:  # raised here, where it is not taken for an error of the log
        raise failure


def _read_file(file: AnchoredFile) -> bytes | None:
    return file.path.read_bytes() if file.path.exists() else None


def _check_content(file: AnchoredFile, data: bytes | None, anchor: Anchor) -> None:
    """Raise PermanentlyRefused for a content that is not what the log says."""
    expected = anchor.files.get(file.name)
    if expected is None:
        return
    digest = hashlib.sha256(data).hexdigest() if data is not None else ""
    if digest in (expected.digest, expected.replaced_digest):
        return
    reason = "is not the one that was last written"
    if data is None:
        reason = "is missing although it was written before"
        if expected.entries:
            reason = f"is missing although it had {expected.entries} entries"
    raise PermanentlyRefused(
        f"the centre's {file.description} {reason}; {egress_chain.REMEDY}", RefusalCode.POLICY
    )


def accept_loss(state_dir: Path, outer_anchor: Path | None) -> list[str]:
    """Make the log and its files valid as they are now, and return what was lost, one sentence each.

    The log records the acceptance and what was expected. A log with a broken chain is kept under another
    name, and a new one begins. Files keep their content; one that was deleted begins anew.

    Raises:
        Refused: The log or the anchors cannot be written.
    """
    with egress_chain.lock_log(state_dir):
        expected = _read_furthest_anchor(state_dir, outer_anchor)
        losses = _list_losses(state_dir, outer_anchor, expected)
        if not losses:
            return []
        try:
            scanned = egress_chain.scan_log(state_dir)
        except (ValueError, KeyError, TypeError):
            losses.append(f"the egress log's chain was broken; it is kept as {_set_log_aside(state_dir)}")
            scanned = Anchor()
        files = {**scanned.files, **expected.files}
        log = egress_chain.OpenLog(state_dir, outer_anchor, scanned)
        fields = {
            "losses": losses,
            "lines": {"expected": expected.lines, "found": scanned.lines},
            "files": {name: dataclasses.asdict(state) for name, state in files.items()},
        }
        egress_chain.append_line(log, egress_chain.describe_record(LOSS_KIND, "", fields, expected.last_hash))
        for name in files:
            state = FileState(0, egress_chain.state_file(state_dir, name))
            egress_chain.append_file_line(log, FILE_FOUND_KIND, name, state)
    return losses


def list_losses(state_dir: Path, outer_anchor: Path | None) -> list[str]:
    """Return a sentence for whatever is not as it was last written. Raises Refused for an unreadable log."""
    with egress_chain.lock_log(state_dir):
        expected = _read_furthest_anchor(state_dir, outer_anchor)
        return _list_losses(state_dir, outer_anchor, expected)


def _list_losses(state_dir: Path, outer_anchor: Path | None, expected: Anchor) -> list[str]:
    losses = []
    files = expected.files
    try:
        anchor = egress_chain.check_log(state_dir, outer_anchor)
        if anchor is not None:
            files = anchor.files
    except PermanentlyRefused as error:
        losses.append(str(error).removesuffix(f"; {egress_chain.REMEDY}"))
    except (ValueError, KeyError, TypeError):
        losses.append("the egress log has no anchor, and its chain is broken")
    for name, state in files.items():
        if egress_chain.state_file(state_dir, name) not in (state.digest, state.replaced_digest):
            losses.append(f"{name} is missing or not the one that was last written")
    return losses


def _read_furthest_anchor(state_dir: Path, outer_anchor: Path | None) -> Anchor:
    """Return the anchor with the most lines; an empty one when none can be read."""
    furthest = Anchor()
    for path in anchor_paths(state_dir, outer_anchor):
        with contextlib.suppress(OSError, ValueError):
            anchor = read_anchor(path)
            if anchor.lines > furthest.lines:
                furthest = anchor
    return furthest


def _set_log_aside(state_dir: Path) -> str:
    """Rename the log, and return its new name."""
    time = datetime.now(UTC).strftime("%Y%m%dT%H%M%S%f")
    name = f"egress.broken.{time}.jsonl"
    (state_dir / LOG_FILENAME).rename(state_dir / name)
    return name
