"""What each centre reported of itself when it joined a run, as the ledger keeps it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from common.config.names import MAX_LIST_LENGTH, MAX_TEXT_LENGTH
from common.config.schema import Config
from common.learning.losses import class_names
from common.protocol.sum_key import LabelCountKey
from server.ledger.ledger import Ledger
from server.run.reply_fields import (
    MAX_ENTRIES,
    MAX_SENTENCE_LENGTH,
    BadReply,
    require_counts_by_name,
    require_number,
    require_settings,
    require_text,
    require_texts,
)


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
    unusable_fields: list[str] = field(default_factory=list)  # what it reported, and cannot be shown

    @property
    def num_skipped(self) -> int:
        """Return how many scans could not be read."""
        return sum(self.skipped.values())

    @property
    def epsilon_limit(self) -> float | None:
        """Return the privacy loss that the policy allows each patient over all runs; None: no limit."""
        limit = self.policy.get("epsilon")
        if isinstance(limit, bool) or not isinstance(limit, int | float):
            return None
        return float(limit)

    def task_counts(self, task: str) -> dict[LabelCountKey, list[float]]:
        """Return the label counts of one task, by cohort and split."""
        counts = {}
        for text, scans in self.counts.items():
            key = LabelCountKey.parse(text)
            if key.task == task:
                counts[key] = scans
        return counts


def _require_label_counts(field_name: str, counts: object) -> None:
    """Require {LabelCountKey as text: numbers of scans}, as many for each key of a task."""
    if not isinstance(counts, dict):
        raise BadReply(f"{field_name} is not a dict")
    lengths: dict[str, int] = {}
    for text, scans in counts.items():
        if not isinstance(text, str) or text.count("/") != 2 or not isinstance(scans, list):
            raise BadReply(f"{field_name} has an entry of another form")
        for number in scans:
            require_number(field_name, number)
        if lengths.setdefault(LabelCountKey.parse(text).task, len(scans)) != len(scans):
            raise BadReply(f"{field_name} has entries of different lengths")


def _require_named_counts(field_name: str, counts: object) -> None:
    require_counts_by_name(field_name, counts, MAX_ENTRIES, MAX_SENTENCE_LENGTH)


def _require_sources(field_name: str, sources: object) -> None:
    require_texts(field_name, sources, MAX_LIST_LENGTH, MAX_TEXT_LENGTH)


def _require_dict_of_settings(field_name: str, settings: object) -> None:
    if not isinstance(settings, dict):
        raise BadReply(f"{field_name} is not a dict")
    require_settings(field_name, settings)


FIELD_CHECKS: dict[str, Callable[[str, object], None]] = {
    "counts": _require_label_counts,
    "scans": _require_named_counts,
    "skipped": _require_named_counts,
    "sources": _require_sources,
    "versions": _require_dict_of_settings,
    "device": require_text,
    "policy": _require_dict_of_settings,
}


def load_centre_reports(ledger: Ledger, run_id: str) -> dict[str, CentreReport]:
    """Return {centre: what it reported when it last joined}."""
    reports = {}
    for row in ledger.read_centres(run_id):
        reports[row["centre"]] = parse_report(row["metadata"], row["time"])
    return reports


def parse_report(metadata: Mapping[str, object], joined_at: datetime) -> CentreReport:
    """Return a centre's report without the fields whose values cannot be shown.

    The coordinator validates replies since 0.2.0 (server/run/reply_validation.py); an older ledger may hold
    anything.
    """
    report = CentreReport(joined_at=joined_at)
    for name, check in FIELD_CHECKS.items():
        if name not in metadata:
            continue
        try:
            check(name, metadata[name])
        except BadReply:
            report.unusable_fields.append(name)
        else:
            setattr(report, name, metadata[name])
    return report


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
