"""Record the outcome of each study: one JSON line for each attempt, of which the last one counts.

The journal names studies and accession numbers by their pseudonyms only.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

JOURNAL_FILENAME = "journal.jsonl"


class Outcome(StrEnum):
    """What became of a study; the values stand in journals on disk."""

    INGESTED = "came"
    EMPTY = "empty"
    FAILED = "failed"


@dataclass(frozen=True)
class JournalEntry:
    """The outcome of one study."""

    study: str  # pseudonym
    version: str  # the archive's; changes when images are added
    outcome: Outcome
    accession: str = ""  # pseudonym of the accession number, empty where the study has none
    reason: str = ""  # why the study was not ingested
    skipped_counts: dict[str, int] = field(default_factory=dict)  # {why an image was skipped: images}

    def to_json(self) -> str:
        """Encode the entry as one line."""
        values = {
            "study": self.study,
            "version": self.version,
            "outcome": self.outcome.value,
            "accession": self.accession,
            "reason": self.reason,
            "passed": self.skipped_counts,
        }
        return json.dumps(values, sort_keys=True)

    @classmethod
    def from_json(cls, line: bytes) -> JournalEntry:
        """Decode a line of `to_json`."""
        values = json.loads(line)
        return cls(
            study=values["study"],
            version=values["version"],
            outcome=Outcome(values["outcome"]),
            accession=values["accession"],
            reason=values["reason"],
            skipped_counts=values["passed"],
        )


def read_journal(folder: Path) -> dict[str, JournalEntry]:
    """Return the last entry of each study.

    A line that a killed process left unfinished is cut off, so that the next entry starts on a new line.
    """
    path = folder / JOURNAL_FILENAME
    if not path.exists():
        return {}
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        os.truncate(path, end)
    entries = map(JournalEntry.from_json, data[:end].splitlines())
    return {entry.study: entry for entry in entries}


def append_to_journal(folder: Path, entry: JournalEntry) -> None:
    """Append an entry; it is on the disk when this returns."""
    descriptor = os.open(folder / JOURNAL_FILENAME, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    with open(descriptor, "ab") as file:
        file.write(entry.to_json().encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
