"""A scan found in a hospital's folder, on its way to a row of the cohort table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass
class FoundScan:
    """What is known of a scan before any label table is read; None means that nobody said anything."""

    scan: str
    path: str
    patient: str
    series: str | None = None
    covid: float | None = None
    split: str | None = None
    source: str | float | None = None  # NaN where a table of sources does not list the scan

    @classmethod
    def at(cls, path: Path, folder: Path, patient: str = "") -> FoundScan:
        """Make a scan named after its path below `folder`, and its own patient unless one is given."""
        name = path.relative_to(folder).as_posix()
        return cls(name, str(path), patient or name)

    def to_row(self) -> dict[str, Any]:
        """Return the row of the cohort table, without what is not known."""
        return {column: value for column, value in asdict(self).items() if value is not None}
