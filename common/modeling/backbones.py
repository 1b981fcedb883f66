"""Register encoders that timm lacks, and map the papers' names of backbones to timm's.

- `mobilenetv1_075`: MobileNetV1 (Howard et al., arXiv 1704.04861) of width 0.75 with TensorFlow's "same"
  padding, for weights converted from TensorFlow.js. It needs images scaled to [-1, 1] (`backbone.mean` and
  `backbone.std` 0.5).
- `residual_unet`: common/modeling/residual_unet.py.
"""

from __future__ import annotations

from typing import Any

from timm.models import register_model
from timm.models.efficientnet import _gen_mobilenet_v1
from torch import nn

import common.modeling.residual_unet  # noqa: F401  (registers `residual_unet`)

# The 18 backbones of the prognosis paper, arXiv 2405.13771: {the paper's name: timm's name}
PROGNOSIS_BACKBONES = {
    "DenseNet121": "densenet121",
    "DenseNet161": "densenet161",
    "DenseNet169": "densenet169",
    "DenseNet201": "densenet201",
    "EfficientNet-B0": "efficientnet_b0",
    "EfficientNet-B1-pruned": "efficientnet_b1_pruned",
    "EfficientNet-ES": "efficientnet_es",
    "EfficientNet-ES-pruned": "efficientnet_es_pruned",
    "EfficientNet-lite0": "efficientnet_lite0",
    # Not in timm. Its successor has 21.8 M parameters instead of 5.6 M and needs images of at least 75
    # pixels.
    "GoogLeNet": "inception_v3",
    "MobileNetV2": "mobilenetv2_100",
    "ResNet18": "resnet18",
    "ResNet34": "resnet34",
    "ResNet50": "resnet50",
    "ResNet101": "resnet101",
    "Wide-ResNet-50-2": "wide_resnet50_2",
    # Not in timm. These are the nearest in size with ImageNet weights (ghostnet_050 has none), with 1000
    # classes:
    "ShuffleNetV2-x0.5": "lcnet_050",  # 1.9 M parameters, 48 M multiply-adds; the paper's: 1.4 M, 41 M
    "ShuffleNetV2-x1.0": "lcnet_100",  # 3.0 M parameters, 161 M multiply-adds; the paper's: 2.3 M, 146 M
}
# The backbones of Martinez, "Multi-Source Transfer Learning", 2020
TRANSFER_BACKBONES = {
    "DenseNet121": "densenet121",
    "DenseNet169": "densenet169",
    "ResNet50V2": "resnetv2_50",
    "ResNet101V2": "resnetv2_101",
}
PAPER_BACKBONES = {**PROGNOSIS_BACKBONES, **TRANSFER_BACKBONES}


@register_model
def mobilenetv1_075(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Create MobileNetV1 x 0.75: 2.6 M parameters, 768 features."""
    model: nn.Module = _gen_mobilenet_v1(  # type: ignore[no-untyped-call]
        "mobilenetv1_100", channel_multiplier=0.75, pad_type="same", bn_eps=1e-3, pretrained=False, **kwargs
    )
    return model
