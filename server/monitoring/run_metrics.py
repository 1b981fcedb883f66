"""The Prometheus metrics of runs: status, rounds, traffic, weights, scores and privacy loss."""

from __future__ import annotations

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from common.config.parse import parse_config
from server.ledger.ledger import Ledger
from server.ledger.reader import Row
from server.ledger.views import LastRound, centre_totals, last_accepted, last_round
from server.reporting.labels import View
from server.reporting.scores import view_value
from server.run.operator_commands import ACTIVE_STATUSES
from server.run.records import parse_task_scores

EXPORTED_METRICS = ("auc", "f1", "sensitivity", "specificity", "balanced_accuracy", "dice", "r2", "loss")


class RunMetrics:
    """Metric families of runs, filled run by run.

    Their names and labels are a stable interface for dashboards and alerts.
    """

    def __init__(self) -> None:
        """Make the families, empty."""
        self.info = make_gauge("run_info", "a run and its status", "run", "recipe", "mode", "status")
        self.active = make_gauge("run_active", "1 while the run is active", "run")
        self.round = make_gauge("run_round", "the last closed round", "run", "stage")
        self.planned = make_gauge("run_rounds_planned", "rounds that the stage has at most", "run", "stage")
        self.progressed = make_gauge(
            "run_progress_timestamp_seconds",
            "when the run last closed a round, or was started or resumed",
            "run",
        )
        self.deadline = make_gauge(
            "round_deadline_seconds", "when a round's training ends at the latest", "run"
        )
        self.round_seconds = make_gauge("round_seconds", "how long the last closed round took", "run")
        self.effective = make_gauge(
            "effective_centres", "1 / sum of the squared weights in the last round", "run", "part"
        )
        self.weight = make_gauge(
            "centre_weight", "the centre's weight in the backbone in the last round", "run", "centre"
        )
        self.epsilon = make_gauge(
            "centre_privacy_epsilon",
            "privacy loss of the centre's patients so far, in this and earlier runs",
            "run",
            "centre",
        )
        self.target = make_gauge(
            "run_privacy_epsilon_target", "the privacy loss that the run was planned for", "run"
        )
        help_text = "on validation after the last round"
        self.score = make_gauge("score", f"{help_text}, over all centres", "run", "task", "view", "metric")
        self.centre_score = make_gauge("centre_score", help_text, "run", "task", "centre", "metric")
        self.sent = CounterMetricFamily(
            "consilium_centre_sent_bytes", "bytes that the centre sent", labels=["run", "centre"]
        )
        self.received = CounterMetricFamily(
            "consilium_centre_received_bytes", "bytes that were sent to the centre", labels=["run", "centre"]
        )
        self.contributions = CounterMetricFamily(
            "consilium_contributions",
            "contributions by what became of them",
            labels=["run", "centre", "outcome"],
        )

    def add_run(self, ledger: Ledger, row: Row) -> None:
        """Add the samples of a run."""
        self._add_plan(row)
        self._add_totals(ledger, row["id"])
        closed = last_round(ledger, row["id"])
        progressed = row["since"]
        if closed:
            progressed = max(progressed, closed.closed_at)
            self._add_last_round(row["id"], closed)
        self.progressed.add_metric([row["id"]], progressed.timestamp())

    def _add_plan(self, row: Row) -> None:
        run_id = row["id"]
        config = parse_config(row["config"])
        self.info.add_metric([run_id, row["recipe"], row["mode"], row["status"]], 1)
        self.active.add_metric([run_id], row["status"] in ACTIVE_STATUSES)
        self.deadline.add_metric([run_id], config.federation.round_timeout)
        if config.privacy.epsilon:
            self.target.add_metric([run_id], config.privacy.epsilon)
        for name, stage in config.stages.items():
            self.planned.add_metric([run_id, name], stage.rounds)

    def _add_totals(self, ledger: Ledger, run_id: str) -> None:
        for total in centre_totals(ledger, run_id):
            centre = total["centre"]
            self.sent.add_metric([run_id, centre], total["bytes_up"])
            self.received.add_metric([run_id, centre], total["bytes_down"])
            self.contributions.add_metric([run_id, centre, "used"], total["accepted"])
            self.contributions.add_metric([run_id, centre, "left_out"], total["left_out"])
        for accepted in last_accepted(ledger, run_id):
            if accepted["epsilon"] is not None:
                self.epsilon.add_metric([run_id, accepted["centre"]], accepted["epsilon"])

    def _add_last_round(self, run_id: str, closed: LastRound) -> None:
        self.round.add_metric([run_id, closed.round["stage"]], closed.round["round"])
        self.round_seconds.add_metric([run_id], closed.round["seconds"])
        for weights in closed.group_weights:
            self.effective.add_metric([run_id, weights["group"]], weights["effective_centres"])
            if weights["group"] == "backbone":
                for centre, weight in weights["centre_weights"].items():
                    self.weight.add_metric([run_id, centre], weight)
        for scores in closed.scores:
            self._add_scores(run_id, scores)

    def _add_scores(self, run_id: str, row: Row) -> None:
        """Add the defined scores of one task."""
        task = row["task"]
        scores = parse_task_scores(row)
        for metric in EXPORTED_METRICS:
            for view in View:
                value = view_value(scores, view, metric).value
                if value is not None:
                    self.score.add_metric([run_id, task, view, metric], value)
            for centre, centre_scores in scores.centres.items():
                value = centre_scores.get_metric(metric)
                if value is not None:
                    self.centre_score.add_metric([run_id, task, centre, metric], value)

    def list_families(self) -> list[Metric]:
        """Return all metric families."""
        return list(vars(self).values())


def make_gauge(name: str, help_text: str, *labels: str) -> GaugeMetricFamily:
    """Return an empty gauge with our prefix."""
    return GaugeMetricFamily(f"consilium_{name}", help_text, labels=labels)
