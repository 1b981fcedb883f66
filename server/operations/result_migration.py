"""Read `metrics.json` and `crossval.json` of version 0.1.0 as the records of today.

What 0.1.0 did not record stays empty, such as the codes of refusals.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
    migrated["centres"] = _rename_in_each(values["centres"], CENTRE_FIELDS)
    migrated["stages"] = list(map(_migrate_stage, values["stages"]))
    migrated["test"] = _migrate_scores(values["test"])
    migrated["left_out"] = [{**exclusion, "code": None} for exclusion in values["left_out"]]
    migrated["fitted_tasks"] = _migrate_fitted_tasks(values.get("filled", {}))
    migrated["image_statistics"] = _convert_each(values.get("quality", {}), convert_image_statistic)
    matrix = values.get("matrix")
    if matrix:
        migrated["cross_site"] = convert_cross_site(matrix)
    else:
        migrated.pop("cross_site", None)
    return parse_result(migrated)


def migrate_summary(values: Mapping[str, Any], folds: Mapping[str, RunResult]) -> CrossValidationSummary:
    """Build a cross-validation's records from its `crossval.json` of 0.1.0.

    Args:
        values: the content of that file.
        folds: {fold: result} of the folds whose folders are still there, which hold times and classes.

    Raises:
        KeyError, pydantic.ValidationError: the values have another form.
    """
    config = upgrade_config(values["config"])
    total = {
        "run_id": values["run"],
        "recipe": values["recipe"],
        "mode": values["mode"],
        "seed": config["seed"],
        "started": "",
        "config": config,
        "schema_version": SCHEMA_VERSION,
        "status": RunStatus.FINISHED,
        "seconds": sum(result.seconds for result in folds.values()),
        "test": _migrate_scores(values["test"]),
    }
    result = parse_result(total)
    first_fold = next(iter(folds.values()), None)
    if first_fold:
        result.started = first_fold.started
        result.fitted_tasks = first_fold.fitted_tasks
    metrics_by_fold: dict[str, dict[str, Metrics]] = {}
    for fold, metrics_by_task in values["parts"].items():
        metrics_by_fold[fold] = _convert_each(metrics_by_task, _migrate_metrics)
    return CrossValidationSummary(values["evaluation"], dict(values["untrained"]), metrics_by_fold, result)


def _migrate_stage(values: Mapping[str, Any]) -> Values:
    migrated = _rename_fields(values, STAGE_FIELDS)
    migrated["rounds"] = list(map(_migrate_round, values["rounds"]))
    if values["personal"]:
        migrated["best_by_centre"] = migrated.pop("best")
    elif not values["best"]:
        migrated["best"] = None
    return migrated


def _migrate_round(values: Mapping[str, Any]) -> Values:
    migrated = _rename_fields(values, ROUND_FIELDS)
    migrated["centres"] = _rename_in_each(values["centres"], CENTRE_ROUND_FIELDS)
    migrated["validation"] = _migrate_scores(values["val"])
    return migrated


def _migrate_scores(scores: Mapping[str, Mapping[str, Any]]) -> Values:
    """Return {task: scores} in the form of `TaskScores`."""
    migrated = {}
    for task, values in scores.items():
        task_scores = dict(values)
        task_scores["centres"] = _convert_each(values["centres"], convert_centre_scores)
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


def _rename_in_each(records: Mapping[str, Values], new_names: Mapping[str, str]) -> Values:
    return {key: _rename_fields(record, new_names) for key, record in records.items()}


def _convert_each(values: Mapping[str, Any], convert: Callable[[Any], Any]) -> Values:
    return {key: convert(value) for key, value in values.items()}
