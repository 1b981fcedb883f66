"""Pyramid pooling against a plain loop over the cells."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from common.modeling.pyramid_pooling import NUM_CELLS, pyramid_pool


def by_loops(maps: np.ndarray) -> np.ndarray:
    """The definition: [B, C * 585] of [B, S, C, H, W], one cell at a time."""
    b, s, c, h, w = maps.shape
    out = np.empty((b, c, 585))
    for i, k in itertools.product(range(b), range(c)):
        at = 0
        for n in (1, 2, 4, 8):
            for cell in itertools.product(range(n), repeat=3):
                box = [
                    slice(j * size // n, math.ceil((j + 1) * size / n))
                    for j, size in zip(cell, (s, h, w), strict=True)
                ]
                out[i, k, at] = maps[i, box[0], k, box[1], box[2]].max()
                at += 1
    return out.reshape(b, -1)


@pytest.mark.parametrize("shape", [(2, 8, 3, 16, 24), (1, 11, 2, 19, 33), (2, 3, 2, 5, 7), (1, 1, 1, 9, 8)])
def test_equals_the_definition(shape: tuple[int, ...]) -> None:
    maps = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    pooled = pyramid_pool(maps)
    assert pooled.shape == (shape[0], shape[2] * NUM_CELLS)
    np.testing.assert_allclose(pooled.numpy(), by_loops(maps.numpy()), rtol=0, atol=0)


def test_channels_last_and_half_precision_are_the_same_and_gradients_reach_the_maxima() -> None:
    maps = torch.randn(2, 4, 3, 20, 20, generator=torch.Generator().manual_seed(1))
    last = maps.flatten(0, 1).contiguous(memory_format=torch.channels_last).unflatten(0, (2, 4))
    assert torch.equal(pyramid_pool(last), pyramid_pool(maps))
    assert torch.equal(pyramid_pool(maps.bfloat16()).float(), pyramid_pool(maps.bfloat16().float()))
    maps.requires_grad_()
    pyramid_pool(maps).view(2, 3, 585)[0, 1, 0].backward()  # the coarsest cell: one maximum of the whole scan
    assert maps.grad is not None
    assert maps.grad.count_nonzero() == 1
    assert maps[maps.grad == 1].item() == maps[0, :, 1].max().item()
