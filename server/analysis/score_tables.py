"""From summed statistics to the tables that people read: per centre, macro, pooled, worst, spread."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np

from common.config.compose import config_to_dict
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

ScoreTable = dict[str, Any]


class TaskMeasure(NamedTuple):
    """How a kind of task is measured."""

    sum_name: str  # its sums come as `cohort/task/what`
    compute_metrics: Callable[..., Metrics]  # from them
    explain_undefined: Callable[..., dict[str, str]]  # why some are undefined


TASK_MEASURES = {
    "binary": TaskMeasure("hist", compute_binary_metrics, explain_undefined_binary),
    "multiclass": TaskMeasure("confusion", compute_multiclass_metrics, explain_undefined_multiclass),
    "regression": TaskMeasure("regression", compute_regression_metrics, explain_undefined_regression),
    "segmentation": TaskMeasure("overlap", compute_overlap_metrics, explain_undefined_overlap),
    "inpainting": TaskMeasure("loss", compute_loss_metrics, explain_undefined_loss),
    "contrastive": TaskMeasure("loss", compute_loss_metrics, explain_undefined_loss),
}


def score_table(sums: Sums, config: Config, tasks: list[str], with_sums: bool = False) -> ScoreTable:
    """{task: {"centres": {centre: metrics}, "macro", "pooled", "worst", "spread"}}, with histograms (`with_sums`) for the report's curves.

    A segmentation whose centres also sent a joint histogram of predicted and known severity (`joint`) has Spearman's rho among its metrics.
    """
    found: ScoreTable = {}
    for task in tasks:
        kind = config.tasks[task].type
        what, measured, whys = TASK_MEASURES[kind]
        own = _sums_by_cohort(sums, task, what)
        if not own:
            continue
        given = {"threshold": config.evaluation.threshold} if kind == "binary" else {}
        total = np.sum(list(own.values()), axis=0)
        metrics, pooled = {c: measured(array, **given) for c, array in own.items()}, measured(total, **given)
        why = {c: whys(array, **given) for c, array in own.items()}
        if joints := _sums_by_cohort(sums, task, "joint"):
            joint_of_all = np.sum(list(joints.values()), axis=0)
            pooled["spearman"] = compute_spearman(joint_of_all)
            for c in own:
                joint = joints.get(c, np.zeros_like(joint_of_all))
                metrics[c]["spearman"] = compute_spearman(joint)
                why[c] |= {"spearman": said} if (said := explain_undefined_spearman(joint)) else {}
        losses = {c: compute_loss_metrics(sums[f"{c}/{task}/loss"])["loss"] for c in own}
        centres = {c: {**metrics[c], "loss": losses[c], "reasons": why[c]} for c in own}
        found[task] = {"centres": centres, **summarise_centres(metrics, pooled)}
        if kind == "binary" and not hides_statistics(config):
            found[task]["challenge_score"] = compute_challenge_score(
                own.values(), given["threshold"], config.evaluation.missing_class
            )
        if with_sums:
            found[task][what] = {c: array.tolist() for c, array in own.items()}
    return found


def _sums_by_cohort(sums: Sums, task: str, sum_name: str) -> dict[str, Array]:
    """{cohort: array}, in the order of their names."""
    return {
        key.split("/")[0]: array for key, array in sorted(sums.items()) if key.endswith(f"/{task}/{sum_name}")
    }


def drop_sums(scores: ScoreTable) -> ScoreTable:
    """The table without histograms and other sums."""
    sums = {measure.sum_name for measure in TASK_MEASURES.values()}
    return {task: {k: v for k, v in views.items() if k not in sums} for task, views in scores.items()}


def selection_score(scores: ScoreTable, evaluation: EvaluationConfig) -> float | None:
    """The value that chooses the best round; None where it is undefined or the stage has no such task."""
    view = scores.get(evaluation.task, {}).get(evaluation.reduction, {}).get(evaluation.metric)
    value = view["value"] if isinstance(view, dict) else view
    return None if value is None else float(value)


def centre_score(scores: ScoreTable, evaluation: EvaluationConfig, cohorts: list[str]) -> float | None:
    """The same for one centre alone (mean over its cohorts)."""
    centres = scores.get(evaluation.task, {}).get("centres", {})
    values = [v for c in cohorts if c in centres and (v := centres[c].get(evaluation.metric)) is not None]
    return float(np.mean(values)) if values else None


def summary_line(scores: ScoreTable, task: str, metric: str) -> str:
    """One line for a log: `covid auc  macro .812  worst .744 (south)`; in a stage without the task, of its first task's leading metric."""
    if task not in scores:
        task = next(iter(scores), "")
    if task not in scores:
        return ""
    metric = primary_metric(metric, scores[task]["macro"])
    macro, worst = scores[task]["macro"].get(metric), scores[task]["worst"].get(metric)
    if macro is None or worst is None or worst["value"] is None:
        return f"{task} {metric} undefined"
    return f"{task} {metric}  macro {macro:.3f}  worst {worst['value']:.3f} ({worst['centre']})"


def group_counts_by_class(
    counts: Mapping[str, list[float]], config: Config
) -> dict[str, dict[str, dict[str, float]]]:
    """{split: {task: {class or "unlabelled": scans}}} from {"cohort/split/task": [K + 1]}, all cohorts together."""
    held: dict[str, dict[str, dict[str, float]]] = {}
    for key, n in counts.items():
        _, split, task = key.split("/")
        names = [*class_names(task, config.tasks[task]), "unlabelled"]
        cell = held.setdefault(split, {}).setdefault(task, dict.fromkeys(names, 0.0))
        for name, value in zip(names, n, strict=True):
            cell[name] += value
    return held


def create_result(
    run_id: str, config: Config, members: Mapping[str, JoinReply], label_counts: Sums
) -> dict[str, Any]:
    """The skeleton of `metrics.json`, with who takes part and what they hold."""
    centres = {}
    for centre, said in members.items():
        held = group_counts_by_class(
            {key: n.tolist() for key, n in label_counts.items() if key.split("/")[0] in said.cohorts}, config
        )
        centres[centre] = {
            "counts": held,
            "sources": said.sources,
            "skipped": sum(said.skipped.values()),
            "skipped_why": said.skipped,
            "versions": said.versions,
            "device": said.device,
        }
    return {
        "run": run_id,
        "recipe": config.recipe,
        "mode": config.federation.mode,
        "seed": config.seed,
        "status": "running",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": 0.0,
        "config": config_to_dict(config),
        "centres": centres,
        "stages": [],
        "test": {},
        "left_out": [],
        "notes": [],
    }
