"""The encoder of the recorded runs, of 400 weights so that their files are small.

Importing this module registers it with timm as `tiny_net`.
"""

from __future__ import annotations

from typing import Any

from timm.models import register_model
from torch import Tensor, nn


class TinyNet(nn.Module):
    """[N, 3, H, W] -> [N, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.num_features = 8
        self.conv1 = nn.Conv2d(3, 4, 3, stride=4, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 8, 3, stride=2, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(8)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm1(self.conv1(x)))
        features: Tensor = self.act(self.norm2(self.conv2(x))).mean((2, 3))
        return features


@register_model
def tiny_net(**_: Any) -> nn.Module:
    """Whatever timm asks for: there are no weights to fetch and no classifier."""
    return TinyNet()
