"""Remember the end of the egress log outside the log, so that lines cut off its end are noticed.

An anchor is a small JSON file with the number of lines, the last hash, and the digest of every file that the
log vouches for (client/site/anchored_files.py). There are up to two: `anchor.json` in the state folder, and
one outside it (`outer_anchor` in client/site/config.py), which outlives a deleted state folder. An anchor is
written after the line, so it may be behind the log after a power failure, and never ahead of it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter

from common.utils.atomic_files import atomic_write
from common.utils.hash_chain import GENESIS_HASH

LOG_FILENAME = "egress.jsonl"  # in the state folder
ANCHOR_FILENAME = "anchor.json"  # in the state folder
ANCHORED_KIND = "anchored"  # a line that says since when the log has an anchor
FILE_WRITE_KIND = "file"  # a line that precedes the writing of a file
FILE_FOUND_KIND = "file found"  # a line that states a file as it is
LOSS_KIND = "loss accepted"  # a line that states what the hospital accepts as lost
RECORD_KINDS = (ANCHORED_KIND, FILE_WRITE_KIND, FILE_FOUND_KIND, LOSS_KIND)  # all that are no message


@dataclass(frozen=True)
class FileState:
    """What the log says about a file."""

    entries: int  # how many it holds; 0: unknown
    digest: str  # SHA-256 of its bytes; empty: there is no file
    replaced_digest: str | None = None  # of the version before, until the new one is known to be written


@dataclass(frozen=True)
class Anchor:
    """The end of the log, and the files that it vouches for. Its field names are the keys in the file."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    lines: int = 0
    bytes: int = 0
    last_hash: str = GENESIS_HASH
    files: Mapping[str, FileState] = field(default_factory=dict)


_ANCHOR_ADAPTER = TypeAdapter(Anchor)


def read_anchors(folder: Path, outer_anchor: Path | None) -> list[Anchor]:
    """Return the anchors that exist.

    Raises:
        OSError: An anchor cannot be read.
        ValueError: An anchor is damaged.
    """
    anchors = []
    for path in anchor_paths(folder, outer_anchor):
        if path.exists():
            anchors.append(read_anchor(path))
    return anchors


def read_anchor(path: Path) -> Anchor:
    """Return the anchor in a file.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file is damaged.
    """
    return _ANCHOR_ADAPTER.validate_json(path.read_bytes())


def write_anchors(folder: Path, outer_anchor: Path | None, anchor: Anchor) -> None:
    """Write the anchor in every place.

    Raises:
        OSError: A place cannot be written.
    """
    data = json.dumps(dataclasses.asdict(anchor), indent=1).encode()
    for path in anchor_paths(folder, outer_anchor):
        atomic_write(path, data)


def has_records(folder: Path, outer_anchor: Path | None) -> bool:
    """Return whether there is an egress log or an anchor, so that something may have left."""
    return any(path.exists() for path in [folder / LOG_FILENAME, *anchor_paths(folder, outer_anchor)])


def anchor_paths(folder: Path, outer_anchor: Path | None) -> list[Path]:
    """Return where anchors are kept."""
    paths = [folder / ANCHOR_FILENAME]
    if outer_anchor is not None:
        paths.append(outer_anchor)
    return paths


def add_line(anchor: Anchor, line: Mapping[str, Any], num_bytes: int) -> Anchor:
    """Return the anchor of a log that is longer by a line."""
    files = confirm_files(anchor.files)  # a line is added only once every file before it is written
    kind, name = line["kind"], line["query"]
    if kind in (FILE_WRITE_KIND, FILE_FOUND_KIND):
        replaced_digest = None
        if kind == FILE_WRITE_KIND:
            replaced_digest = files[name].digest if name in files else ""
        files[name] = FileState(line["fields"]["entries"], line["digest"], replaced_digest)
    return Anchor(anchor.lines + 1, anchor.bytes + num_bytes, line["hash"], files)


def confirm_files(files: Mapping[str, FileState]) -> dict[str, FileState]:
    """Return the files with each known to be written."""
    return {name: replace(state, replaced_digest=None) for name, state in files.items()}
