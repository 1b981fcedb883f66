"""A run's `model.safetensors`: weights with the run's configuration beside them."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from common.config.compose import parse_config
from common.config.schema import Config, Task
from common.learning.losses import UNSUPERVISED_TYPES
from common.modeling.parameters import Array
from common.utils.errors import ConsiliumError


def load_model_file(path: Path) -> tuple[dict[str, Array], Config]:
    """({tensor name: array}, the run's configuration). Raises ConsiliumError."""
    try:
        with safe_open(path, framework="np") as file:
            config = parse_config(json.loads((file.metadata() or {})["config"]))
        return load_file(path), config
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ConsiliumError(
            f"{path} is not a model of ours ({type(error).__name__}); give the model.safetensors of a run"
        ) from error


def inference_tasks(path: Path, config: Config) -> dict[str, Task]:
    """The tasks that the model predicts, without those that serve training only. Raises ConsiliumError where there is none."""
    tasks = {
        name: task
        for name, task in config.tasks.items()
        if task.inference and task.type not in UNSUPERVISED_TYPES
    }
    if not tasks:
        raise ConsiliumError(
            f"{path} predicts nothing: it was taught by the scans alone ({', '.join(config.tasks)}); "
            "give the model of a run with a stage for a task"
        )
    return tasks
