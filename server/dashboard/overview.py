"""What the first page shows: the latest run and its centres at a glance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple

import numpy as np

from common.config.parse import parse_config
from common.learning.losses import class_names
from common.utils.errors import ConsiliumError
from server.dashboard.alerts import (
    Alert,
    AlertLevel,
    check_certificates,
    collect_run_alerts,
    sort_alerts,
)
from server.dashboard.console import NodeLister
from server.dashboard.trend import summarise_trend
from server.ledger.ledger import Ledger
from server.ledger.reader import Row
from server.monitoring.health import CentreHealth, CentreState, SuperLinkNode, centre_health
from server.monitoring.run_history import ScoreHistory
from server.monitoring.run_status import current_status, estimate_progress
from server.run.operator_commands import ACTIVE_STATUSES

STATE_ORDER = (CentreState.OFFLINE, CentreState.DEGRADED, CentreState.ONLINE)


class ScanCounts(NamedTuple):
    """Scans by class of one task, over all splits."""

    classes: list[str]  # the last is "unlabelled"
    by_centre: dict[str, list[float]]  # only centres that reported them


class NodeListing(NamedTuple):
    """The SuperLink's nodes, or why they are unknown."""

    nodes: list[SuperLinkNode] | None  # None: a simulation, or the SuperLink cannot be asked
    alerts: list[Alert]


def no_run_view(ledger: Ledger, list_nodes: NodeLister | None) -> dict[str, Any]:
    """Return what the first page shows before the first run."""
    listing = try_list_nodes(list_nodes)
    return {"centres": centre_health(ledger, "", listing.nodes), "alerts": listing.alerts}


def try_list_nodes(list_nodes: NodeLister | None) -> NodeListing:
    """Ask the SuperLink for its nodes; a failure becomes an alert."""
    if list_nodes is None:
        return NodeListing(None, [])
    try:
        return NodeListing(list_nodes(), [])
    except ConsiliumError as error:
        return NodeListing(None, [Alert(AlertLevel.WARNING, str(error))])


def federation_view(
    ledger: Ledger,
    row: Row,
    history: ScoreHistory,
    list_nodes: NodeLister | None,
    certificate_expiries: Mapping[str, datetime],
) -> dict[str, Any]:
    """Return what the first page shows of the latest run."""
    listing = try_list_nodes(list_nodes)
    status = current_status(ledger, row)
    centres = centre_health(ledger, row["id"], listing.nodes)
    run_alerts = collect_run_alerts(ledger, row, status, centres, history)
    certificate_alerts = check_certificates(certificate_expiries)
    return {
        "status": status,
        "progress": estimate_progress(ledger, row, status),
        "centres": sorted(centres, key=lambda centre: STATE_ORDER.index(centre.state)),
        "num_online": [centre.state for centre in centres].count(CentreState.ONLINE),
        "scan_counts": count_scans_by_class(row, centres),
        "trend": summarise_trend(history),
        "alerts": sort_alerts([*listing.alerts, *run_alerts, *certificate_alerts]),
        "certificate_expiries": certificate_expiries,
        "other_runs": list_other_active_runs(ledger, row["id"]),
    }


def count_scans_by_class(row: Row, centres: Sequence[CentreHealth]) -> ScanCounts:
    """Count each centre's scans by class of the task that the run is judged by, over all splits."""
    config = parse_config(row["config"])
    task = config.evaluation.task
    classes = [*map(str, class_names(task, config.tasks[task])), "unlabelled"]
    by_centre: dict[str, list[float]] = {}
    for centre in centres:
        if centre.report is None:
            continue
        counts = list(centre.report.task_counts(task).values())
        if counts and len(counts[0]) == len(classes):
            by_centre[centre.centre] = np.sum(counts, axis=0).tolist()
    return ScanCounts(classes, by_centre)


def list_other_active_runs(ledger: Ledger, run_id: str) -> list[Row]:
    """Return the active runs other than this one."""
    active = [row for row in ledger.read_runs() if row["status"] in ACTIVE_STATUSES]
    return [row for row in active if row["id"] != run_id]
