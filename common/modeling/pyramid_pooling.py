"""3-D max pyramid pooling: a scan's map, of any size, as a vector of fixed length.

Spatial pyramid pooling (He et al., ECCV 2014, arXiv 1406.4729, section 2.2) over slices, rows and columns at once, as the triage paper stands
its classification head on the full-resolution map (arXiv 2006.01441): 1 + 8 + 64 + 512 = 585 cells.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PYRAMID_LEVELS = (1, 2, 4, 8)  # cells along each axis; each twice the one before
NUM_CELLS = sum(n**3 for n in PYRAMID_LEVELS)


def pyramid_pool(maps: Tensor) -> Tensor:
    """[B, C * 585] of maps [B, S, C, H, W]: each channel's cells follow one another, the coarsest first.

    Cell i of n along an axis of length L covers floor(i L / n) to ceil((i + 1) L / n), so that an axis shorter than n has cells that repeat.
    """
    b, s, c, _, _ = maps.shape
    finest = PYRAMID_LEVELS[-1]
    # A box's maximum is taken axis by axis: first within each slice, where the map stays as it lies in memory.
    x = F.adaptive_max_pool2d(maps.flatten(0, 1), finest).view(b, s, c, finest, finest).transpose(1, 2)
    cells = [F.adaptive_max_pool3d(x, finest)]
    while cells[0].shape[-1] > PYRAMID_LEVELS[0]:
        cells.insert(
            0, F.max_pool3d(cells[0], 2)
        )  # a cell of a coarser level is exactly eight of the finer one's
    return torch.cat([x.flatten(2) for x in cells], 2).flatten(1)
