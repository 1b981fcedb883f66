"""Define the encoder of a residual U-Net: 8 channels at full resolution, twice as many at each halving.

It follows the triage paper (arXiv 2006.01441). With `backbone.decoder.skip_connection=add` the decoder
completes the paper's network, whose feature map has 8 channels. The paper does not say how many blocks a
level has and how it is halved; here a level is one block, halved by a stride.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import DropPath  # type: ignore[attr-defined]
from timm.models import register_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

LEVEL_WIDTHS = (8, 16, 32, 64, 128, 256, 512)


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut (He et al., CVPR 2016, figure 2).

    Maps [N, in_channels, H, W] to [N, out_channels, ceil(H / stride), ceil(W / stride)].
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, drop_path: float = 0.0) -> None:
        """Create the layers."""
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.act = nn.ReLU()
        self.drop = DropPath(drop_path) if drop_path else nn.Identity()
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != out_channels:
            self.shortcut = make_projection_shortcut(in_channels, out_channels, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block."""
        residual = self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))
        out: Tensor = self.act(self.shortcut(x) + self.drop(residual))
        return out


def make_projection_shortcut(in_channels: int, out_channels: int, stride: int) -> nn.Sequential:
    """Return the shortcut of ResNet-D (He et al., CVPR 2019), which averages pixels before its convolution.

    A strided convolution would ignore three quarters of the pixels. Also, in channels_last, the backward pass
    of a strided 1 x 1 convolution of 8 channels crashes the process on CPUs (torch 2.15, oneDNN).
    """
    pool: nn.Module = nn.Identity()
    if stride > 1:
        pool = nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)
    projection = nn.Conv2d(in_channels, out_channels, 1, bias=False)
    return nn.Sequential(pool, projection, nn.BatchNorm2d(out_channels))


class ResidualUNet(nn.Module):
    """An encoder with timm's interface. Image sides need not be divisible by 64: halves are rounded up."""

    def __init__(self, num_classes: int = 0, in_chans: int = 3, drop_path_rate: float = 0.0) -> None:
        """Create the seven levels; `drop_path_rate` is that of the deepest, and grows linearly from 0."""
        super().__init__()
        self.num_features = LEVEL_WIDTHS[-1]
        self.feature_info: list[dict[str, Any]] = []
        drop_path_rates = torch.linspace(0, drop_path_rate, len(LEVEL_WIDTHS)).tolist()
        levels = []
        in_channels = in_chans
        for index, width in enumerate(LEVEL_WIDTHS):
            stride = 1 if index == 0 else 2
            levels.append(ResidualBlock(in_channels, width, stride, drop_path_rates[index]))
            self.feature_info.append({"num_chs": width, "reduction": 2**index, "module": f"levels.{index}"})
            in_channels = width
        self.levels = nn.ModuleList(levels)
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.grad_checkpointing = False
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each level in the backward pass instead of storing its activations."""
        self.grad_checkpointing = enable

    def forward_intermediates(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the deepest level's output, and those of all seven levels from full resolution down."""
        outputs = []
        for level in self.levels:
            if self.grad_checkpointing and self.training:
                x = checkpoint(level, x, use_reentrant=False)
            else:
                x = level(x)
            outputs.append(x)
        return x, outputs

    def forward_head(self, x: Tensor) -> Tensor:
        """Return the output [N, features or classes] from the deepest level's."""
        out: Tensor = self.fc(x.mean((2, 3)))
        return out

    def forward(self, x: Tensor) -> Tensor:
        """Return the output [N, features or classes] for images [N, in_chans, H, W]."""
        deepest, _ = self.forward_intermediates(x)
        return self.forward_head(deepest)


@register_model
def residual_unet(
    num_classes: int = 1000, in_chans: int = 3, drop_path_rate: float = 0.0, **_: Any
) -> nn.Module:
    """Create the encoder: 4.9 M parameters, 512 features, seven levels from reduction 1 to 64.

    timm's other arguments concern pretrained weights, of which there are none.
    """
    return ResidualUNet(num_classes, in_chans, drop_path_rate)
