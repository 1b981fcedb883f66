"""The first weights of a run: random, from timm's hub, or from a file. Made at the coordinator alone: hospitals need no internet."""

from __future__ import annotations

from pathlib import Path

import timm
import torch
from safetensors.torch import load_file

from common.config.schema import Config
from common.learning.seeds import derive_seed
from common.modeling.model import Model, apply_norm_policy, check_no_batch_norm, make_model
from common.utils.errors import ConsiliumError


def build_initial_model(config: Config) -> Model:
    """The model that a run starts from: its encoder from `backbone.weights`, decoder and heads random by the seed.

    Raises ConsiliumError when the weights cannot be had or do not fit.
    """
    model = make_model(config.backbone, config.tasks, derive_seed(config.seed, "initial"))
    if config.privacy.dp_level != "none":
        check_no_batch_norm(model)
    source = config.backbone.weights
    if source == "random":
        return model
    if source == "timm":
        if not timm.models.is_model_pretrained(config.backbone.name):
            raise ConsiliumError(
                f"timm has no weights for '{config.backbone.name}'; give a file (backbone.weights=/path/weights.safetensors) or "
                "backbone.weights=random"
            )
        try:
            encoder = timm.create_model(config.backbone.name, pretrained=True, num_classes=0, in_chans=3)
        except Exception as error:  # the hub's client raises many kinds
            raise ConsiliumError(
                f"timm's weights for '{config.backbone.name}' could not be fetched ({type(error).__name__}); the coordinator needs internet for "
                "backbone.weights=timm: give a file (backbone.weights=/path/weights.safetensors) or backbone.weights=random"
            ) from error
        state = apply_norm_policy(encoder, config.backbone).state_dict()
    else:
        state = load_encoder_weights(Path(source).expanduser())
    own = model.encoder.state_dict()
    missing = [k for k in own if k not in state]
    wrong = [k for k in own if k in state and own[k].shape != state[k].shape]
    if config.backbone.norm == "group":
        missing = [k for k in missing if "running" not in k and "num_batches" not in k]
    if missing or wrong:
        if missing:
            what = f"lacks '{missing[0]}'"
        else:
            what = (
                f"has '{wrong[0]}' of shape {tuple(state[wrong[0]].shape)}, not {tuple(own[wrong[0]].shape)}"
            )
        raise ConsiliumError(
            f"the weights '{source}' do not fit backbone '{config.backbone.name}': the file {what}; name the backbone they were made for"
        )
    model.encoder.load_state_dict({k: state[k] for k in own})
    return model


def load_encoder_weights(path: Path) -> dict[str, torch.Tensor]:
    """An encoder's state dict from .safetensors or .pth (tensors only); our own `encoder.` prefix is taken off. Raises ConsiliumError."""
    try:
        state = (
            load_file(path)
            if path.suffix == ".safetensors"
            else torch.load(path, map_location="cpu", weights_only=True)
        )
    except FileNotFoundError as error:
        raise ConsiliumError(
            f"backbone.weights '{path}' does not exist; give a file, 'timm' or 'random'"
        ) from error
    except Exception as error:
        raise ConsiliumError(
            f"backbone.weights '{path}' cannot be read as weights ({type(error).__name__}); give .safetensors or .pth"
        ) from error
    return {k.removeprefix("encoder."): v for k, v in state.items()}
