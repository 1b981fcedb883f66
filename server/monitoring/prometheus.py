"""The coordinator's metrics for Prometheus, read from the ledger on every scrape.

Nothing is counted twice, and a restart loses nothing. Every run that has not ended is shown, and the newest
one. What is undefined has no sample rather than a zero. Labels name centres, runs and tasks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import datetime

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from common.protocol.code_fingerprint import fingerprint_code
from common.utils.errors import ConsiliumError
from server.ledger.ledger import Ledger
from server.ledger.reader import Row
from server.monitoring.health import CentreHealth, CentreState, SuperLinkNode, centre_health
from server.monitoring.run_metrics import RunMetrics, make_gauge

ENDED_STATUSES = ("finished", "failed")
NodeLister = Callable[[], list[SuperLinkNode]]


def render_metrics(
    ledger: Ledger,
    list_nodes: NodeLister | None = None,
    certificate_expiries: Mapping[str, datetime] | None = None,
) -> bytes:
    """Return all metrics in Prometheus' text format 0.0.4.

    Args:
        ledger: the coordinator's ledger.
        list_nodes: asks the SuperLink for its nodes (server/operations/superlink.py); None in a simulation.
        certificate_expiries: {"coordinator" or "authority": when its certificate expires}.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(ConsiliumCollector(ledger, list_nodes, certificate_expiries))
    return generate_latest(registry)


class ConsiliumCollector(Collector):
    """Collects the metrics for a registry of `prometheus_client`."""

    def __init__(
        self,
        ledger: Ledger,
        list_nodes: NodeLister | None = None,
        certificate_expiries: Mapping[str, datetime] | None = None,
    ) -> None:
        """Prepare to collect; the arguments are those of `render_metrics`."""
        self.ledger = ledger
        self.list_nodes = list_nodes
        self.certificate_expiries = certificate_expiries or {}

    def collect(self) -> Iterator[Metric]:
        """Return the metrics. An unreadable ledger is a metric too: monitoring must not fail with it."""
        ledger_up = make_gauge("ledger_up", "1 where the ledger can be read")
        try:
            metrics = list(self._collect_metrics())
        except ConsiliumError:
            metrics = []
            ledger_up.add_metric([], 0)
        else:
            ledger_up.add_metric([], 1)
        yield from [ledger_up, *metrics]

    def _collect_metrics(self) -> Iterator[Metric]:
        build = make_gauge("build_info", "the code of the coordinator", "fingerprint")
        build.add_metric([fingerprint_code()], 1)
        yield build
        expiry = make_gauge(
            "certificate_expiry_timestamp_seconds", "when a certificate expires", "certificate"
        )
        for name, time in self.certificate_expiries.items():
            expiry.add_metric([name], time.timestamp())
        yield expiry
        rows = self.ledger.read_runs()
        status = make_gauge("runs", "runs by their status", "status")
        for name, count in Counter(row["status"] for row in rows).items():
            status.add_metric([name], count)
        yield status
        shown = _select_shown_runs(rows)
        newest_run_id = ""
        if shown:
            newest_run_id = shown[-1]["id"]
        yield from collect_centre_metrics(self.ledger, newest_run_id, self.list_nodes)
        yield from collect_run_metrics(self.ledger, shown)


def _select_shown_runs(rows: list[Row]) -> list[Row]:
    return [row for row in rows if row["status"] not in ENDED_STATUSES or row is rows[-1]]


def collect_run_metrics(ledger: Ledger, run_rows: list[Row]) -> list[Metric]:
    """Return the metrics of these runs."""
    metrics = RunMetrics()
    for row in run_rows:
        metrics.add_run(ledger, row)
    return metrics.list_families()


def collect_centre_metrics(ledger: Ledger, run_id: str, list_nodes: NodeLister | None) -> Iterator[Metric]:
    """Return the metrics of the SuperLink and of the centres.

    The centres are those of one run or, where there is none, of the SuperLink.
    """
    nodes = None
    if list_nodes:
        superlink_up = make_gauge(
            "superlink_up", "1 where the SuperLink says who is connected; absent in a simulation"
        )
        try:
            nodes = list_nodes()
        except ConsiliumError:
            superlink_up.add_metric([], 0)
        else:
            superlink_up.add_metric([], 1)
        yield superlink_up
    centres = centre_health(ledger, run_id, nodes)
    yield from _state_metrics(centres)
    yield from _report_metrics(centres)


def _state_metrics(centres: list[CentreHealth]) -> list[Metric]:
    up = make_gauge("centre_up", "1: connected (deployed), or replied when last asked (simulation)", "centre")
    state = make_gauge("centre_state", "1 for the state that the centre is in", "centre", "state")
    last_seen = make_gauge(
        "centre_last_seen_timestamp_seconds", "when the centre last gave a sign of life", "centre"
    )
    for centre in centres:
        up.add_metric([centre.centre], centre.state is not CentreState.OFFLINE)
        for name in CentreState:
            state.add_metric([centre.centre, name], centre.state is name)
        if centre.last_seen:
            last_seen.add_metric([centre.centre], centre.last_seen.timestamp())
    return [up, state, last_seen]


def _report_metrics(centres: list[CentreHealth]) -> list[Metric]:
    """Return what the centres reported when they joined."""
    scans = make_gauge("centre_scans", "scans ready at the centre", "centre", "split")
    unreadable = make_gauge("centre_scans_unreadable", "scans that the centre could not read", "centre")
    limit = make_gauge(
        "centre_privacy_epsilon_limit",
        "the privacy loss that the centre's policy allows its patients over all runs",
        "centre",
    )
    for centre in centres:
        if centre.report is None:
            continue
        for split, count in centre.report.scans.items():
            scans.add_metric([centre.centre, split], count)
        unreadable.add_metric([centre.centre], centre.report.num_skipped)
        if centre.report.epsilon_limit:
            limit.add_metric([centre.centre], centre.report.epsilon_limit)
    return [scans, unreadable, limit]
