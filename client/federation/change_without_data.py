"""Compute how a round would change the weights without any data: by weight decay alone.

Whoever knows the configuration and the weights knows this change, so that it covers nobody in a secure sum.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from client.federation.local_model import build_model
from client.federation.run_context import RunContext
from client.training.freezing import freeze, list_trainable
from client.training.optimiser import LocalOptimiser
from client.training.trainer import TrainSpec
from common.config.normalise import stage_tasks
from common.modeling.parameters import build_layout, get_model_weights
from common.protocol.messages import TrainRequest


def compute_change_without_data(
    context: RunContext, request: TrainRequest, num_steps: int
) -> NDArray[np.float32] | None:
    """Return the change [P] of the weights by steps with gradients of zero; None where it is zero.

    It is zero, too, for the noisy gradients of `privacy=patient`: nobody knows the noise.
    """
    config = context.config
    stage = config.stages[request.stage]
    if not stage.optimiser.weight_decay or config.privacy.dp_level == "patient":
        return None
    tasks = {name: config.tasks[name] for name in stage_tasks(config, stage)}
    progress = ((request.round - 1) / stage.rounds, request.round / stage.rounds)
    spec = TrainSpec(stage, tasks, stage_progress=progress, num_steps=num_steps, lr_scale=request.lr_scale)
    model = build_model(context, stage, request.weights, request.personal_rounds)
    layout = build_layout(model)
    before = get_model_weights(model, layout)
    freeze(model, stage, tasks)
    optimiser = LocalOptimiser(list_trainable(model, tasks), [], stage, torch.device("cpu"))
    for step in range(num_steps):
        optimiser.set_learning_rate(spec.learning_rate(step))
        for parameter in optimiser.parameters:
            parameter.grad = torch.zeros_like(parameter)
        optimiser.step()
    return get_model_weights(model, layout).floats - before.floats
