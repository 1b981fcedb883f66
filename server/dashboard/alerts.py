"""What needs the operator's attention: one function a check."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from enum import StrEnum
from typing import NamedTuple

from server.dashboard.render import format_duration_or_dash
from server.dashboard.trend import summarise_trend
from server.ledger import views
from server.ledger.ledger import Ledger
from server.ledger.reader import Row
from server.monitoring.health import CentreHealth, CentreState
from server.monitoring.run_history import ScoreHistory, load_last_events
from server.monitoring.run_status import CurrentStatus
from server.reporting.labels import View, format_number_or_dash, label_metric
from server.run.operator_commands import ACTIVE_STATUSES

SCORE_DROP_THRESHOLD = 0.05  # of the worst centre's metric
EXPIRY_WARNING_DAYS = 30
EPSILON_WARNING_FRACTION = 0.8  # of the limit
NUM_EVENTS_READ = 5  # the event that ended a run is among the last ones


class AlertLevel(StrEnum):
    """How urgent an alert is."""

    FAULT = "fault"
    WARNING = "warning"


STATUS_LEVELS = {"failed": AlertLevel.FAULT}
STATE_LEVELS = {CentreState.OFFLINE: AlertLevel.FAULT, CentreState.DEGRADED: AlertLevel.WARNING}


class Alert(NamedTuple):
    """Something that needs the operator's attention."""

    level: AlertLevel
    text: str


def sort_alerts(alerts: Iterable[Alert]) -> list[Alert]:
    """Return the alerts with faults first."""
    return sorted(alerts, key=lambda alert: alert.level is not AlertLevel.FAULT)


def collect_run_alerts(
    ledger: Ledger,
    row: Row,
    status: CurrentStatus,
    centres: Sequence[CentreHealth],
    history: ScoreHistory,
) -> list[Alert]:
    """Return everything that needs attention in a run."""
    return [
        *check_run_status(ledger, row),
        *check_centres_online(status, centres),
        *list_excluded_centres(status),
        *check_slow_centres(status),
        *check_round_timeout(status),
        *check_epsilon_limits(ledger, row, centres),
        *check_score_drop(status, history),
        *check_reports(centres),
    ]


def check_run_status(ledger: Ledger, row: Row) -> list[Alert]:
    """Report a run that was paused or stopped, or that failed, and why."""
    status = row["status"]
    if status == "finished" or status in ACTIVE_STATUSES:
        return []
    reason = ""
    for event in load_last_events(ledger, row["id"], NUM_EVENTS_READ):
        if event["kind"] == status:
            reason = event["detail"]
    text = f"The run is {status}"
    if reason:
        text += f": {reason}"
    return [Alert(STATUS_LEVELS.get(status, AlertLevel.WARNING), text)]


def check_centres_online(status: CurrentStatus, centres: Sequence[CentreHealth]) -> list[Alert]:
    """Report each centre that is offline or degraded, unless an operator excluded it."""
    alerts = []
    for centre in centres:
        if centre.state is CentreState.ONLINE or centre.centre in status.excluded:
            continue
        text = f"{centre.centre} is {centre.state}: {centre.reason}"
        alerts.append(Alert(STATE_LEVELS[centre.state], text))
    return alerts


def list_excluded_centres(status: CurrentStatus) -> list[Alert]:
    """Report each centre that an operator excluded."""
    alerts = []
    for centre, author_and_reason in status.excluded.items():
        alerts.append(Alert(AlertLevel.WARNING, f"{centre} is excluded by {author_and_reason}"))
    return alerts


def check_slow_centres(status: CurrentStatus) -> list[Alert]:
    """Report each centre that takes much longer than it usually does."""
    alerts = []
    for name, centre in status.centres.items():
        if centre.is_slow and centre.seconds and centre.median_seconds:
            elapsed = format_duration_or_dash(centre.seconds)
            factor = centre.seconds / centre.median_seconds
            text = f"{name} has been {centre.activity} for {elapsed}, {factor:.1f} times its own median"
            alerts.append(Alert(AlertLevel.WARNING, text))
    return alerts


def check_round_timeout(status: CurrentStatus) -> list[Alert]:
    """Report a round that should have ended by now."""
    elapsed = (datetime.now(UTC) - status.since).total_seconds()
    excess = elapsed - status.round_timeout
    if not status.waiting_for or excess <= 0:
        return []
    timeout = format_duration_or_dash(status.round_timeout)
    text = f"The round has exceeded its timeout of {timeout} by {format_duration_or_dash(excess)}"
    return [Alert(AlertLevel.FAULT, text)]


def check_epsilon_limits(ledger: Ledger, row: Row, centres: Sequence[CentreHealth]) -> list[Alert]:
    """Report each centre whose patients' privacy budget is nearly spent."""
    if row["config"].get("privacy", {}).get("dp_level", "none") == "none":
        return []
    limits = {centre.centre: centre.report.epsilon_limit for centre in centres if centre.report}
    alerts = []
    for contribution in views.last_accepted(ledger, row["id"]):
        name, epsilon = contribution["centre"], contribution["epsilon"]
        limit = limits.get(name)
        if epsilon is not None and limit and epsilon >= EPSILON_WARNING_FRACTION * limit:
            text = f"{name} has spent epsilon {epsilon:.2f} of the {limit:g} that its policy allows"
            alerts.append(Alert(AlertLevel.WARNING, text))
    return alerts


def check_score_drop(status: CurrentStatus, history: ScoreHistory) -> list[Alert]:
    """Report that the worst centre has become markedly worse while the run is active."""
    trend = summarise_trend(history)
    if trend is None or not status.is_active:
        return []
    change = trend.changes[View.WORST]
    if change is None or change >= -SCORE_DROP_THRESHOLD:
        return []
    drop = format_number_or_dash(-change)
    metric = label_metric(history.metric)
    return [Alert(AlertLevel.WARNING, f"The worst centre's {metric} fell by {drop} in the last rounds")]


def check_reports(centres: Sequence[CentreHealth]) -> list[Alert]:
    """Report each centre that said something of itself that cannot be shown."""
    alerts = []
    for centre in centres:
        if centre.report and centre.report.unusable_fields:
            fields = ", ".join(centre.report.unusable_fields)
            text = f"{centre.centre} reported values that are not valid and are not shown: {fields}"
            alerts.append(Alert(AlertLevel.WARNING, text))
    return alerts


def check_certificates(expiries: Mapping[str, datetime]) -> list[Alert]:
    """Report each certificate that needs to be renewed. `expiries` is {certificate: when it expires}."""
    alerts = []
    for name, expiry in expiries.items():
        days_left = (expiry - datetime.now(UTC)).days
        if days_left < EXPIRY_WARNING_DAYS:
            alerts.append(Alert(AlertLevel.WARNING, f"The {name}'s certificate expires in {days_left} days"))
    return alerts
