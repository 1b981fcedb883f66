"""What could not be used, and why."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SkippedItem:
    """Something that did not become, or did not stay, a scan of the cohort.

    Its path is for the hospital's own staff; the reason holds neither path nor identifier and may be sent.
    """

    path: str
    reason: str
