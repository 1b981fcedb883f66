"""Random changes of training slices, each slice on its own (paper 1's augmentation), on tensors: the same code on CPU and GPU.

Masks go along with whatever moves pixels; what changes grey values, or covers, leaves them.
"""

from __future__ import annotations

import math
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from common.config.schema import AugmentConfig
from common.learning.losses import IGNORE_INDEX

ELASTIC_KNOTS = 5  # each way, of the coarse grid that an elastic deformation is drawn on


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
    """Slices [N, H, W] in [0, 1], changed; the draw depends on `generator` (a CPU generator, so that every device draws alike).

    With `masks` uint8 [N, H, W] both: a mask moves as its slice does, by the nearest pixel; what comes in from outside is 0, and a mask that
    is UNKNOWN throughout stays so.
    """
    n, h, w = slices.shape
    device = slices.device
    unknown = None if masks is None else (masks == IGNORE_INDEX).flatten(1).all(1)

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator).to(device)

    def uniform(width: float, *shape: int) -> Tensor:
        return (2 * draw(*shape) - 1) * width

    flip = draw(n) < settings.p_flip
    slices = torch.where(flip[:, None, None], slices.flip(-1), slices)
    if masks is not None:
        masks = torch.where(flip[:, None, None], masks.flip(-1), masks)

    moved = draw(n) < settings.p_affine
    angle, scale = uniform(math.radians(settings.rotate), n), 1 + uniform(settings.scale, n)
    shift = uniform(2 * settings.translate, n, 2)  # affine_grid's side is 2
    rows = moved.nonzero().squeeze(1)
    if len(rows):
        cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
        theta = torch.stack(
            [torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1
        )[rows]
        grid = F.affine_grid(theta, [len(rows), 1, h, w], align_corners=False)
        slices, masks = (
            resample_images(slices, rows, grid, "bilinear"),
            None if masks is None else resample_images(masks, rows, grid, "nearest"),
        )

    if (
        settings.p_elastic > 0
    ):  # drawn only where it is wanted: the other changes draw as they did before there was this one
        rows = (draw(n) < settings.p_elastic).nonzero().squeeze(1)
        knots = uniform(1.0, n, 2, ELASTIC_KNOTS, ELASTIC_KNOTS)[rows]
        if len(rows):
            grid = make_elastic_grid(knots, settings.elastic_displacement, h, w)
            slices, masks = (
                resample_images(slices, rows, grid, "bilinear"),
                None if masks is None else resample_images(masks, rows, grid, "nearest"),
            )

    changed = (draw(n) < settings.p_brightness).float()
    contrast, brightness = (
        1 + changed * uniform(settings.contrast, n),
        changed * uniform(settings.brightness, n),
    )
    brightness = brightness + (draw(n) < settings.p_hsv_value).float() * uniform(settings.hsv_value_shift, n)
    slices = (slices * contrast[:, None, None] + brightness[:, None, None]).clamp(0, 1)

    holed = draw(n) < settings.p_cutout
    centres = draw(n, settings.cutout_num_holes, 2)
    if settings.cutout_num_holes and bool(holed.any()):
        half = settings.cutout_hole_size / 2
        y = (torch.arange(h, device=device) + 0.5) / h
        x = (torch.arange(w, device=device) + 0.5) / w
        inside_y = (y - centres[..., 0, None]).abs() < half  # [N, holes, H]
        inside_x = (x - centres[..., 1, None]).abs() < half
        hole = torch.einsum("nky,nkx->nyx", inside_y.float(), inside_x.float()) > 0
        slices = slices.masked_fill(hole & holed[:, None, None], 0.0)
    if masks is None or unknown is None:
        return slices
    return slices, masks.masked_fill(unknown[:, None, None], IGNORE_INDEX)


def resample_images(images: Tensor, rows: Tensor, grid: Tensor, mode: str) -> Tensor:
    """Pictures [N, H, W] with those of `rows` read at `grid` [len(rows), H, W, 2]; outside is 0. The input stays as it was."""
    images = images.clone()
    found = F.grid_sample(
        images[rows, None].to(grid.dtype), grid, mode=mode, padding_mode="zeros", align_corners=False
    )
    images[rows] = found[:, 0].to(images.dtype)
    return images


def make_elastic_grid(knots: Tensor, max_displacement: float, h: int, w: int) -> Tensor:
    """Where each pixel is read from, [n, h, w, 2], for displacements at `knots` [n, 2, k, k] in [-1, 1] times `largest` (of the side).

    Smooth random displacement (Simard et al., "Best practices for convolutional neural networks", ICDAR 2003); cubic between knots instead of
    a Gaussian filter over a field of noise.
    """
    field = F.interpolate(knots, (h, w), mode="bicubic", align_corners=True).clamp(-1, 1)
    still = torch.eye(2, 3, device=knots.device).expand(len(knots), 2, 3)
    return F.affine_grid(
        still, [len(knots), 1, h, w], align_corners=False
    ) + 2 * max_displacement * field.permute(0, 2, 3, 1)
