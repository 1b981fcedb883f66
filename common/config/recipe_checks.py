"""Checks of what a recipe learns, what stays at the centres, and how it is scored."""

from __future__ import annotations

from common.config.normalise import stage_tasks
from common.config.schema import Config, Task
from common.utils.errors import ConsiliumError, suggest

# The metrics by which a task of each type can be selected; the others are measured by their loss alone.
METRICS_BY_TYPE: dict[str, tuple[str, ...]] = {
    "binary": ("auc", "f1", "balanced_accuracy", "sensitivity", "specificity", "accuracy", "gmean"),
    "multiclass": ("f1", "balanced_accuracy", "accuracy", "gmean"),
    "regression": ("r2",),
    "segmentation": ("dice", "sensitivity", "spearman"),
}


def check_classes(config: Config) -> None:
    """Raise ConsiliumError where a task's classes are not those that its bin edges or clusters make."""
    for name, task in config.tasks.items():
        if task.bin_edges and len(task.classes) != len(task.bin_edges) + 1:
            raise ConsiliumError(
                f"tasks.{name}.classes has {len(task.classes)} entries for {len(task.bin_edges)} bin_edges; "
                "name one class more than edges, or none"
            )
        numbers = [str(number) for number in range(len(task.classes))]
        if task.num_clusters and not (task.classes == numbers and len(numbers) in _cluster_counts(task)):
            raise ConsiliumError(
                f"tasks.{name}.classes are {task.classes}, but the classes of a task with num_clusters are "
                "its clusters, which have numbers; leave it out"
            )


def _cluster_counts(task: Task) -> list[int]:
    """Return how many clusters a task may have: any of `num_clusters`; the most before they are found."""
    return task.num_clusters if task.clustering_id else [max(task.num_clusters)]


def check_evaluation(config: Config) -> None:
    """Raise ConsiliumError where the best round cannot be chosen as the evaluation asks."""
    federation = config.federation
    task = config.evaluation.task
    if federation.mode == "local" and federation.evaluation == "loco":
        raise ConsiliumError(
            "federation.evaluation=loco tests a centre that did not train, which a local model cannot be; "
            "use federation.mode=federated or central"
        )
    if task not in config.tasks:
        raise ConsiliumError(f"evaluation.task '{task}' is not a task{suggest(task, config.tasks)}")
    if not any(task in stage_tasks(config, stage) for stage in config.stages.values()):
        raise ConsiliumError(
            f"evaluation.task '{task}' has no effect: no stage that is played has the task; choose another"
        )
    _check_metric(config)


def _check_metric(config: Config) -> None:
    task = config.evaluation.task
    metric = config.evaluation.metric
    metrics = METRICS_BY_TYPE.get(config.tasks[task].type)
    if metrics and metric not in metrics:
        raise ConsiliumError(
            f"evaluation.metric={metric} has no effect on task '{task}', which is {config.tasks[task].type}; "
            f"use one of {', '.join(metrics)}"
        )
    if metric == "spearman" and not config.tasks[task].severity_column:
        raise ConsiliumError(
            f"evaluation.metric=spearman has no effect on task '{task}', which has no severity_column; "
            "name the column with the known severity, or use dice"
        )


def check_batch_norms_exist(config: Config, stage_name: str) -> None:
    """Raise ConsiliumError where batch norms are to stay at the centres, and there are none.

    Where privacy replaces them, its own checks say so.
    """
    keeps_batch_norms = "batch_norm" in config.stages[stage_name].local_layers
    if keeps_batch_norms and config.backbone.norm == "group" and config.privacy.dp_level == "none":
        raise ConsiliumError(
            f"stages.{stage_name}.local_layers=[batch_norm] has no effect with backbone.norm=group, which "
            "leaves no batch norm; leave one of the two out"
        )


def check_server_learning_rate(config: Config) -> None:
    """Raise ConsiliumError for an adaptive method with the learning rate of plain averaging."""
    settings = config.aggregation
    if settings.method != "fedavg" and settings.server_lr >= 1:
        raise ConsiliumError(
            f"aggregation.method={settings.method} with aggregation.server_lr={settings.server_lr:g} would "
            f"move every weight by about that much in a round; use aggregation={settings.method}, which sets "
            "0.003, or give aggregation.server_lr"
        )


def check_local_layers(config: Config) -> None:
    """Raise ConsiliumError where what stays at the centres in one stage is exchanged in a later one."""
    federation = config.federation
    kept: set[str] = set()
    first_stage = ""
    for name, stage in config.stages.items():
        missing = sorted(kept - set(stage.local_layers))
        if missing and "all" not in stage.local_layers:
            raise ConsiliumError(
                f"stages.{name}.local_layers lacks '{missing[0]}', which stage '{first_stage}' keeps at the "
                f"centres; add it to stages.{name}.local_layers"
            )
        if stage.local_layers and not kept:
            first_stage = name
        kept |= set(stage.local_layers)
    tests_others = federation.evaluation == "loco" or bool(federation.held_out_centres)
    if kept and tests_others and federation.mode == "federated":
        raise ConsiliumError(
            f"stages.{first_stage}.local_layers keeps layers at the centres that train, and "
            "federation.evaluation=loco tests a centre that does not train and so has none of its own; "
            "leave one of the two out"
        )
