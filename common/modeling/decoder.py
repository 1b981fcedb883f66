"""Decode the levels of an encoder to a feature map as large as the image, like a U-Net.

Ronneberger et al., MICCAI 2015, arXiv 1505.04597. Each step is a 1 x 1 convolution to the step's width,
bilinear interpolation to the size of the encoder's next level, a merge with that level, and two 3 x 3
convolutions. With `skip_connection: concat` the level is concatenated, as in the original. With `add` it is
added and the convolutions are a residual block, as in the triage paper (arXiv 2006.01441). Sizes are taken
from the levels, so image sides need not be divisible by anything.
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
    """A stack of upsampling steps. Maps an encoder's levels to a feature map [N, out_channels, H, W]."""

    def __init__(self, channels: list[int], reductions: list[int], settings: schema.DecoderConfig) -> None:
        """Create one step for each level but the deepest, and one more if no level is as large as the image.

        Args:
            channels: channels of the encoder's levels, the shallowest first.
            reductions: by how much each level is smaller than the image, the shallowest first.
            settings: the widths of the steps, the deepest first. With fewer steps than widths, the last
                widths are used; with more, the deepest steps all have the first width.
        """
        super().__init__()
        skip_widths = channels[-2::-1]
        if reductions[0] > 1:
            skip_widths.append(0)  # the last step has no level to merge with
        adds_levels = settings.skip_connection == "add"
        widths = _match_widths(settings.channels, len(skip_widths))
        steps = []
        in_channels = channels[-1]
        for skip_channels, width in zip(skip_widths, widths, strict=True):
            out_channels = width
            if adds_levels and skip_channels:
                out_channels = skip_channels
            steps.append(UpBlock(in_channels, skip_channels, out_channels, residual=adds_levels))
            in_channels = out_channels
        self.ups = nn.ModuleList(steps)
        self.out_channels = in_channels
        self.grad_checkpointing = False

    def forward(self, levels: list[Tensor], size: tuple[int, int]) -> Tensor:
        """Return the feature map of an image of `size` (H, W) from its levels, the shallowest first."""
        *skips, x = levels
        for step in self.ups:
            skip = skips.pop() if skips else None
            target_size = size if skip is None else skip.shape[-2:]
            if self.grad_checkpointing and self.training:
                x = checkpoint(step, x, skip, target_size, use_reentrant=False)
            else:
                x = step(x, skip, target_size)
        return x


def _match_widths(widths: list[int], num_steps: int) -> list[int]:
    """Return the last widths, preceded by copies of the first where they are fewer than the steps."""
    if num_steps <= len(widths):
        return widths[len(widths) - num_steps :]
    return [widths[0]] * (num_steps - len(widths)) + widths


class UpBlock(nn.Module):
    """One step of the decoder: upsample, merge with a level of the encoder, convolve."""

    def __init__(self, in_channels: int, skip_channels: int, out_channels: int, residual: bool) -> None:
        """Create the layers; `skip_channels` is 0 for a step without a level to merge with."""
        super().__init__()
        self.out_channels = out_channels
        self.residual = residual
        # Applied before the interpolation, with which it commutes: a quarter of the work.
        self.project = nn.Conv2d(in_channels, out_channels, 1)
        self.block: nn.Module
        if residual:
            self.block = ResidualBlock(out_channels, out_channels)
        else:
            self.block = make_double_conv(out_channels + skip_channels, out_channels)

    def forward(self, x: Tensor, skip: Tensor | None, size: tuple[int, int]) -> Tensor:
        """Apply the step to [N, in_channels, h, w]; the result has the given size."""
        x = F.interpolate(self.project(x), size=size, mode="bilinear", align_corners=False)
        if skip is not None:
            x = x + skip if self.residual else torch.cat([x, skip], 1)
        out: Tensor = self.block(x)
        return out


def make_double_conv(in_channels: int, out_channels: int) -> nn.Sequential:
    """Return two 3 x 3 convolutions, each with batch norm and ReLU."""
    layers: list[nn.Module] = []
    for channels in (in_channels, out_channels):
        layers.append(nn.Conv2d(channels, out_channels, 3, padding=1, bias=False))
        layers.append(nn.BatchNorm2d(out_channels))
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)


def make_decoder(encoder: nn.Module, name: str, settings: schema.DecoderConfig) -> Decoder:
    """Return a decoder for a timm encoder.

    Raises:
        ConsiliumError: The encoder does not give access to its levels.
    """
    if not hasattr(encoder, "forward_intermediates") or not hasattr(encoder, "feature_info"):
        raise ConsiliumError(
            f"backbone.name '{name}' has no forward_intermediates, which tasks with a feature map need; "
            "use another backbone, such as densenet121"
        )
    level_info = list(encoder.feature_info)  # type: ignore[arg-type]
    channels = [int(info["num_chs"]) for info in level_info]
    reductions = [int(info["reduction"]) for info in level_info]
    return Decoder(channels, reductions, settings)
