"""The residual U-Net's way down, as the triage paper has it (arXiv 2006.01441): 8 channels at full resolution, twice as many at each half.

Registered with timm as `residual_unet`; with `backbone.decoder.skip_connection=add` the decoder makes it the paper's network, and the map has 8 channels.
That a level is one block and is halved by a stride is ours: the paper's text does not say.
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
    """Two 3 x 3 convolutions beside a shortcut (He et al., CVPR 2016, figure 2): [N, c, H, W] -> [N, width, ceil(H / stride), ...]."""

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, drop_path: float = 0.0) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(out_channels)
        self.act = nn.ReLU()
        self.drop = DropPath(drop_path) if drop_path else nn.Identity()
        self.shortcut: nn.Module = nn.Identity()
        if stride > 1 or in_channels != out_channels:
            # ResNet-D's (He et al., CVPR 2019): averaged, not strided, which would pass three quarters of the pixels over. In channels_last,
            # the backward pass of a strided 1 x 1 convolution of 8 channels also kills the process on CPUs (torch 2.15, oneDNN).
            pool = (
                nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)
                if stride > 1
                else nn.Identity()
            )
            self.shortcut = nn.Sequential(
                pool, nn.Conv2d(in_channels, out_channels, 1, bias=False), nn.BatchNorm2d(out_channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))
        out: Tensor = self.act(self.shortcut(x) + self.drop(y))
        return out


class ResidualUNet(nn.Module):
    """An encoder with timm's interface. The side of a picture need not divide by 64: halves are rounded up."""

    def __init__(self, num_classes: int = 0, in_chans: int = 3, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        self.num_features = LEVEL_WIDTHS[-1]
        self.feature_info = [
            {"num_chs": w, "reduction": 2**i, "module": f"levels.{i}"} for i, w in enumerate(LEVEL_WIDTHS)
        ]
        ins, rates = (in_chans, *LEVEL_WIDTHS), torch.linspace(0, drop_path_rate, len(LEVEL_WIDTHS)).tolist()
        self.levels = nn.ModuleList(
            ResidualBlock(ins[i], w, 2 if i else 1, rates[i]) for i, w in enumerate(LEVEL_WIDTHS)
        )
        self.fc = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()
        self.grad_checkpointing = False
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.grad_checkpointing = enable

    def forward_intermediates(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The deepest level, and all seven from full resolution down."""
        levels = []
        for level in self.levels:
            x = (
                checkpoint(level, x, use_reentrant=False)
                if self.grad_checkpointing and self.training
                else level(x)
            )
            levels.append(x)
        return x, levels

    def forward_head(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc(x.mean((2, 3)))
        return out

    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_intermediates(x)[0])


@register_model
def residual_unet(
    num_classes: int = 1000, in_chans: int = 3, drop_path_rate: float = 0.0, **_: Any
) -> nn.Module:
    """4.9 M parameters, 512 features, seven levels from reduction 1 to 64. What else timm gives is about pretrained weights, of which none exist."""
    return ResidualUNet(num_classes, in_chans, drop_path_rate)
