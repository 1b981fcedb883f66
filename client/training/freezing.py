"""Which parameters a stage trains, and which stay as they are."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping

from torch import nn

from common.config.schema import Stage, Task
from common.modeling.model import Model, shallow_parameter_names


def freeze(model: Model, stage: Stage, tasks: Mapping[str, Task]) -> None:
    """Freeze the parameters that the stage does not train, and the statistics of frozen batch norms.

    Frozen are the heads of other tasks, the shallow share `stage.freeze_fraction` of the encoder, and what
    the patterns of `stage.freeze` name. Everything else is unfrozen, whatever an earlier stage froze.
    """
    frozen_names = shallow_parameter_names(model, stage.freeze_fraction)
    for pattern in stage.freeze:
        frozen_names.update(fnmatch.filter(model.state_dict(), pattern))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen_names)
    for task_name, head in model.heads.items():
        if task_name not in tasks:
            head.requires_grad_(False)
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and f"{name}.running_mean" in frozen_names:
            module.eval()  # in training mode its statistics would drift under frozen weights


def list_trainable(model: Model, tasks: Mapping[str, Task]) -> list[tuple[str, nn.Parameter]]:
    """List the (name, parameter) pairs that the centre's own optimiser moves.

    Heads that the server moves (`head_update: anchored` or `moments`) are not among them.
    """
    server_side: set[int] = set()
    for name, task in tasks.items():
        if task.head_update != "local":
            server_side.update(map(id, model.heads[name].parameters()))
    trainable = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and id(parameter) not in server_side:
            trainable.append((name, parameter))
    return trainable
