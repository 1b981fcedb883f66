"""Reading of scores: one centre's metrics, a view over centres, and the task and metric to show first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from common.config.schema import EvaluationConfig
from common.learning.metrics import primary_metric
from server.reporting.labels import METRIC_COLUMNS, View
from server.run.records import CentreScores, Metrics, TaskScores


class TaskMetric(NamedTuple):
    """A task and one of its metrics."""

    task: str
    metric: str


class ViewValue(NamedTuple):
    """A metric over all centres; `centre` names the worst one, and is empty for other views."""

    value: float | None
    centre: str = ""


def centre_metrics(scores: CentreScores) -> Metrics:
    """Return a centre's metrics, its loss among them where it is known."""
    if scores.loss is None:
        return scores.metrics
    return scores.metrics | {"loss": scores.loss}


def view_metrics(scores: TaskScores, view: View) -> dict[str, ViewValue]:
    """Return the metrics of one view over centres."""
    if view is View.WORST:
        return {name: ViewValue(worst.value, worst.centre or "") for name, worst in scores.worst.items()}
    metrics: Metrics = getattr(scores, view)
    return {name: ViewValue(value) for name, value in metrics.items()}


def view_value(scores: TaskScores, view: View, metric: str) -> ViewValue:
    """Return one metric of a view; its value is None where it is undefined or missing."""
    return view_metrics(scores, view).get(metric, ViewValue(None))


def list_metrics(scores: TaskScores) -> list[str]:
    """Return the names of a task's metrics in the order of `METRIC_COLUMNS`; unknown names come last."""
    names = dict.fromkeys(scores.pooled)
    for centre_scores in scores.centres.values():
        names |= dict.fromkeys(centre_metrics(centre_scores))
    order = {metric: position for position, metric in enumerate(METRIC_COLUMNS)}
    return sorted(names, key=lambda name: order.get(name, len(order)))


def list_short_metrics(scores: TaskScores) -> list[str]:
    """Return the metrics that have a short name: those for a narrow table."""
    names = list_metrics(scores)
    return [name for name in names if name in METRIC_COLUMNS and METRIC_COLUMNS[name].short_name]


def choose_task_metric(evaluation: EvaluationConfig, scores: Mapping[str, TaskScores]) -> TaskMetric:
    """Choose the task and metric to show first.

    They are those that select the best round. Where `scores` lacks that task, a task with a metric other than
    the loss is taken; where the task lacks that metric, its primary metric.
    """
    task = evaluation.task
    if scores and task not in scores:
        task = _first_measured_task(scores)
    if task not in scores:
        return TaskMetric(task, evaluation.metric)
    return TaskMetric(task, primary_metric(evaluation.metric, scores[task].macro))


def _first_measured_task(scores: Mapping[str, TaskScores]) -> str:
    for task, task_scores in scores.items():
        if task_scores.macro.keys() - {"loss"}:
            return task
    return next(iter(scores))
