"""The coordinator's metrics for Prometheus, read from the ledger whenever they are asked for: nothing is counted twice, nothing lost by a restart.

Every run that has not ended is shown, and the newest one. What is undefined has no sample, rather than a zero. Labels name centres, runs and tasks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from datetime import datetime
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from common.protocol.code_fingerprint import fingerprint_code
from common.utils.errors import ConsiliumError
from server.ledger import views
from server.ledger.ledger import Ledger, Row
from server.monitoring.health import SuperLinkNode, centre_health

ENDED_STATUSES = ("finished", "failed")
CENTRE_STATES = ("online", "degraded", "offline")
EXPORTED_METRICS = ("auc", "f1", "sensitivity", "specificity", "balanced_accuracy", "dice", "r2", "loss")


def render_metrics(
    ledger: Ledger,
    list_nodes: Callable[[], list[SuperLinkNode]] | None = None,
    certificate_expiries: dict[str, datetime] | None = None,
) -> bytes:
    """All metrics in Prometheus' text format 0.0.4. `nodes`: asks the SuperLink (server/operations/superlink.py), None in a simulation; `certificates`:
    {"coordinator", "authority": when it expires}."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(ConsiliumCollector(ledger, list_nodes, certificate_expiries or {}))
    return generate_latest(registry)


class ConsiliumCollector(Collector):
    """The collector, for a registry of one's own."""

    def __init__(
        self,
        ledger: Ledger,
        list_nodes: Callable[[], list[SuperLinkNode]] | None = None,
        certificate_expiries: dict[str, datetime] | None = None,
    ) -> None:
        self.ledger, self.list_nodes, self.certificate_expiries = (
            ledger,
            list_nodes,
            certificate_expiries or {},
        )

    def collect(self) -> Iterator[Metric]:
        """A ledger that cannot be read is a metric, not an error: what watches must not be what breaks."""
        up = _make_gauge("ledger_up", "1 where the ledger can be read")
        try:
            found = list(self._collect_metrics())
        except ConsiliumError:
            found = []
            up.add_metric([], 0)
        else:
            up.add_metric([], 1)
        yield from [up, *found]

    def _collect_metrics(self) -> Iterator[Metric]:
        build = _make_gauge("build_info", "the code of the coordinator", "fingerprint")
        build.add_metric([fingerprint_code()], 1)
        yield build
        until = _make_gauge(
            "certificate_expiry_timestamp_seconds", "when a certificate expires", "certificate"
        )
        for name, when in self.certificate_expiries.items():
            until.add_metric([name], when.timestamp())
        yield until
        rows = self.ledger.read_runs()
        status = _make_gauge("runs", "runs by their status", "status")
        for name, n in Counter(row["status"] for row in rows).items():
            status.add_metric([name], n)
        yield status
        shown = [row for row in rows if row["status"] not in ENDED_STATUSES or row is rows[-1]]
        yield from collect_centre_metrics(self.ledger, shown[-1]["id"] if shown else "", self.list_nodes)
        yield from collect_run_metrics(self.ledger, shown)


def collect_centre_metrics(
    ledger: Ledger, run_id: str, list_nodes: Callable[[], list[SuperLinkNode]] | None
) -> Iterator[Metric]:
    """Who is there, by the newest run shown."""
    reached = _make_gauge(
        "superlink_up", "1 where the SuperLink says who is connected; absent in a simulation"
    )
    nodes = None
    if list_nodes:
        try:
            nodes = list_nodes()
        except ConsiliumError:
            reached.add_metric([], 0)
        else:
            reached.add_metric([], 1)
        yield reached
    up = _make_gauge(
        "centre_up", "1: connected (deployed), or answered when last asked (simulation)", "centre"
    )
    state = _make_gauge("centre_state", "1 for the state that the centre is in", "centre", "state")
    seen = _make_gauge("centre_last_seen_timestamp_seconds", "when the centre was last heard of", "centre")
    scans = _make_gauge("centre_scans", "scans ready at the centre", "centre", "split")
    lost = _make_gauge("centre_scans_unreadable", "scans that the centre could not read", "centre")
    limit = _make_gauge(
        "centre_privacy_epsilon_limit",
        "the privacy loss that the centre's policy allows its patients over all runs",
        "centre",
    )
    for one in centre_health(ledger, run_id, nodes):
        up.add_metric([one.centre], one.state != "offline")
        for name in CENTRE_STATES:
            state.add_metric([one.centre, name], one.state == name)
        if one.last_seen:
            seen.add_metric([one.centre], one.last_seen.timestamp())
        for split, n in one.metadata.get("scans", {}).items():
            scans.add_metric([one.centre, split], n)
        if one.metadata:
            lost.add_metric([one.centre], sum(one.metadata.get("skipped", {}).values()))
        if epsilon := one.metadata.get("policy", {}).get("epsilon"):
            limit.add_metric([one.centre], epsilon)
    yield from (up, state, seen, scans, lost, limit)


def collect_run_metrics(ledger: Ledger, run_rows: list[Row]) -> Iterator[Metric]:
    """How the runs go."""
    info = _make_gauge("run_info", "a run and its status", "run", "recipe", "mode", "status")
    active = _make_gauge("run_active", "1 while the run goes on", "run")
    number = _make_gauge("run_round", "the last closed round", "run", "stage")
    planned = _make_gauge("run_rounds_planned", "rounds that the stage has at most", "run", "stage")
    moved = _make_gauge(
        "run_progress_timestamp_seconds", "when the run last closed a round, or was started or resumed", "run"
    )
    deadline = _make_gauge("round_deadline_seconds", "when a round's training ends at the latest", "run")
    lasted = _make_gauge("round_seconds", "how long the last closed round took", "run")
    effective = _make_gauge(
        "effective_centres", "1 / sum of the squared weights in the last round", "run", "part"
    )
    weight = _make_gauge(
        "centre_weight", "the centre's share of the backbone in the last round", "run", "centre"
    )
    spent = _make_gauge(
        "centre_privacy_epsilon",
        "what the centre's patients have lost so far, in this and earlier runs",
        "run",
        "centre",
    )
    target = _make_gauge("run_privacy_epsilon_target", "the privacy loss that the run was planned for", "run")
    overall = _make_gauge(
        "score", "on validation after the last round, over all centres", "run", "task", "view", "metric"
    )
    own = _make_gauge("centre_score", "on validation after the last round", "run", "task", "centre", "metric")
    sent = CounterMetricFamily(
        "consilium_centre_sent_bytes", "bytes that the centre sent", labels=["run", "centre"]
    )
    got = CounterMetricFamily(
        "consilium_centre_received_bytes", "bytes that were sent to the centre", labels=["run", "centre"]
    )
    given = CounterMetricFamily(
        "consilium_contributions", "contributions by what became of them", labels=["run", "centre", "outcome"]
    )
    for row in run_rows:
        run, config = row["id"], row["config"]
        info.add_metric([run, row["recipe"], row["mode"], row["status"]], 1)
        active.add_metric([run], row["status"] in ("started", "resumed"))
        deadline.add_metric([run], config["federation"]["deadline"])
        if config["privacy"]["epsilon"]:
            target.add_metric([run], config["privacy"]["epsilon"])
        for name, stage in config["stages"].items():
            planned.add_metric([run, name], stage["rounds"])
        for of in views.centre_totals(ledger, run):
            sent.add_metric([run, of["centre"]], of["bytes_up"])
            got.add_metric([run, of["centre"]], of["bytes_down"])
            given.add_metric([run, of["centre"], "used"], of["used"])
            given.add_metric([run, of["centre"], "left_out"], of["left_out"])
        for of in views.last_accepted(ledger, run):
            if of["epsilon"] is not None:
                spent.add_metric([run, of["centre"]], of["epsilon"])
        last = views.last_round(ledger, run)
        moved.add_metric([run], max([row["since"], *([last["round"]["closed"]] if last else [])]).timestamp())
        if not last:
            continue
        number.add_metric([run, last["round"]["stage"]], last["round"]["round"])
        lasted.add_metric([run], last["round"]["seconds"])
        for of in last["shares"]:
            effective.add_metric([run, of["part"]], of["effective"])
            for centre, share in of["weights"].items() if of["part"] == "backbone" else []:
                weight.add_metric([run, centre], share)
        for of in last["scores"]:
            for view, metric, value in _defined_view_scores(of["views"]):
                overall.add_metric([run, of["task"], view, metric], value)
            for centre, values in of["centres"].items():
                for metric in EXPORTED_METRICS:
                    if isinstance(values.get(metric), int | float):
                        own.add_metric([run, of["task"], centre, metric], values[metric])
    yield from (
        info,
        active,
        number,
        planned,
        moved,
        deadline,
        lasted,
        effective,
        weight,
        spent,
        target,
        overall,
        own,
        sent,
        got,
        given,
    )


def _defined_view_scores(views: dict[str, Any]) -> Iterator[tuple[str, str, float]]:
    """(view, metric, value) of what is defined."""
    for view in ("macro", "pooled", "worst", "spread"):
        for metric in EXPORTED_METRICS:
            said = views.get(view, {}).get(metric)
            value = said.get("value") if isinstance(said, dict) else said
            if isinstance(value, int | float):
                yield view, metric, float(value)


def _make_gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"consilium_{name}", text, labels=labels)
