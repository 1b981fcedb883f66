"""What each centre reported of itself when it joined a run, as the ledger keeps it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from pydantic import TypeAdapter

from common.config.schema import Config
from common.learning.losses import class_names
from common.protocol.sum_key import LabelCountKey
from server.ledger.ledger import Ledger


@dataclass
class CentreReport:
    """A centre's data, software and policy."""

    counts: dict[str, list[float]] = field(
        default_factory=dict
    )  # {LabelCountKey as text: scans per class [K + 1]}
    scans: dict[str, int] = field(default_factory=dict)  # {split: scans that are ready}
    skipped: dict[str, int] = field(default_factory=dict)  # {reason: scans that could not be read}
    sources: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)  # {package: version}
    device: str = ""
    policy: dict[str, Any] = field(default_factory=dict)  # as in policy.yaml; {}: everything is allowed
    joined_at: datetime | None = None

    @property
    def num_skipped(self) -> int:
        """Return how many scans could not be read."""
        return sum(self.skipped.values())

    @property
    def epsilon_limit(self) -> float | None:
        """Return the privacy loss that the policy allows each patient over all runs; None: no limit."""
        limit: float | None = self.policy.get("epsilon")
        return limit

    def task_counts(self, task: str) -> dict[LabelCountKey, list[float]]:
        """Return the label counts of one task, by cohort and split."""
        counts = {}
        for text, scans in self.counts.items():
            key = LabelCountKey.parse(text)
            if key.task == task:
                counts[key] = scans
        return counts


_report = TypeAdapter(CentreReport)


def load_centre_reports(ledger: Ledger, run_id: str) -> dict[str, CentreReport]:
    """Return {centre: what it reported when it last joined}."""
    reports = {}
    for row in ledger.read_centres(run_id):
        reports[row["centre"]] = _report.validate_python({**row["metadata"], "joined_at": row["time"]})
    return reports


def list_sources(reports: Iterable[CentreReport]) -> set[str]:
    """Return the sources of all centres' scans."""
    sources: set[str] = set()
    for report in reports:
        sources |= set(report.sources)
    return sources


def select_known_counts(report: CentreReport, config: Config) -> dict[str, list[float]]:
    """Return a centre's label counts for the tasks whose classes are known; those of a clustering are not."""
    counts = {}
    for text, scans in report.counts.items():
        task = LabelCountKey.parse(text).task
        if task in config.tasks and len(scans) == len(class_names(task, config.tasks[task])) + 1:
            counts[text] = scans
    return counts
