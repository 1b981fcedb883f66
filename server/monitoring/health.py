"""The health of each centre: online, degraded or offline, with the reason and when it was last seen.

In a deployment the SuperLink's heartbeats tell who is connected (server/operations/superlink.py). In a
simulation a centre was last seen when it last replied. A connected centre whose reply was refused or left out
is degraded until a contribution of it is accepted again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from common.utils.errors import RefusalCode
from server.ledger.ledger import Ledger
from server.ledger.reader import Row
from server.ledger.views import last_accepted, last_failures
from server.monitoring.centre_reports import CentreReport, load_centre_reports
from server.monitoring.run_info import list_expected_centres
from server.reporting.ledger_records import index_rows


class CentreState(StrEnum):
    """How a centre is."""

    ONLINE = "online"
    DEGRADED = "degraded"
    OFFLINE = "offline"


@dataclass(frozen=True)
class SuperLinkNode:
    """A centre as the SuperLink knows it."""

    centre: str
    is_online: bool
    status_since: datetime | None  # when its connection began or ended; None: it has never connected
    last_seen: datetime | None  # its last heartbeat, to the minute


@dataclass(frozen=True)
class CentreHealth:
    """A centre's state, and why it is not online."""

    centre: str
    state: CentreState
    reason: str  # empty: online
    last_seen: datetime | None
    connected_since: datetime | None = None  # without a break; None: not connected, or a simulation
    report: CentreReport | None = None  # None: it has not joined the run


@dataclass(frozen=True)
class _Evidence:
    """What is known about a centre."""

    centre: str
    report: CentreReport | None = None
    last_accepted: Row | None = None
    last_failure: Row | None = None
    node: SuperLinkNode | None = None

    @property
    def last_success(self) -> datetime | None:
        times = []
        if self.report and self.report.joined_at:
            times.append(self.report.joined_at)
        if self.last_accepted:
            times.append(self.last_accepted["closed_at"])
        return max(times, default=None)

    @property
    def current_failure(self) -> Row | None:
        """Return the last failure, unless a success followed it."""
        failure, success = self.last_failure, self.last_success
        if failure and success and failure["time"] <= success:
            return None
        return failure

    @property
    def last_heard(self) -> datetime | None:
        """Return when the centre last replied, be it with something that could not be used."""
        failure = self.current_failure
        if failure is None or _is_silence(failure):
            return self.last_success
        failed_at: datetime = failure["time"]  # after the last success
        return failed_at


def centre_health(
    ledger: Ledger, run_id: str = "", nodes: Sequence[SuperLinkNode] | None = None
) -> list[CentreHealth]:
    """Return the health of every centre of a run, or of the SuperLink where there is no run.

    `nodes` is None in a simulation.
    """
    assess = _assess_simulated if nodes is None else _assess_deployed
    return [assess(evidence) for evidence in _gather_evidence(ledger, run_id, nodes or [])]


def _gather_evidence(ledger: Ledger, run_id: str, nodes: Sequence[SuperLinkNode]) -> list[_Evidence]:
    """Return the evidence on each centre: first those that the run expects, then others."""
    node_by_centre = {node.centre: node for node in nodes}
    run = ledger.read_run(run_id)
    if run is None:
        return [_Evidence(name, node=node) for name, node in node_by_centre.items()]
    reports = load_centre_reports(ledger, run_id)
    accepted = index_rows(last_accepted(ledger, run_id), "centre")
    failures = index_rows(last_failures(ledger, run_id), "centre")
    evidence = []
    for name in dict.fromkeys([*list_expected_centres(run), *reports, *node_by_centre]):
        evidence.append(
            _Evidence(
                name,
                report=reports.get(name),
                last_accepted=accepted.get(name),
                last_failure=failures.get(name),
                node=node_by_centre.get(name),
            )
        )
    return evidence


def _assess_deployed(evidence: _Evidence) -> CentreHealth:
    """Assess a centre by its connection to the SuperLink, then by its replies."""
    node, failure = evidence.node, evidence.current_failure
    if node is None:
        reason = "unknown to the SuperLink; admit it with `consilium-server admit`"
        return _make_health(evidence, CentreState.OFFLINE, reason, evidence.last_heard)
    if node.status_since is None:
        return _make_health(evidence, CentreState.OFFLINE, "it has never connected", node.last_seen)
    if not node.is_online:
        return _make_health(evidence, CentreState.OFFLINE, "no heartbeat", node.last_seen)
    if failure:
        state, reason = CentreState.DEGRADED, failure["detail"]
        return _make_health(evidence, state, reason, node.last_seen, node.status_since)
    return _make_health(evidence, CentreState.ONLINE, "", node.last_seen, node.status_since)


def _assess_simulated(evidence: _Evidence) -> CentreHealth:
    """Assess a centre by its replies alone."""
    failure = evidence.current_failure
    if failure and _is_silence(failure):
        return _make_health(evidence, CentreState.OFFLINE, failure["detail"], evidence.last_heard)
    if failure:
        return _make_health(evidence, CentreState.DEGRADED, failure["detail"], evidence.last_heard)
    if evidence.last_success is None:
        return _make_health(evidence, CentreState.OFFLINE, "it has not replied in this run", None)
    return _make_health(evidence, CentreState.ONLINE, "", evidence.last_heard)


def _make_health(
    evidence: _Evidence,
    state: CentreState,
    reason: str,
    last_seen: datetime | None,
    connected_since: datetime | None = None,
) -> CentreHealth:
    return CentreHealth(evidence.centre, state, reason, last_seen, connected_since, evidence.report)


def _is_silence(failure: Row) -> bool:
    """Return whether the centre did not reply at all."""
    return bool(failure["code"] == RefusalCode.OFFLINE)
