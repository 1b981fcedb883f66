"""Divide scans into groups of patients, so that every number that leaves is about whole groups.

The scans of a cell, such as a class in a split, are divided into groups of exactly `min_patients` patients. A
group counts as a whole or not at all: once formed it stays as it is, it is left aside while one of its scans
is missing or has moved to another cell, and patients who do not fill a group wait for others. So two numbers
about the same question, whatever was added, removed or selected between them, differ by whole groups; no sum
or difference of them is about fewer than `min_patients` patients.

This is aggregation by fixed groups (microaggregation: Domingo-Ferrer and Mateo-Sanz, "Practical data-oriented
microaggregation for statistical disclosure control", IEEE TKDE 14:189, 2002), with the groups kept for good.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from pydantic import ConfigDict


class ScanCell(NamedTuple):
    """Where a scan counts for a question, and whose it is."""

    patient: str  # the patient's mark
    cell: str  # split, modality and class


@dataclass(frozen=True)
class ReleaseGroup:
    """Scans that are released together. Its field names are the keys in the release book."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    cell: str
    patients: dict[str, list[str]]  # {mark of a patient: marks of the patient's scans in the cell}

    def list_scans(self) -> list[str]:
        """Return the marks of all scans."""
        return [scan for scans in self.patients.values() for scan in scans]


def select_complete(groups: Sequence[ReleaseGroup], scans: Mapping[str, ScanCell]) -> set[str]:
    """Return the marks of the scans of all groups that are complete: each scan is there, in its cell."""
    selected: set[str] = set()
    for group in groups:
        marks = group.list_scans()
        if all(mark in scans and scans[mark].cell == group.cell for mark in marks):
            selected.update(marks)
    return selected


def form_groups(
    groups: Sequence[ReleaseGroup], scans: Mapping[str, ScanCell], min_patients: int
) -> list[ReleaseGroup]:
    """Return new groups of the scans that are in none.

    Patients follow each other in the order of their marks, which are made with the hospital's own key: nobody
    outside can foresee who shares a group.
    """
    grouped = {mark for group in groups for mark in group.list_scans()}
    waiting: defaultdict[str, defaultdict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for mark in sorted(scans):
        if mark not in grouped:
            waiting[scans[mark].cell][scans[mark].patient].append(mark)
    new_groups = []
    for cell in sorted(waiting):
        patients = sorted(waiting[cell])
        for start in range(0, len(patients) - min_patients + 1, min_patients):
            members = patients[start : start + min_patients]
            new_groups.append(ReleaseGroup(cell, {patient: waiting[cell][patient] for patient in members}))
    return new_groups
