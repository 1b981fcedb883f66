"""Pool a scan's feature map, of any size, into a vector of fixed length (3-D max pyramid pooling).

Spatial pyramid pooling (He et al., ECCV 2014, arXiv 1406.4729, section 2.2) over slices, rows and columns at
once, with 1 + 8 + 64 + 512 = 585 cells. The triage paper (arXiv 2006.01441) puts its classification head on
such a vector.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

PYRAMID_LEVELS = (1, 2, 4, 8)  # cells along each axis; each level has twice as many as the one before
NUM_CELLS = sum(cells**3 for cells in PYRAMID_LEVELS)


def pyramid_pool(maps: Tensor) -> Tensor:
    """Pool maps [B, S, C, H, W] to [B, C * 585]: channel after channel, from the coarsest cell to the finest.

    Cell i of n along an axis of length L covers floor(i L / n) to ceil((i + 1) L / n), so cells repeat along
    an axis that is shorter than n.
    """
    batch_size, num_slices, num_channels, _, _ = maps.shape
    finest = PYRAMID_LEVELS[-1]
    # The maximum of a box can be taken axis by axis. Pooling within each slice first leaves the maps where
    # they are in memory.
    pooled_slices = F.adaptive_max_pool2d(maps.flatten(0, 1), finest)
    volume = pooled_slices.view(batch_size, num_slices, num_channels, finest, finest).transpose(1, 2)
    levels = [F.adaptive_max_pool3d(volume, finest)]
    while levels[0].shape[-1] > PYRAMID_LEVELS[0]:
        levels.insert(0, F.max_pool3d(levels[0], 2))  # a cell covers exactly eight cells of the finer level
    return torch.cat([level.flatten(2) for level in levels], 2).flatten(1)
