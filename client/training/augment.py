"""Random augmentation of training slices, each slice on its own, with the same operations on CPU and GPU.

Masks follow whatever moves pixels; what changes grey values, or covers them, leaves masks as they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from common.config.schema import AugmentConfig
from common.learning.losses import IGNORE_INDEX

ELASTIC_KNOTS = 5  # along each side, of the coarse grid that an elastic deformation is drawn on


@dataclass
class RandomSource:
    """Random numbers from a CPU generator, moved to the slices' device."""

    generator: torch.Generator
    device: torch.device

    def draw(self, *shape: int) -> Tensor:
        """Draw uniform numbers in [0, 1)."""
        return torch.rand(*shape, generator=self.generator).to(self.device)

    def draw_symmetric(self, limit: float, *shape: int) -> Tensor:
        """Draw uniform numbers in [-limit, limit)."""
        return (2 * self.draw(*shape) - 1) * limit


@dataclass
class Images:
    """Slices [N, H, W], and their masks where there are any."""

    slices: Tensor
    masks: Tensor | None

    def resample(self, rows: Tensor, grid: Tensor) -> None:
        """Read the slices of `rows`, and their masks, at the positions of `grid` [len(rows), H, W, 2]."""
        self.slices = resample_images(self.slices, rows, grid, "bilinear")
        if self.masks is not None:
            self.masks = resample_images(self.masks, rows, grid, "nearest")


@overload
def augment_slices(
    slices: Tensor, settings: AugmentConfig, generator: torch.Generator, masks: None = None
) -> Tensor: ...
@overload
def augment_slices(
    slices: Tensor, settings: AugmentConfig, generator: torch.Generator, masks: Tensor
) -> tuple[Tensor, Tensor]: ...
def augment_slices(
    slices: Tensor, settings: AugmentConfig, generator: torch.Generator, masks: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """Augment slices at random, and their masks by the same movements.

    Args:
        slices: [N, H, W] in [0, 1].
        settings: Probabilities and sizes of the changes.
        generator: CPU generator; masks change nothing in what is drawn.
        masks: uint8 [N, H, W]. Read at the nearest pixel; what enters from outside is 0, and a mask that is
            IGNORE_INDEX throughout stays so.

    Returns:
        The augmented slices, or (slices, masks) when there are masks.
    """
    random = RandomSource(generator, slices.device)
    images = Images(slices, masks)
    _flip(images, settings, random)
    _apply_affine(images, settings, random)
    if settings.p_elastic > 0:  # otherwise it draws nothing, and later draws stay what they are without it
        _deform(images, settings, random)
    augmented = _change_brightness(images.slices, settings, random)
    augmented = _cut_holes(augmented, settings, random)
    if masks is None or images.masks is None:
        return augmented
    is_unknown = (masks == IGNORE_INDEX).flatten(1).all(1)
    return augmented, images.masks.masked_fill(is_unknown[:, None, None], IGNORE_INDEX)


def _flip(images: Images, settings: AugmentConfig, random: RandomSource) -> None:
    """Mirror some slices left to right."""
    is_flipped = (random.draw(len(images.slices)) < settings.p_flip)[:, None, None]
    images.slices = torch.where(is_flipped, images.slices.flip(-1), images.slices)
    if images.masks is not None:
        images.masks = torch.where(is_flipped, images.masks.flip(-1), images.masks)


def _apply_affine(images: Images, settings: AugmentConfig, random: RandomSource) -> None:
    """Rotate, scale and translate some slices."""
    num_slices, height, width = images.slices.shape
    is_moved = random.draw(num_slices) < settings.p_affine
    angle = random.draw_symmetric(math.radians(settings.rotate), num_slices)
    scale = 1 + random.draw_symmetric(settings.scale, num_slices)
    shift = random.draw_symmetric(2 * settings.translate, num_slices, 2)  # in affine_grid the side is 2 long
    rows = is_moved.nonzero().squeeze(1)
    if not len(rows):
        return
    cos = torch.cos(angle) / scale
    sin = torch.sin(angle) / scale
    x_row = torch.stack([cos, -sin, shift[:, 0]], 1)
    y_row = torch.stack([sin, cos, shift[:, 1]], 1)
    matrices = torch.stack([x_row, y_row], 1)[rows]
    grid = F.affine_grid(matrices, [len(rows), 1, height, width], align_corners=False)
    images.resample(rows, grid)


def _deform(images: Images, settings: AugmentConfig, random: RandomSource) -> None:
    """Deform some slices elastically."""
    num_slices, height, width = images.slices.shape
    rows = (random.draw(num_slices) < settings.p_elastic).nonzero().squeeze(1)
    knots = random.draw_symmetric(1.0, num_slices, 2, ELASTIC_KNOTS, ELASTIC_KNOTS)[rows]
    if len(rows):
        images.resample(rows, make_elastic_grid(knots, settings.elastic_displacement, height, width))


def _change_brightness(slices: Tensor, settings: AugmentConfig, random: RandomSource) -> Tensor:
    """Change contrast and brightness of some slices."""
    num_slices = len(slices)
    is_changed = (random.draw(num_slices) < settings.p_brightness).float()
    contrast = 1 + is_changed * random.draw_symmetric(settings.contrast, num_slices)
    brightness = is_changed * random.draw_symmetric(settings.brightness, num_slices)
    is_shifted = (random.draw(num_slices) < settings.p_hsv_value).float()
    brightness = brightness + is_shifted * random.draw_symmetric(settings.hsv_value_shift, num_slices)
    return (slices * contrast[:, None, None] + brightness[:, None, None]).clamp(0, 1)


def _cut_holes(slices: Tensor, settings: AugmentConfig, random: RandomSource) -> Tensor:
    """Cover square holes of some slices with black."""
    num_slices, height, width = slices.shape
    is_cut = random.draw(num_slices) < settings.p_cutout
    centres = random.draw(num_slices, settings.cutout_num_holes, 2)  # (y, x) as shares of the side
    if not settings.cutout_num_holes or not bool(is_cut.any()):
        return slices
    half_side = settings.cutout_hole_size / 2
    y = (torch.arange(height, device=slices.device) + 0.5) / height
    x = (torch.arange(width, device=slices.device) + 0.5) / width
    is_inside_y = (y - centres[..., 0, None]).abs() < half_side  # [N, holes, H]
    is_inside_x = (x - centres[..., 1, None]).abs() < half_side  # [N, holes, W]
    is_hole = torch.einsum("nky,nkx->nyx", is_inside_y.float(), is_inside_x.float()) > 0
    return slices.masked_fill(is_hole & is_cut[:, None, None], 0.0)


def resample_images(images: Tensor, rows: Tensor, grid: Tensor, mode: str) -> Tensor:
    """Return a copy of images [N, H, W] in which those of `rows` are read at `grid` [len(rows), H, W, 2].

    Positions outside the image read 0.
    """
    selected = images[rows, None].to(grid.dtype)
    sampled = F.grid_sample(selected, grid, mode=mode, padding_mode="zeros", align_corners=False)
    resampled = images.clone()
    resampled[rows] = sampled[:, 0].to(images.dtype)
    return resampled


def make_elastic_grid(knots: Tensor, max_displacement: float, height: int, width: int) -> Tensor:
    """Make the sampling grid of a smooth random deformation (Simard et al., ICDAR 2003).

    Displacements are interpolated between knots by a cubic instead of smoothing a noise field with a
    Gaussian.

    Args:
        knots: [n, 2, k, k] displacements in [-1, 1].
        max_displacement: What 1 means, as a share of the side.
        height: H of the image.
        width: W of the image.

    Returns:
        [n, height, width, 2], where each pixel is read from.
    """
    displacement = F.interpolate(knots, (height, width), mode="bicubic", align_corners=True).clamp(-1, 1)
    identity = torch.eye(2, 3, device=knots.device).expand(len(knots), 2, 3)
    grid = F.affine_grid(identity, [len(knots), 1, height, width], align_corners=False)
    return grid + 2 * max_displacement * displacement.permute(0, 2, 3, 1)
