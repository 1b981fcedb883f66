"""Encoders that timm does not carry under a name of its own, registered so that `backbone.name` finds them.

`mobilenetv1_075`: MobileNetV1 (Howard et al., arXiv 1704.04861) of width 0.75 with TensorFlow's "same" padding, for weights converted from
TensorFlow.js; its pictures are scaled to [-1, 1] (`backbone.mean`, `backbone.std` = 0.5).
"""

from __future__ import annotations

from typing import Any

from timm.models import register_model
from timm.models.efficientnet import _gen_mobilenet_v1
from torch import nn


@register_model
def mobilenetv1_075(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MobileNetV1 x 0.75: 2.6 M parameters, 768 features."""
    model: nn.Module = _gen_mobilenet_v1(  # type: ignore[no-untyped-call]
        "mobilenetv1_100", channel_multiplier=0.75, pad_type="same", bn_eps=1e-3, pretrained=False, **kwargs
    )
    return model
