"""Read `metrics.json` and `crossval.json` of version 0.1.0 as the records of today.

What 0.1.0 did not record stays empty, such as the codes of refusals.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from common.config.renamed_keys import upgrade_config
from server.ledger.migration import convert_centre_scores, convert_cross_site, convert_image_statistic
from server.run.records import (
    SCHEMA_VERSION,
    CrossValidationSummary,
    Metrics,
    RunResult,
    RunStatus,
    parse_result,
)

# {field of 0.1.0: its name now}, by the record that has it.
RUN_FIELDS = {
    "run": "run_id",
    "filled": "fitted_tasks",
    "counts": "label_counts",
    "quality": "image_statistics",
    "matrix": "cross_site",
    "clip": "clip_norm",
}
CENTRE_FIELDS = {"skipped_why": "skipped_by_reason"}
STAGE_FIELDS = {"personal": "local_only"}
ROUND_FIELDS = {"effective": "effective_centres", "val": "validation"}
CENTRE_ROUND_FIELDS = {"clip": "clip_norm"}
# The statistic that a task's test scores were computed from; 0.1.0 kept it in the scores under its own name.
STATISTICS = ("hist", "confusion", "regression", "overlap", "loss")

Values = dict[str, Any]


def migrate_result(values: Mapping[str, Any]) -> RunResult:
    """Build a run's records from its `metrics.json` of 0.1.0.

    Raises:
        KeyError, pydantic.ValidationError: the values have another form.
    """
    migrated = _rename_fields(values, RUN_FIELDS)
    migrated["schema_version"] = SCHEMA_VERSION
    migrated["config"] = upgrade_config(values["config"])
    migrated["centres"] = {
        centre: _rename_fields(record, CENTRE_FIELDS) for centre, record in values["centres"].items()
    }
    migrated["stages"] = [_migrate_stage(stage) for stage in values["stages"]]
    migrated["test"] = _migrate_scores(values["test"])
    migrated["left_out"] = [{**exclusion, "code": None} for exclusion in values["left_out"]]
    migrated["fitted_tasks"] = _migrate_fitted_tasks(values.get("filled", {}))
    statistics = values.get("quality", {})
    migrated["image_statistics"] = {
        name: convert_image_statistic(statistic) for name, statistic in statistics.items()
    }
    matrix = values.get("matrix")
    migrated["cross_site"] = convert_cross_site(matrix) if matrix else None
    return parse_result(migrated)


def migrate_summary(values: Mapping[str, Any], folds: Mapping[str, RunResult]) -> CrossValidationSummary:
    """Build a cross-validation's records from its `crossval.json` of 0.1.0.

    Args:
        values: the content of that file.
        folds: {fold: result} of the folds whose folders are still there, which hold times and classes.

    Raises:
        KeyError, pydantic.ValidationError: the values have another form.
    """
    first = next(iter(folds.values()), None)
    config = upgrade_config(values["config"])
    total = {
        "run_id": values["run"],
        "recipe": values["recipe"],
        "mode": values["mode"],
        "seed": config["seed"],
        "started": first.started if first else "",
        "config": config,
        "schema_version": SCHEMA_VERSION,
        "status": RunStatus.FINISHED,
        "seconds": sum(result.seconds for result in folds.values()),
        "test": _migrate_scores(values["test"]),
    }
    result = parse_result(total)
    if first:
        result.fitted_tasks = first.fitted_tasks
    metrics_by_fold = {}
    for fold, metrics_by_task in values["parts"].items():
        metrics_by_fold[fold] = {task: _migrate_metrics(metrics) for task, metrics in metrics_by_task.items()}
    return CrossValidationSummary(values["evaluation"], dict(values["untrained"]), metrics_by_fold, result)


def _migrate_stage(values: Mapping[str, Any]) -> Values:
    migrated = _rename_fields(values, STAGE_FIELDS)
    migrated["rounds"] = [_migrate_round(round_values) for round_values in values["rounds"]]
    best = values["best"] or None
    migrated["best"] = None if values["personal"] else best
    migrated["best_by_centre"] = (best or {}) if values["personal"] else {}
    return migrated


def _migrate_round(values: Mapping[str, Any]) -> Values:
    migrated = _rename_fields(values, ROUND_FIELDS)
    migrated["centres"] = {
        centre: _rename_fields(record, CENTRE_ROUND_FIELDS) for centre, record in values["centres"].items()
    }
    migrated["validation"] = _migrate_scores(values["val"])
    return migrated


def _migrate_scores(scores: Mapping[str, Mapping[str, Any]]) -> Values:
    """Return {task: scores} in the form of `TaskScores`."""
    migrated = {}
    for task, values in scores.items():
        task_scores = dict(values)
        task_scores["centres"] = {
            centre: convert_centre_scores(centre_values)
            for centre, centre_values in values["centres"].items()
        }
        for statistic in STATISTICS:
            if statistic in task_scores:
                task_scores["sums"] = task_scores.pop(statistic)
        migrated[task] = task_scores
    return migrated


def _migrate_metrics(values: Mapping[str, Any]) -> Metrics:
    """Return a fold's metrics of a task; of a centre left out, 0.1.0 kept loss and reasons among them."""
    if "reasons" in values:
        metrics: Metrics = convert_centre_scores(values)["metrics"]
        return metrics
    return dict(values)


def _migrate_fitted_tasks(filled: Mapping[str, Any]) -> Values:
    """Return {task: classes and clustering}, which 0.1.0 kept as a pair."""
    fitted = {}
    for task, (classes, clustering_id) in filled.items():
        fitted[task] = {"classes": classes, "clustering_id": clustering_id}
    return fitted


def _rename_fields(values: Mapping[str, Any], new_names: Mapping[str, str]) -> Values:
    return {new_names.get(name, name): value for name, value in values.items()}
