"""What became of each study: one JSON line a study, the last one holds. No identifier of the hospital's stands in it, only names by its key."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

JOURNAL_FILENAME = "journal.jsonl"


def read_journal(folder: Path) -> dict[str, dict[str, Any]]:
    """{study: its last line}. A line that a kill tore is cut off, so that the next one begins a line."""
    path = folder / JOURNAL_FILENAME
    if not path.exists():
        return {}
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        os.truncate(path, end)
    return {line["study"]: line for line in map(json.loads, data[:end].splitlines())}


def append_to_journal(folder: Path, entry: dict[str, Any]) -> None:
    """Add a line; it is on the disk when this returns."""
    with open(
        os.open(folder / JOURNAL_FILENAME, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab"
    ) as file:
        file.write(json.dumps(entry, sort_keys=True).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
