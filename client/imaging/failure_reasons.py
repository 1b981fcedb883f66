"""Reasons why a scan or a mask cannot be used, in words that hold no path and no identifier.

The coordinator gets a count of each reason, so a reason must not say whose scan it is: names of files and
folders often hold a patient's.
"""

from __future__ import annotations

import os
from pathlib import Path

from common.utils.errors import ConsiliumError

FILES_CHANGED_REASON = "its files were changed while it was read; preprocess again once they are complete"
KILLED_REASON = (
    "the process that read it was killed, perhaps for lack of memory; "
    "read it on a machine with more, or remove it"
)


def explain_failure(error: Exception, path: Path, series_uid: str | None) -> str:
    """Return why something at `path` cannot be used."""
    if isinstance(error, FileNotFoundError):
        return "it is not there"
    if isinstance(error, ConsiliumError):
        return _remove_identifiers(str(error), path, series_uid)
    if isinstance(error, MemoryError):
        return KILLED_REASON
    if isinstance(error, OSError):  # of the disk, not of the scan, when the store is full or read-only
        return f"it or the store cannot be used ({error.strerror or type(error).__name__})"
    return f"it cannot be read ({type(error).__name__})"


def _remove_identifiers(message: str, path: Path, series_uid: str | None) -> str:
    """Return a reader's message with "it" in place of the scan's paths and series."""
    identifiers = []
    for root in {path, path.resolve()}:
        identifiers.append(str(root))
        if root.is_dir():
            identifiers.extend(map(str, root.rglob("*")))
    if series_uid:
        identifiers.append(series_uid)
    for identifier in sorted(identifiers, key=len, reverse=True):
        message = message.replace(identifier, "it")
    if os.sep in message:
        return "it cannot be read; read it alone at the centre to see why"
    return message
