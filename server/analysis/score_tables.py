"""Turn the centres' sums into the scores that people read: per centre, macro, pooled, worst and spread."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial

import numpy as np

from common.config.parse import config_to_dict
from common.config.schema import Config, EvaluationConfig
from common.learning.losses import class_names
from common.learning.metrics import (
    Array,
    Metrics,
    compute_binary_metrics,
    compute_challenge_score,
    compute_loss_metrics,
    compute_multiclass_metrics,
    compute_regression_metrics,
    explain_undefined_binary,
    explain_undefined_loss,
    explain_undefined_multiclass,
    explain_undefined_regression,
    primary_metric,
    summarise_centres,
)
from common.learning.segmentation_metrics import (
    compute_overlap_metrics,
    compute_spearman,
    explain_undefined_overlap,
    explain_undefined_spearman,
)
from common.privacy.secure_aggregation import hides_statistics
from common.protocol.messages import JoinReply, Sums
from common.protocol.sum_key import LabelCountKey, SumKey
from server.analysis.additive_queries import select_by_cohort
from server.run.records import CentreRecord, CentreScores, RunResult, TaskScores, WorstCentre


@dataclass(frozen=True)
class TaskMeasure:
    """How a task is scored from one of its statistics."""

    statistic: str  # what the centres send: "hist", "confusion", ...
    compute_metrics: Callable[[Array], Metrics]
    explain_undefined: Callable[[Array], dict[str, str]]  # {metric: why it is undefined}


def select_measure(task_type: str, threshold: float) -> TaskMeasure:
    """Return how tasks of a type are scored.

    `threshold`: the probability from which a binary task calls a scan positive.
    """
    match task_type:
        case "binary":
            return TaskMeasure(
                "hist",
                partial(compute_binary_metrics, threshold=threshold),
                partial(explain_undefined_binary, threshold=threshold),
            )
        case "multiclass":
            return TaskMeasure("confusion", compute_multiclass_metrics, explain_undefined_multiclass)
        case "regression":
            return TaskMeasure("regression", compute_regression_metrics, explain_undefined_regression)
        case "segmentation":
            return TaskMeasure("overlap", compute_overlap_metrics, explain_undefined_overlap)
        case _:  # inpainting and contrastive tasks are measured by their loss alone
            return TaskMeasure("loss", compute_loss_metrics, explain_undefined_loss)


def compute_scores(
    sums: Sums, config: Config, tasks: Sequence[str], with_sums: bool = False
) -> dict[str, TaskScores]:
    """Score every task for which a centre sent sums.

    Args:
        sums: all centres' statistics by `SumKey`.
        config: the run's configuration.
        tasks: the tasks to score.
        with_sums: keep the statistics in the scores, for the curves of the report.

    Returns:
        {task: scores}. A segmentation whose centres also sent a joint histogram of predicted and known
        severity ("joint") has Spearman's rho among its metrics.
    """
    scores = {}
    for task in tasks:
        measure = select_measure(config.tasks[task].type, config.evaluation.threshold)
        statistics = select_by_cohort(sums, task, measure.statistic)
        if not statistics:
            continue
        scores[task] = _score_task(task, measure, statistics, sums)
        if config.tasks[task].type == "binary" and not hides_statistics(config):
            scores[task].challenge_score = compute_challenge_score(
                statistics.values(), config.evaluation.threshold, config.evaluation.missing_class
            )
        if with_sums:
            scores[task].sums = {cohort: array.tolist() for cohort, array in statistics.items()}
    return scores


def _score_task(task: str, measure: TaskMeasure, statistics: dict[str, Array], sums: Sums) -> TaskScores:
    centres = {}
    metrics = {}
    for cohort, array in statistics.items():
        losses = sums[str(SumKey(cohort, task, "loss"))]
        metrics[cohort] = measure.compute_metrics(array)
        centres[cohort] = CentreScores(
            metrics=metrics[cohort],
            loss=compute_loss_metrics(losses)["loss"],
            reasons=measure.explain_undefined(array),
        )
    pooled = measure.compute_metrics(np.sum(list(statistics.values()), axis=0))
    joint_histograms = select_by_cohort(sums, task, "joint")
    if joint_histograms:
        pooled["spearman"] = _add_spearman(centres, joint_histograms)
    views = summarise_centres(metrics, pooled)
    worst = {metric: WorstCentre(**lowest) for metric, lowest in views["worst"].items()}
    return TaskScores(centres, views["macro"], views["pooled"], worst, views["spread"])


def _add_spearman(centres: dict[str, CentreScores], joint_histograms: dict[str, Array]) -> float | None:
    """Add Spearman's rho to each centre's metrics and return that of all centres together."""
    total = np.sum(list(joint_histograms.values()), axis=0)
    for cohort, scores in centres.items():
        histogram = joint_histograms.get(cohort, np.zeros_like(total))
        scores.metrics["spearman"] = compute_spearman(histogram)
        reason = explain_undefined_spearman(histogram)
        if reason:
            scores.reasons["spearman"] = reason
    return compute_spearman(total)


def get_selection_score(scores: Mapping[str, TaskScores], evaluation: EvaluationConfig) -> float | None:
    """Return the value that selects the best round; None if undefined, or if the stage lacks the task."""
    if evaluation.task not in scores:
        return None
    task_scores = scores[evaluation.task]
    match evaluation.reduction:
        case "macro":
            return task_scores.macro.get(evaluation.metric)
        case "pooled":
            return task_scores.pooled.get(evaluation.metric)
        case "worst":
            worst = task_scores.worst.get(evaluation.metric)
            return None if worst is None else worst.value


def get_centre_score(
    scores: Mapping[str, TaskScores], evaluation: EvaluationConfig, cohorts: Sequence[str]
) -> float | None:
    """Return the value that selects one centre's own best round: the mean over its cohorts that have one."""
    if evaluation.task not in scores:
        return None
    centres = scores[evaluation.task].centres
    values = []
    for cohort in cohorts:
        value = centres[cohort].get_metric(evaluation.metric) if cohort in centres else None
        if value is not None:
            values.append(value)
    return float(np.mean(values)) if values else None


def format_summary(scores: Mapping[str, TaskScores], task: str, metric: str) -> str:
    """Return one line for a log: `covid auc  macro 0.812  worst 0.744 (south)`.

    A stage without the task is summarised by the primary metric of its first task; one without any task by
    "".
    """
    if not scores:
        return ""
    shown_task = task if task in scores else next(iter(scores))
    task_scores = scores[shown_task]
    shown_metric = primary_metric(metric, task_scores.macro)
    macro = task_scores.macro.get(shown_metric)
    worst = task_scores.worst.get(shown_metric)
    if macro is None or worst is None or worst.value is None:
        return f"{shown_task} {shown_metric} undefined"
    return f"{shown_task} {shown_metric}  macro {macro:.3f}  worst {worst.value:.3f} ({worst.centre})"


def group_counts_by_class(
    counts: Mapping[str, Sequence[float]], config: Config
) -> dict[str, dict[str, dict[str, float]]]:
    """Add up label counts over cohorts.

    Args:
        counts: {`LabelCountKey` as text: scans per class, then unlabelled [K + 1]}.
        config: the run's configuration, which names the classes.

    Returns:
        {split: {task: {class or "unlabelled": scans}}}.
    """
    grouped: dict[str, dict[str, dict[str, float]]] = {}
    for text, scans in counts.items():
        key = LabelCountKey.parse(text)
        names = [*class_names(key.task, config.tasks[key.task]), "unlabelled"]
        cells = grouped.setdefault(key.split, {}).setdefault(key.task, dict.fromkeys(names, 0.0))
        for name, value in zip(names, scans, strict=True):
            cells[name] += value
    return grouped


def create_result(
    run_id: str, config: Config, members: Mapping[str, JoinReply], label_counts: Sums
) -> RunResult:
    """Return the result of a run that begins: who takes part, what they hold, no stage yet."""
    centres = {}
    for centre, member in members.items():
        counts = {}
        for text, scans in label_counts.items():
            if LabelCountKey.parse(text).cohort in member.cohorts:
                counts[text] = scans.tolist()
        centres[centre] = CentreRecord(
            counts=group_counts_by_class(counts, config),
            sources=member.sources,
            skipped=sum(member.skipped.values()),
            skipped_by_reason=member.skipped,
            versions=member.versions,
            device=member.device,
        )
    return RunResult(
        run_id=run_id,
        recipe=config.recipe,
        mode=config.federation.mode,
        seed=config.seed,
        started=datetime.now(UTC).isoformat(timespec="seconds"),
        config=config_to_dict(config),
        centres=centres,
    )
