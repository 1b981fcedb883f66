"""The first weights of a run: random, from timm's hub, or from a file.

Only the coordinator makes them: hospitals need no internet.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file

from common.config.schema import BackboneConfig, Config
from common.learning.seeds import derive_seed
from common.modeling.encoder import apply_norm_policy, check_no_batch_norm
from common.modeling.model import Model, make_model
from common.utils.errors import ConsiliumError

StateDict = Mapping[str, torch.Tensor]


def build_initial_model(config: Config) -> Model:
    """Build the model that a run starts from: encoder from `backbone.weights`, decoder and heads by the seed.

    Raises ConsiliumError when the weights are not available or do not fit the backbone.
    """
    model = make_model(config.backbone, config.tasks, derive_seed(config.seed, "initial"))
    if config.privacy.dp_level != "none":
        check_no_batch_norm(model)
    if config.backbone.weights == "random":
        return model
    if config.backbone.weights == "timm":
        weights = fetch_timm_weights(config.backbone)
    else:
        weights = load_encoder_weights(Path(config.backbone.weights).expanduser())
    encoder_weights = model.encoder.state_dict()
    _check_fit(config.backbone, encoder_weights, weights)
    model.encoder.load_state_dict({name: weights[name] for name in encoder_weights})
    return model


def fetch_timm_weights(backbone: BackboneConfig) -> StateDict:
    """Fetch the state dict of timm's pretrained encoder. Raises ConsiliumError if it is not available."""
    if not timm.models.is_model_pretrained(backbone.name):
        raise ConsiliumError(
            f"timm has no weights for '{backbone.name}'; give a file "
            "(backbone.weights=/path/weights.safetensors) or backbone.weights=random"
        )
    try:
        encoder = timm.create_model(backbone.name, pretrained=True, num_classes=0, in_chans=3)
    except Exception as error:  # the hub's client raises many kinds
        raise ConsiliumError(
            f"timm's weights for '{backbone.name}' could not be fetched ({type(error).__name__}); "
            "the coordinator needs internet for backbone.weights=timm: give a file "
            "(backbone.weights=/path/weights.safetensors) or backbone.weights=random"
        ) from error
    state_dict: StateDict = apply_norm_policy(encoder, backbone).state_dict()
    return state_dict


def load_encoder_weights(path: Path) -> StateDict:
    """Load an encoder's state dict from .safetensors or .pth (tensors only), without the prefix ``encoder.``.

    Raises ConsiliumError.
    """
    try:
        if path.suffix == ".safetensors":
            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ConsiliumError(
            f"backbone.weights '{path}' does not exist; give a file, 'timm' or 'random'"
        ) from error
    except Exception as error:
        raise ConsiliumError(
            f"backbone.weights '{path}' cannot be read as weights ({type(error).__name__}); "
            "give .safetensors or .pth"
        ) from error
    return {name.removeprefix("encoder."): tensor for name, tensor in weights.items()}


def _check_fit(backbone: BackboneConfig, expected: StateDict, weights: StateDict) -> None:
    """Raise ConsiliumError where a tensor of the encoder is missing in the weights or has another shape."""
    mismatch = _describe_mismatch(backbone, expected, weights)
    if mismatch:
        raise ConsiliumError(
            f"the weights '{backbone.weights}' do not fit backbone '{backbone.name}': the file {mismatch}; "
            "name the backbone they were made for"
        )


def _describe_mismatch(backbone: BackboneConfig, expected: StateDict, weights: StateDict) -> str:
    wrong_shape = ""
    for name, tensor in expected.items():
        if name not in weights:
            is_batch_statistic = "running" in name or "num_batches" in name
            if not (backbone.norm == "group" and is_batch_statistic):
                return f"lacks '{name}'"
        elif weights[name].shape != tensor.shape and not wrong_shape:
            wrong_shape = f"has '{name}' of shape {tuple(weights[name].shape)}, not {tuple(tensor.shape)}"
    return wrong_shape
