"""Pyramid pooling against a plain loop over its cells."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from common.modeling.pyramid_pooling import NUM_CELLS, pyramid_pool


def pool_by_loops(maps: np.ndarray) -> np.ndarray:
    """Apply the definition to [B, S, C, H, W], one cell at a time; returns [B, C * 585]."""
    batch_size, num_slices, num_channels, height, width = maps.shape
    pooled = np.empty((batch_size, num_channels, 585))
    for scan, channel in itertools.product(range(batch_size), range(num_channels)):
        volume = maps[scan, :, channel]
        position = 0
        for cells in (1, 2, 4, 8):
            for cell in itertools.product(range(cells), repeat=3):
                box = tuple(
                    slice(index * length // cells, math.ceil((index + 1) * length / cells))
                    for index, length in zip(cell, (num_slices, height, width), strict=True)
                )
                pooled[scan, channel, position] = volume[box].max()
                position += 1
    return pooled.reshape(batch_size, -1)


@pytest.mark.parametrize("shape", [(2, 8, 3, 16, 24), (1, 11, 2, 19, 33), (2, 3, 2, 5, 7), (1, 1, 1, 9, 8)])
def test_pooling_equals_its_definition(shape: tuple[int, ...]) -> None:
    maps = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    pooled = pyramid_pool(maps)
    assert pooled.shape == (shape[0], shape[2] * NUM_CELLS)
    np.testing.assert_allclose(pooled.numpy(), pool_by_loops(maps.numpy()), rtol=0, atol=0)


def test_memory_format_and_precision_do_not_matter() -> None:
    maps = torch.randn(2, 4, 3, 20, 20, generator=torch.Generator().manual_seed(1))
    channels_last = maps.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (2, 4))
    assert torch.equal(pyramid_pool(channels_last), pyramid_pool(maps))
    half = maps.bfloat16()
    assert torch.equal(pyramid_pool(half).float(), pyramid_pool(half.float()))


def test_gradient_reaches_only_the_maximum_of_a_cell() -> None:
    maps = torch.randn(2, 4, 3, 20, 20, generator=torch.Generator().manual_seed(1)).requires_grad_()
    coarsest_cell = pyramid_pool(maps).view(2, 3, 585)[0, 1, 0]  # the maximum of a scan's channel
    coarsest_cell.backward()
    assert maps.grad is not None
    assert maps.grad.count_nonzero() == 1
    assert maps[maps.grad == 1].item() == maps[0, :, 1].max().item()
