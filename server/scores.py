"""From summed statistics to the tables that people read: per centre, macro, pooled, worst, spread."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, NamedTuple

import numpy as np

from common.compose import to_dict
from common.messages import Presence, Sums
from common.metrics import (
    Array,
    Metrics,
    binary_metrics,
    binary_reasons,
    challenge_score,
    leading,
    loss_metrics,
    loss_reasons,
    multiclass_metrics,
    multiclass_reasons,
    regression_metrics,
    regression_reasons,
    summary,
)
from common.overlap import overlap_metrics, overlap_reasons, spearman, spearman_reason
from common.schema import Config, Evaluation
from common.secagg import hides_all
from common.tasks import cells_of

Table = dict[str, Any]


class Measure(NamedTuple):
    """How a kind of task is measured."""

    what: str  # its sums come as `cohort/task/what`
    metrics: Callable[..., Metrics]  # from them
    reasons: Callable[..., dict[str, str]]  # why some are undefined


MEASURES = {
    "binary": Measure("hist", binary_metrics, binary_reasons),
    "multiclass": Measure("confusion", multiclass_metrics, multiclass_reasons),
    "regression": Measure("regression", regression_metrics, regression_reasons),
    "segmentation": Measure("overlap", overlap_metrics, overlap_reasons),
    "inpainting": Measure("loss", loss_metrics, loss_reasons),
    "contrast": Measure("loss", loss_metrics, loss_reasons),
}


def table(sums: Sums, config: Config, tasks: list[str], with_sums: bool = False) -> Table:
    """{task: {"centres": {centre: metrics}, "macro", "pooled", "worst", "spread"}}, with histograms (`with_sums`) for the report's curves.

    A segmentation whose centres also sent a joint histogram of predicted and known severity (`joint`) has Spearman's rho among its metrics.
    """
    found: Table = {}
    for task in tasks:
        kind = config.tasks[task].kind
        what, measured, whys = MEASURES[kind]
        own = _of(sums, task, what)
        if not own:
            continue
        given = {"threshold": config.evaluation.threshold} if kind == "binary" else {}
        total = np.sum(list(own.values()), axis=0)
        metrics, pooled = {c: measured(array, **given) for c, array in own.items()}, measured(total, **given)
        why = {c: whys(array, **given) for c, array in own.items()}
        if joints := _of(sums, task, "joint"):
            joint_of_all = np.sum(list(joints.values()), axis=0)
            pooled["spearman"] = spearman(joint_of_all)
            for c in own:
                joint = joints.get(c, np.zeros_like(joint_of_all))
                metrics[c]["spearman"] = spearman(joint)
                why[c] |= {"spearman": said} if (said := spearman_reason(joint)) else {}
        losses = {c: loss_metrics(sums[f"{c}/{task}/loss"])["loss"] for c in own}
        centres = {c: {**metrics[c], "loss": losses[c], "reasons": why[c]} for c in own}
        found[task] = {"centres": centres, **summary(metrics, pooled)}
        if kind == "binary" and not hides_all(config):
            found[task]["challenge_score"] = challenge_score(own.values(), given["threshold"], config.evaluation.absent)
        if with_sums:
            found[task][what] = {c: array.tolist() for c, array in own.items()}
    return found


def _of(sums: Sums, task: str, what: str) -> dict[str, Array]:
    """{cohort: array}, in the order of their names."""
    return {key.split("/")[0]: array for key, array in sorted(sums.items()) if key.endswith(f"/{task}/{what}")}


def without_sums(scores: Table) -> Table:
    """The table without histograms and other sums."""
    sums = {measure.what for measure in MEASURES.values()}
    return {task: {k: v for k, v in views.items() if k not in sums} for task, views in scores.items()}


def chosen(scores: Table, evaluation: Evaluation) -> float | None:
    """The value that chooses the best round; None where it is undefined or the stage has no such task."""
    view = scores.get(evaluation.task, {}).get(evaluation.over, {}).get(evaluation.metric)
    value = view["value"] if isinstance(view, dict) else view
    return None if value is None else float(value)


def own(scores: Table, evaluation: Evaluation, cohorts: list[str]) -> float | None:
    """The same for one centre alone (mean over its cohorts)."""
    centres = scores.get(evaluation.task, {}).get("centres", {})
    values = [v for c in cohorts if c in centres and (v := centres[c].get(evaluation.metric)) is not None]
    return float(np.mean(values)) if values else None


def line(scores: Table, task: str, metric: str) -> str:
    """One line for a log: `covid auc  macro .812  worst .744 (south)`; in a stage without the task, of its first task's leading metric."""
    if task not in scores:
        task = next(iter(scores), "")
    if task not in scores:
        return ""
    metric = leading(metric, scores[task]["macro"])
    macro, worst = scores[task]["macro"].get(metric), scores[task]["worst"].get(metric)
    if macro is None or worst is None or worst["value"] is None:
        return f"{task} {metric} undefined"
    return f"{task} {metric}  macro {macro:.3f}  worst {worst['value']:.3f} ({worst['centre']})"


def by_class(counts: Mapping[str, list[float]], config: Config) -> dict[str, dict[str, dict[str, float]]]:
    """{split: {task: {class or "unlabelled": scans}}} from {"cohort/split/task": [K + 1]}, all cohorts together."""
    held: dict[str, dict[str, dict[str, float]]] = {}
    for key, n in counts.items():
        _, split, task = key.split("/")
        names = [*cells_of(task, config.tasks[task]), "unlabelled"]
        cell = held.setdefault(split, {}).setdefault(task, dict.fromkeys(names, 0.0))
        for name, value in zip(names, n, strict=True):
            cell[name] += value
    return held


def new_result(run: str, config: Config, presence: Mapping[str, Presence], counts: Sums) -> dict[str, Any]:
    """The skeleton of `metrics.json`, with who takes part and what they hold."""
    centres = {}
    for centre, said in presence.items():
        held = by_class({key: n.tolist() for key, n in counts.items() if key.split("/")[0] in said.cohorts}, config)
        centres[centre] = {
            "counts": held,
            "sources": said.sources,
            "skipped": sum(said.skipped.values()),
            "skipped_why": said.skipped,
            "versions": said.versions,
            "device": said.device,
        }
    return {
        "run": run,
        "recipe": config.recipe,
        "mode": config.federation.mode,
        "seed": config.seed,
        "status": "running",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": 0.0,
        "config": to_dict(config),
        "centres": centres,
        "stages": [],
        "test": {},
        "left_out": [],
        "notes": [],
    }
