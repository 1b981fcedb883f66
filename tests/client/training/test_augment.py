"""Augmentation: the identity at probability 0, exact where possible, each slice on its own, seeded."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from client.training.augment import augment_slices, make_elastic_grid
from common.config.schema import AugmentConfig

OFF = AugmentConfig(p_flip=0, p_affine=0, p_brightness=0, p_hsv_value=0, p_cutout=0)
ALWAYS = AugmentConfig(p_flip=1, p_affine=1, p_brightness=1, p_hsv_value=1, p_cutout=1)
STRONG = replace(
    ALWAYS, translate=0.5, scale=0.9, rotate=180.0, brightness=1.0, contrast=1.0, hsv_value_shift=1.0
)
SEEDS = st.integers(0, 2**32)


def slices(n: int = 4, side: int = 24, seed: int = 0) -> Tensor:
    return torch.rand(n, side, side, generator=torch.Generator().manual_seed(seed))


def augmented(x: Tensor, how: AugmentConfig, seed: int = 0) -> Tensor:
    return augment_slices(x, how, torch.Generator().manual_seed(seed))


@given(SEEDS, st.integers(1, 6), st.integers(16, 40))
@settings(max_examples=20)
def test_probability_zero_is_the_identity(seed: int, n: int, side: int) -> None:
    x = slices(n, side, seed)
    assert torch.equal(augmented(x, OFF, seed), x)


@given(SEEDS, st.sampled_from([AugmentConfig(), ALWAYS, STRONG]))
@settings(max_examples=40)
def test_values_stay_in_range_and_the_input_is_not_changed(seed: int, how: AugmentConfig) -> None:
    x = slices(seed=seed)
    original = x.clone()
    y = augmented(x, how, seed)
    assert y.shape == x.shape
    assert bool(torch.isfinite(y).all())
    assert 0 <= float(y.min()) <= float(y.max()) <= 1
    assert torch.equal(x, original)


@given(SEEDS)
@settings(max_examples=10)
def test_the_same_generator_gives_the_same_result(seed: int) -> None:
    x = slices()
    assert torch.equal(augmented(x, ALWAYS, seed), augmented(x, ALWAYS, seed))
    assert not torch.equal(augmented(x, ALWAYS, seed), augmented(x, ALWAYS, seed + 1))


@given(SEEDS, st.sampled_from([AugmentConfig(), ALWAYS]))
@settings(max_examples=20)
def test_each_slice_is_augmented_on_its_own(seed: int, how: AugmentConfig) -> None:
    x = slices()
    other = x.clone()
    other[1] = 0.5  # another slice does not change the rest
    a, b = augmented(x, how, seed), augmented(other, how, seed)
    assert torch.equal(a[[0, 2, 3]], b[[0, 2, 3]])
    same = augmented(x[:1].expand(4, -1, -1), ALWAYS, seed)  # equal slices are augmented differently
    assert len({tuple(s.flatten().tolist()) for s in same}) == 4


def test_a_flip_is_exact_and_has_its_probability() -> None:
    x = slices(400, 16)
    assert torch.equal(augmented(x, replace(OFF, p_flip=1)), x.flip(-1))
    flipped = (augmented(x, replace(OFF, p_flip=0.3)) == x.flip(-1)).all(-1).all(-1)
    assert 0.2 < float(flipped.float().mean()) < 0.4
    assert torch.equal(augmented(x, replace(OFF, p_flip=0.3))[~flipped], x[~flipped])


def test_an_affine_change_of_size_zero_is_the_identity() -> None:
    x = slices()
    torch.testing.assert_close(
        augmented(x, replace(OFF, p_affine=1, translate=0, scale=0, rotate=0)), x, rtol=0, atol=1e-4
    )


def test_a_translation_moves_by_at_most_its_share_of_the_side() -> None:
    x = torch.zeros(200, 40, 40)
    x[:, 19:21, 19:21] = 1
    y = augmented(x, replace(OFF, p_affine=1, translate=0.2, scale=0, rotate=0))
    position = torch.arange(40.0)
    mass = y.sum((1, 2))
    row = (y.sum(2) * position).sum(1) / mass - 19.5
    column = (y.sum(1) * position).sum(1) / mass - 19.5
    for shift in (row, column):
        assert 6 < float(shift.abs().max()) <= 8.01
        assert abs(float(shift.mean())) < 1


def test_a_rotation_keeps_the_centre_and_goes_both_ways() -> None:
    x = torch.zeros(50, 33, 33)
    x[:, 16, 16:28] = 1  # like a clock's hand
    y = augmented(x, replace(OFF, p_affine=1, translate=0, scale=0, rotate=30.0))
    assert float((y[:, 16, 16] - 1).abs().max()) < 0.35
    position = torch.arange(33.0) - 16
    angle = torch.rad2deg(torch.atan2((y.sum(2) * position).sum(1), (y.sum(1) * position).sum(1)))
    assert float(angle.min()) < -20
    assert float(angle.max()) > 20
    assert float(angle.abs().max()) < 31


def test_brightness_and_contrast_are_linear_in_the_slice() -> None:
    x = 0.4 + 0.2 * slices(50, 16)  # far from 0 and 1: nothing is clipped
    y = augmented(x, replace(OFF, p_brightness=1, brightness=0.1, contrast=0.2))
    flat, changed = x.flatten(1), y.flatten(1)
    slope = (changed[:, 1] - changed[:, 0]) / (flat[:, 1] - flat[:, 0])
    offset = changed[:, 0] - slope * flat[:, 0]
    torch.testing.assert_close(changed, slope[:, None] * flat + offset[:, None], rtol=0, atol=1e-4)
    assert float((slope - 1).abs().max()) <= 0.2 + 1e-3
    assert float(offset.abs().max()) <= 0.1 + 1e-3
    assert float(slope.std()) > 0.05


def test_holes_have_their_size_and_number() -> None:
    x = torch.ones(30, 64, 64)
    one = augmented(x, replace(OFF, p_cutout=1, cutout_num_holes=1, cutout_hole_size=0.125)) == 0
    assert int(one.sum((1, 2)).max()) == 64  # 8 x 8 of 64 x 64, less at the border
    many = augmented(x, replace(OFF, p_cutout=1, cutout_num_holes=8, cutout_hole_size=0.125)) == 0
    assert int(many.sum((1, 2)).max()) <= 8 * 64
    assert float(many.float().mean()) > 3 * float(one.float().mean())
    assert torch.equal(augmented(x, replace(OFF, p_cutout=1, cutout_num_holes=0)), x)


MOVES = replace(
    OFF,
    p_flip=0.5,
    p_affine=0.7,
    p_elastic=0.7,
    translate=0.3,
    scale=0.4,
    rotate=60.0,
    elastic_displacement=0.1,
)


@given(SEEDS, st.integers(1, 5), st.integers(16, 33))
@settings(max_examples=40)
def test_a_mask_moves_exactly_as_its_slice(seed: int, n: int, side: int) -> None:
    blobs = (
        torch.nn.functional.interpolate(slices(n, 5, seed)[:, None], (side, side), mode="nearest")[:, 0] > 0.5
    )
    image, mask = augment_slices(
        blobs.float(), MOVES, torch.Generator().manual_seed(seed), blobs.to(torch.uint8)
    )
    assert mask.dtype == torch.uint8
    # The image is interpolated between four pixels, the mask is read at the nearest of them:
    # where the four agree, so must the mask.
    assert bool((mask[image >= 1 - 1e-4] == 1).all())
    assert bool((mask[image <= 1e-4] == 0).all())
    assert torch.equal(image, augmented(blobs.float(), MOVES, seed))  # masks do not change what is augmented


def test_grey_changes_leave_masks_and_an_unknown_mask_stays_unknown() -> None:
    x = slices()
    mask = (x > 0.5).to(torch.uint8)
    grey = augment_slices(x, replace(ALWAYS, p_flip=0, p_affine=0), torch.Generator().manual_seed(1), mask)
    assert torch.equal(grey[1], mask)
    mask[2] = 255
    mask[3, :12] = 255  # half known: the unknown part moves too
    moved = augment_slices(
        x, replace(OFF, p_flip=1, p_affine=1, translate=0.5), torch.Generator().manual_seed(1), mask
    )[1]
    assert bool((moved[2] == 255).all())
    assert 0 < int((moved[3] == 255).sum()) < 24 * 24
    assert int(moved[:2].max()) <= 1


def test_elastic_deformation_is_smooth_and_limited_and_leaves_other_draws() -> None:
    grid = make_elastic_grid(
        2 * torch.rand(30, 2, 5, 5, generator=torch.Generator().manual_seed(0)) - 1, 0.03, 48, 48
    )
    still = make_elastic_grid(torch.zeros(1, 2, 5, 5), 0.03, 48, 48)
    apart = (grid - still) / 2  # as a share of the side
    assert 0.02 < float(apart.abs().max()) <= 0.03 + 1e-6
    assert float((apart[:, 1:] - apart[:, :-1]).abs().max()) < 0.5 / 48  # no pixel overtakes its neighbour
    torch.testing.assert_close(
        augmented(slices(), replace(OFF, p_elastic=1, elastic_displacement=0.0)), slices(), rtol=0, atol=1e-4
    )
    assert torch.equal(
        augmented(slices(), replace(ALWAYS, elastic_displacement=0.5)), augmented(slices(), ALWAYS)
    )
