"""Build the model that a centre trains or scores: received weights and the centre's own layers."""

from __future__ import annotations

from client.federation.personal_parameters import overlay_parameters
from client.federation.run_context import RunContext
from common.config.schema import Stage
from common.modeling.model import Model, make_model
from common.modeling.parameters import Weights, build_layout, set_model_weights


def build_model(
    context: RunContext, stage: Stage, weights: Weights, personal_rounds: list[tuple[str, int]]
) -> Model:
    """Return the model with the received weights, overlaid by the centre's own layers of (stage, round)."""
    config = context.config
    model = make_model(config.backbone, config.tasks, 0, stage.channels_last, stage.grad_checkpointing)
    rounds = [(str(stage_name), int(round_number)) for stage_name, round_number in personal_rounds]
    merged = overlay_parameters(context.local_layers_dir, context.run_id, rounds, weights)
    set_model_weights(model, build_layout(model), merged)
    return model
