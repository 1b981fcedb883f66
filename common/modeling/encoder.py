"""Create a timm encoder with the normalisation layers that the configuration requires."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import timm
from timm.layers import (  # type: ignore[attr-defined]
    BatchNormAct2d,
    DropPath,
    GroupNormAct,
    freeze_batch_norm_2d,
)
from torch import nn

from common.config.schema import BackboneConfig
from common.modeling.backbones import PAPER_BACKBONES
from common.utils.errors import ConsiliumError, suggest


def check_backbone(backbone: BackboneConfig) -> None:
    """Check that timm knows the backbone.

    Raises:
        ConsiliumError: It does not; the message names the nearest model, or the one that stands for a paper's
            name.
    """
    name = backbone.name
    if timm.is_model(name):
        return
    if name in PAPER_BACKBONES:
        hint = f"; it is '{PAPER_BACKBONES[name]}' here (common/modeling/backbones.py)"
    else:
        hint = suggest(name, timm.list_models())
    raise ConsiliumError(f"backbone.name '{name}' is not a timm model{hint}")


def make_encoder(backbone: BackboneConfig) -> nn.Module:
    """Return the timm encoder without its classifier, with random weights.

    Raises:
        ConsiliumError: timm does not know the backbone, or the backbone has no drop path to set.
    """
    check_backbone(backbone)
    options: dict[str, Any] = {"pretrained": False, "num_classes": 0, "in_chans": 3}
    if backbone.drop_path_rate:
        encoder = _make_encoder_with_drop_path(backbone, options)
    else:
        encoder = timm.create_model(backbone.name, **options)
    return apply_norm_policy(encoder, backbone)


def _make_encoder_with_drop_path(backbone: BackboneConfig, options: dict[str, Any]) -> nn.Module:
    """Return an encoder that drops paths; some of timm's refuse the rate, and some ignore it."""
    rate = backbone.drop_path_rate
    with contextlib.suppress(TypeError):
        encoder: nn.Module = timm.create_model(backbone.name, **options, drop_path_rate=rate)
        if any(isinstance(module, DropPath) and module.drop_prob for module in encoder.modules()):
            return encoder
    raise ConsiliumError(
        f"backbone.drop_path_rate={rate:g} has no effect on '{backbone.name}', which has no paths to drop; "
        "leave it out"
    )


def apply_norm_policy(encoder: nn.Module, backbone: BackboneConfig) -> nn.Module:
    """Replace or freeze the encoder's batch norms as `backbone.norm` requires.

    A frozen batch norm is a fixed scale and shift of every channel.
    """
    if backbone.norm == "group":
        return replace_batch_norms(encoder, backbone.num_groups)
    if backbone.norm == "frozen":
        frozen: nn.Module = freeze_batch_norm_2d(encoder)  # type: ignore[no-untyped-call]
        return frozen
    return encoder


def replace_batch_norms(module: nn.Module, max_groups: int = 32) -> nn.Module:
    """Replace every batch norm, timm's fused ones too, by a group norm with the same affine weights.

    The number of groups is the largest common divisor of `max_groups` and the channels.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, _make_group_norm(child, max_groups))
        else:
            replace_batch_norms(child, max_groups)
    return module


def _make_group_norm(batch_norm: nn.BatchNorm2d, max_groups: int) -> nn.Module:
    """Return a group norm with a batch norm's affine weights, and its activation if it is fused."""
    channels = batch_norm.num_features
    num_groups = math.gcd(channels, max_groups)
    group_norm: nn.Module
    if isinstance(batch_norm, BatchNormAct2d):
        group_norm = GroupNormAct(channels, num_groups=num_groups, eps=batch_norm.eps)
        group_norm.drop = batch_norm.drop
        group_norm.act = batch_norm.act
    else:
        group_norm = nn.GroupNorm(num_groups, channels, eps=batch_norm.eps)
    affine_weights = {"weight": batch_norm.weight.data, "bias": batch_norm.bias.data}
    group_norm.load_state_dict(affine_weights, strict=False)
    return group_norm


def check_no_batch_norm(model: nn.Module) -> None:
    """Check that no layer makes one patient's output depend on the others of the batch.

    With such a layer, no gradient is that of a single patient.

    Raises:
        ConsiliumError: A batch norm is left.
    """
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ConsiliumError(
                f"privacy=patient: the backbone contains a {type(module).__name__}, which backbone.norm can "
                "neither replace nor freeze; use another backbone"
            )


def feature_dim(encoder: nn.Module) -> int:
    """Return the number D of the encoder's features; MobileNetV3, LCNet and GhostNet widen them last."""
    width = getattr(encoder, "head_hidden_size", None)
    if not width:
        width = encoder.num_features
    return int(width)  # type: ignore[arg-type]
