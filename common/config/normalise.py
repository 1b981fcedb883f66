"""What follows from a configuration.

Unused parts dropped, class names filled in, norms and modes made consistent.
"""

from __future__ import annotations

import dataclasses
from dataclasses import replace

from common.config.schema import Config, Stage, Task


def normalise_config(config: Config) -> Config:
    """Return the configuration with everything that follows from it made explicit."""
    config = _drop_unused(config)
    tasks = {name: _fill_class_names(task) for name, task in config.tasks.items()}
    config = replace(config, tasks=tasks)
    if config.privacy.dp_level != "none" and config.backbone.norm == "batch":
        # Batch norms depend on the batch's other patients; all centres must have the same architecture.
        config = replace(config, backbone=replace(config.backbone, norm="group"))
    if config.federation.mode == "local":
        config = _keep_everything_local(config)
    return config


def stage_tasks(config: Config, stage: Stage) -> list[str]:
    """Return the names of a stage's tasks."""
    return stage.tasks or list(config.tasks)


def _drop_unused(config: Config) -> Config:
    """Drop stages without rounds, and tasks that neither a stage nor the evaluation uses."""
    stages = {name: stage for name, stage in config.stages.items() if stage.rounds}
    used = {config.evaluation.task}
    for stage in stages.values():
        used.update(stage_tasks(config, stage))
    tasks = {name: task for name, task in config.tasks.items() if name in used}
    return replace(config, stages=stages, tasks=tasks)


def _fill_class_names(task: Task) -> Task:
    """Name a multiclass task's classes where its bin edges or clusters say how many there are."""
    if task.type != "multiclass" or task.classes:
        return task
    if task.bin_edges:
        edges = [f"{edge:g}" for edge in task.bin_edges]
        classes = [f"<={edge}" for edge in edges]
        return replace(task, classes=[*classes, f">{edges[-1]}"])
    if task.num_clusters:
        return replace(task, classes=[str(number) for number in range(max(task.num_clusters))])
    return task


def _keep_everything_local(config: Config) -> Config:
    """Let every centre train by itself (``federation.mode=local``)."""
    stages = {name: dataclasses.replace(stage, local_layers=["all"]) for name, stage in config.stages.items()}
    tasks = {name: dataclasses.replace(task, head_update="local") for name, task in config.tasks.items()}
    return replace(config, stages=stages, tasks=tasks)
