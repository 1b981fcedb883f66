"""Random changes of training slices, each slice on its own (paper 1's augmentation), on tensors: the same code on CPU and GPU."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from common.schema import Augment


def augment(slices: Tensor, settings: Augment, generator: torch.Generator) -> Tensor:
    """Slices [N, H, W] in [0, 1], changed; the draw depends on `generator` (a CPU generator, so that every device draws alike)."""
    n, h, w = slices.shape
    device = slices.device

    def draw(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator).to(device)

    def uniform(width: float, *shape: int) -> Tensor:
        return (2 * draw(*shape) - 1) * width

    flip = draw(n) < settings.p_flip
    slices = torch.where(flip[:, None, None], slices.flip(-1), slices)

    moved = draw(n) < settings.p_affine
    angle, scale = uniform(math.radians(settings.rotate), n), 1 + uniform(settings.scale, n)
    shift = uniform(2 * settings.shift, n, 2)  # affine_grid's side is 2
    rows = moved.nonzero().squeeze(1)
    if len(rows):
        cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
        theta = torch.stack([torch.stack([cos, -sin, shift[:, 0]], 1), torch.stack([sin, cos, shift[:, 1]], 1)], 1)[rows]
        grid = F.affine_grid(theta, [len(rows), 1, h, w], align_corners=False)
        slices = slices.clone()
        slices[rows] = F.grid_sample(slices[rows, None], grid, mode="bilinear", padding_mode="zeros", align_corners=False)[:, 0]

    changed = (draw(n) < settings.p_brightness).float()
    contrast, brightness = 1 + changed * uniform(settings.contrast, n), changed * uniform(settings.brightness, n)
    brightness = brightness + (draw(n) < settings.p_value).float() * uniform(settings.value, n)
    slices = (slices * contrast[:, None, None] + brightness[:, None, None]).clamp(0, 1)

    holed = draw(n) < settings.p_holes
    centres = draw(n, settings.holes, 2)
    if settings.holes and bool(holed.any()):
        half = settings.hole / 2
        y = (torch.arange(h, device=device) + 0.5) / h
        x = (torch.arange(w, device=device) + 0.5) / w
        inside_y = (y - centres[..., 0, None]).abs() < half  # [N, holes, H]
        inside_x = (x - centres[..., 1, None]).abs() < half
        hole = torch.einsum("nky,nkx->nyx", inside_y.float(), inside_x.float()) > 0
        slices = slices.masked_fill(hole & holed[:, None, None], 0.0)
    return slices
