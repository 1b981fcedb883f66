"""Read a run's `model.safetensors`, which contains the weights and the run's configuration."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from common.config.parse import parse_config
from common.config.renamed_keys import upgrade_config
from common.config.schema import Config, Task
from common.learning.losses import UNSUPERVISED_TYPES
from common.modeling.parameters import Array
from common.utils.errors import ConsiliumError


def load_model_file(path: Path) -> tuple[dict[str, Array], Config]:
    """Return ({tensor name: array}, the run's configuration), also of a model saved by version 0.1.0.

    Raises:
        ConsiliumError: The file cannot be read, or is not a model of a run.
    """
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
        config = parse_config(upgrade_config(json.loads(metadata["config"])))
        return load_file(path), config
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ConsiliumError(
            f"{path} is not a Consilium model ({type(error).__name__}); use the model.safetensors of a run"
        ) from error


def inference_tasks(path: Path, config: Config) -> dict[str, Task]:
    """Return the tasks that a model predicts, without those that serve training only.

    Raises:
        ConsiliumError: There is none.
    """
    tasks: dict[str, Task] = {}
    for name, task in config.tasks.items():
        if task.inference and task.type not in UNSUPERVISED_TYPES:
            tasks[name] = task
    if not tasks:
        raise ConsiliumError(
            f"{path} predicts nothing because it was trained without labels ({', '.join(config.tasks)}); "
            "use the model of a run that has a stage with a supervised task"
        )
    return tasks
