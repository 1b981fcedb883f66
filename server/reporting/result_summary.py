"""What a run's result says at a glance: its centres, its main task and metric, its headline numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from common.config.parse import parse_config
from common.config.schema import EvaluationConfig
from server.reporting.centre_tables import LabelCounts
from server.reporting.labels import VIEW_LABELS, View, format_number, label_metric
from server.reporting.numbered_rounds import list_rounds
from server.reporting.scores import TaskMetric, choose_task_metric, view_value
from server.run.records import RunResult, StageRecord, TaskScores

SUBTEXTS = {View.SPREAD: "best minus worst"}


@dataclass(frozen=True)
class HeadlineNumber:
    """A large number at the top of the report."""

    label: str
    value: str
    subtext: str = ""


def get_evaluation_config(result: RunResult) -> EvaluationConfig:
    """Return how the run's models were scored and selected."""
    return parse_config(result.config).evaluation


def get_selection_metric(result: RunResult) -> TaskMetric:
    """Return the task and metric that select the best round."""
    evaluation = get_evaluation_config(result)
    return TaskMetric(evaluation.task, evaluation.metric)


def get_last_scores(result: RunResult) -> Mapping[str, TaskScores]:
    """Return the test's scores, or else those of the last validation; {} where there are none."""
    if result.test:
        return result.test
    for entry in reversed(list_rounds(result)):
        if entry.record.validation:
            return entry.record.validation
    return {}


def primary_task_metric(result: RunResult) -> TaskMetric:
    """Return the task and metric of a result to show first."""
    return choose_task_metric(get_evaluation_config(result), get_last_scores(result))


def list_centre_names(result: RunResult) -> list[str]:
    """Return every centre that the result names, in the order of the federation.

    In a central run those are the cohorts that the one site holds, after the site itself.
    """
    names = dict.fromkeys(result.centres)
    for entry in list_rounds(result):
        names |= dict.fromkeys(entry.record.centres)
        for weights in entry.record.weights.values():
            names |= dict.fromkeys(weights)
        for scores in entry.record.validation.values():
            names |= dict.fromkeys(scores.centres)
    for statistic in result.image_statistics.values():
        names |= dict.fromkeys(statistic.centres)
    for scores in result.test.values():
        names |= dict.fromkeys([*scores.centres, *scores.sums])
    return list(names)


def get_label_counts(result: RunResult) -> dict[str, LabelCounts]:
    """Return {centre: its label counts}."""
    return {name: centre.counts for name, centre in result.centres.items()}


def build_headline(result: RunResult, shown: TaskMetric) -> list[HeadlineNumber]:
    """Return the test's summaries over centres; nothing where the task was not tested."""
    scores = result.test.get(shown.task)
    if scores is None:
        return []
    numbers = []
    for view, label in VIEW_LABELS.items():
        value, centre = view_value(scores, view, shown.metric)
        text = format_number(value) or "undefined"
        numbers.append(HeadlineNumber(label, text, centre or SUBTEXTS.get(view, "")))
    if scores.challenge_score is not None:
        text = format_number(scores.challenge_score) or "undefined"
        numbers.append(HeadlineNumber("challenge score", text, "mean over sources of (F1⁺ + F1⁻)/2"))
    return numbers


def describe_headline(result: RunResult, shown: TaskMetric) -> str:
    """Say what the headline numbers measure, and after which round."""
    text = f"{label_metric(shown.metric)} of {shown.task} on the test scans"
    for stage in reversed(result.stages):
        if stage.best or stage.best_by_centre:
            return f"{text}, after {_describe_tested_round(stage, get_evaluation_config(result))}."
    return f"{text}."


def _describe_tested_round(stage: StageRecord, evaluation: EvaluationConfig) -> str:
    if stage.best is None:
        text = f"each centre's own best round of {stage.name}"
        was_compared = True
    else:
        text = f"round {stage.best.round} of {stage.name}"
        was_compared = stage.best.value is not None
    if was_compared and evaluation.checkpoint_selection == "best":
        return f"{text}, the best on validation"
    return text
