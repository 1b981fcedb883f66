"""A U-Net's way up (Ronneberger et al., MICCAI 2015, arXiv 1505.04597) from the levels of any timm encoder to a map as large as the picture.

Every step: 1 x 1 convolution to the level's width, bilinear up to the size of what it is merged with, merge, two 3 x 3 convolutions.
`merge: concat` puts the encoder's level beside it, as the original; `merge: add` adds it and makes the convolutions a residual block, as the
triage paper does (arXiv 2006.01441). Sizes are taken from the levels themselves, so that a picture's side need not divide by anything.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.config import schema
from common.modeling.residual_unet import ResidualBlock
from common.utils.errors import ConsiliumError


class Decoder(nn.Module):
    """Levels of an encoder from the shallowest down -> map [N, out_channels, H, W]."""

    def __init__(self, channels: list[int], reductions: list[int], settings: schema.DecoderConfig) -> None:
        """`channels` and `reductions` of the encoder's levels from the shallowest down. A level that is not as large as the picture is followed
        by one more step without a merge. Fewer steps than widths: the last widths are used; more: the deepest steps all take the first.
        """
        super().__init__()
        skips = channels[-2::-1] + ([0] if reductions[0] > 1 else [])
        widths = (
            ([settings.channels[0]] * len(skips) + settings.channels)[len(settings.channels) :]
            if skips
            else []
        )
        add = settings.skip_connection == "add"
        ups, c = [], channels[-1]
        for skip, width in zip(skips, widths, strict=True):
            ups.append(UpBlock(c, skip, (skip or width) if add else width, add))
            c = ups[-1].out_channels
        self.ups = nn.ModuleList(ups)
        self.out_channels = c
        self.grad_checkpointing = False

    def forward(self, levels: list[Tensor], size: tuple[int, int]) -> Tensor:
        """`size` is the picture's (H, W)."""
        *skips, x = levels
        for up in self.ups:
            skip = skips.pop() if skips else None
            to = skip.shape[-2:] if skip is not None else size
            x = (
                checkpoint(up, x, skip, to, use_reentrant=False)
                if self.grad_checkpointing and self.training
                else up(x, skip, to)
            )
        return x


class UpBlock(nn.Module):
    """One step: `c` channels, merged with `skip` channels (0: with none), give `width`."""

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int, residual: bool) -> None:
        super().__init__()
        self.out_channels, self.residual = out_channels, residual
        self.project = nn.Conv2d(
            in_channels, out_channels, 1
        )  # before the interpolation, with which it commutes: a quarter of the work
        self.block = (
            ResidualBlock(out_channels, out_channels)
            if residual
            else make_double_conv(out_channels + skip_channels, out_channels)
        )

    def forward(self, x: Tensor, skip: Tensor | None, size: tuple[int, int]) -> Tensor:
        x = F.interpolate(self.project(x), size=size, mode="bilinear", align_corners=False)
        if skip is not None:
            x = x + skip if self.residual else torch.cat([x, skip], 1)
        out: Tensor = self.block(x)
        return out


def make_double_conv(in_channels: int, out_channels: int) -> nn.Sequential:
    """Two 3 x 3 convolutions with norm and ReLU."""
    parts: list[nn.Module] = []
    for ins in (in_channels, out_channels):
        parts += [
            nn.Conv2d(ins, out_channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(out_channels),
            nn.ReLU(),
        ]
    return nn.Sequential(*parts)


def make_decoder(encoder: nn.Module, name: str, settings: schema.DecoderConfig) -> Decoder:
    """A decoder for a timm encoder. Raises ConsiliumError when the encoder does not show its levels."""
    if not hasattr(encoder, "forward_intermediates") or not hasattr(encoder, "feature_info"):
        raise ConsiliumError(
            f"backbone.name '{name}' has no forward_intermediates, which a task with a map needs; take another, e.g. densenet121"
        )
    info = list(encoder.feature_info)  # type: ignore[arg-type]
    return Decoder([int(i["num_chs"]) for i in info], [int(i["reduction"]) for i in info], settings)
