"""From summed statistics to the tables that people read: per centre, macro, pooled, worst, spread."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import numpy as np

from common.compose import to_dict
from common.messages import Presence, Sums
from common.metrics import binary_metrics, challenge_score, multiclass_metrics, multiclass_reasons, reasons, summary
from common.schema import Config, Evaluation

Table = dict[str, Any]


def table(sums: Sums, config: Config, tasks: list[str], with_sums: bool = False) -> Table:
    """{task: {"centres": {centre: metrics}, "macro", "pooled", "worst", "spread"}}, with histograms (`with_sums`) for the report's curves."""
    found: Table = {}
    threshold = config.evaluation.threshold
    for task in tasks:
        binary = config.tasks[task].kind == "binary"
        what = "hist" if binary else "confusion"
        own = {key.split("/")[0]: array for key, array in sorted(sums.items()) if key.endswith(f"/{task}/{what}")}
        if not own:
            continue
        total = np.sum(list(own.values()), axis=0)
        metrics = {c: binary_metrics(h, threshold) if binary else multiclass_metrics(h) for c, h in own.items()}
        pooled = binary_metrics(total, threshold) if binary else multiclass_metrics(total)
        centres: dict[str, Any] = {}
        for c, h in own.items():
            loss, n = sums[f"{c}/{task}/loss"]
            why = reasons(h, threshold) if binary else multiclass_reasons(h)
            centres[c] = {**metrics[c], "loss": float(loss / n) if n else None, "reasons": why}
        found[task] = {"centres": centres, **summary(metrics, pooled)}
        if binary:
            found[task]["challenge_score"] = challenge_score(own.values(), threshold, config.evaluation.absent)
        if with_sums:
            found[task][what] = {c: h.tolist() for c, h in own.items()}
    return found


def without_sums(scores: Table) -> Table:
    """The table without histograms and confusions."""
    return {task: {k: v for k, v in views.items() if k not in ("hist", "confusion")} for task, views in scores.items()}


def chosen(scores: Table, evaluation: Evaluation) -> float | None:
    """The value that chooses the best round; None where it is undefined."""
    view = scores[evaluation.task][evaluation.over].get(evaluation.metric)
    value = view["value"] if isinstance(view, dict) else view
    return None if value is None else float(value)


def own(scores: Table, evaluation: Evaluation, cohorts: list[str]) -> float | None:
    """The same for one centre alone (mean over its cohorts)."""
    centres = scores[evaluation.task]["centres"]
    values = [v for c in cohorts if c in centres and (v := centres[c].get(evaluation.metric)) is not None]
    return float(np.mean(values)) if values else None


def line(scores: Table, task: str, metric: str) -> str:
    """One line for a log: `covid auc  macro .812  worst .744 (south)`."""
    if task not in scores:
        return ""
    macro, worst = scores[task]["macro"].get(metric), scores[task]["worst"].get(metric)
    if macro is None or worst is None or worst["value"] is None:
        return f"{task} {metric} undefined"
    return f"{task} {metric}  macro {macro:.3f}  worst {worst['value']:.3f} ({worst['centre']})"


def new_result(run: str, config: Config, presence: Mapping[str, Presence], counts: Sums) -> dict[str, Any]:
    """The skeleton of `metrics.json`, with who takes part and what they hold."""
    centres = {}
    for centre, said in presence.items():
        held: dict[str, dict[str, dict[str, float]]] = {}
        for key, n in counts.items():
            cohort, split, task = key.split("/")
            if cohort in said.cohorts:
                kind = config.tasks[task]
                names = [f"no {task}", task] if kind.kind == "binary" else kind.classes
                cell = held.setdefault(split, {}).setdefault(task, dict.fromkeys([*names, "unlabelled"], 0.0))
                for name, value in zip([*names, "unlabelled"], n.tolist(), strict=True):
                    cell[name] += value
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
