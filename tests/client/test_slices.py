"""What is kept of a scan: number, size, window, shape."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest

from client.kds import Selection, select
from client.readers.volume import Volume
from client.slices import slices_of, square
from common.schema import Preprocess


def scan(Z: int = 24, H: int = 120, W: int = 160) -> Volume:
    """A box-shaped body (40 HU) with two lungs (-850 HU), largest in the middle."""
    voxels = np.full((Z, H, W), -1000, np.int16)
    voxels[:, 20:100, 20:140] = 40
    for z in range(Z):
        half = int(25 * np.sin(np.pi * (z + 0.5) / Z))
        voxels[z, 60 - half : 60 + half, 30:70] = -850
        voxels[z, 60 - half : 60 + half, 90:130] = -850
    return Volume(voxels, (5.0, 2.0, 2.0), np.arange(0, 5.0 * Z, 5), "CT", ["A note of the reader's."])


@pytest.mark.parametrize("crop", ["body", "lungs", "none"])
@pytest.mark.parametrize("selection", ["kds", "kds_paper", "zquantile", "even"])
def test_eight_square_slices_in_order(crop: Literal["body", "lungs", "none"], selection: Selection) -> None:
    volume = scan()
    kept = slices_of(volume, Preprocess(crop=crop, selection=selection, size=64))
    assert kept.slices.shape == (8, 64, 64)
    assert kept.slices.dtype == np.uint8
    assert kept.areas.shape == (24,)
    np.testing.assert_array_equal(kept.indices, select(kept.areas, 8, selection, volume.positions))
    y0, y1, x0, x1 = kept.box
    if crop == "none":
        assert kept.box == (0, 120, 0, 160)
    elif crop == "body":
        np.testing.assert_allclose(kept.box, [20, 100, 20, 140], atol=6)
    else:
        np.testing.assert_allclose([y0, y1, x0, x1], [35 - 5, 85 + 5, 30 - 5, 130 + 5], atol=4)
    assert kept.notes[0] == "A note of the reader's."
    assert volume.notes == ["A note of the reader's."]  # the volume's own list is left alone


def test_the_cohorts_window_comes_first_then_the_settings() -> None:
    volume = scan()
    settings = Preprocess(crop="none", size=160, window=(-1000, 300))
    kept = slices_of(volume, settings)
    tissue, lung = kept.slices[4][20 + 5, 80], np.sort(np.unique(kept.slices[4]))
    assert tissue == 0  # the padding above a wide slice is its darkest value
    middle = kept.slices[4][80]  # through both lungs and the tissue between them
    assert middle[80] == round(1040 / 1300 * 255)
    assert middle[50] == round(150 / 1300 * 255)
    assert set(lung[[0, -1]].tolist()) == {0, round(1040 / 1300 * 255)}
    own = slices_of(volume, settings, window=(-100.0, 100.0)).slices[4][80]
    assert own[80] == round(140 / 200 * 255)
    assert own[50] == 0
    picture = Volume(np.clip((volume.voxels + 1000) // 8, 0, 255).astype(np.uint8), volume.spacing, volume.positions, "CT")
    assert slices_of(picture, settings).slices[4][80][80] == 130
    assert slices_of(picture, settings, window=(0.0, 130.0)).slices[4][80][80] == 255


def test_a_radiograph_keeps_one_slice_without_its_dark_margins() -> None:
    image = np.zeros((300, 400), np.uint8)
    image[30:290, 50:360] = np.random.default_rng(0).integers(60, 255, (260, 310))
    volume = Volume(image[None], (1.0, 0.2, 0.2), np.zeros(1), "XR")
    kept = slices_of(volume, Preprocess(size=128))
    assert kept.slices.shape == (1, 128, 128)
    assert kept.indices.tolist() == [0]
    assert kept.box == (30, 290, 50, 360)
    assert slices_of(volume, Preprocess(size=128, crop="none")).box == (0, 300, 0, 400)


@pytest.mark.parametrize("selection", ["kds", "kds_paper"])
def test_a_crop_to_the_lungs_goes_by_the_given_ones(selection: Selection) -> None:
    volume, mask = scan(), np.zeros((24, 120, 160), np.uint8)
    mask[3:5, 40:80, 60:100] = 1
    how = Preprocess(crop="lungs", selection=selection, size=64)
    kept = slices_of(volume, how, lung=mask)
    assert kept.box == (35, 85, 55, 105)  # and 10 mm
    assert np.array_equal(kept.indices, slices_of(volume, how).indices)
    assert slices_of(volume, how, lung=mask * 0).box == slices_of(volume, how).box  # an empty one says nothing


def test_few_slices_are_repeated_and_no_lungs_means_an_even_grid() -> None:
    few = scan(Z=3)
    kept = slices_of(few, Preprocess(size=32))
    assert set(kept.indices.tolist()) == {0, 1, 2}
    assert all(s.max() > s.min() for s in kept.slices)  # none is blank
    assert any("3 of the 8" in note for note in kept.notes)
    solid = Volume(np.full((40, 32, 32), 40, np.int16), (1.0, 1.0, 1.0), np.arange(40.0), "CT")
    kept = slices_of(solid, Preprocess(size=32))
    assert kept.indices.tolist() == [2, 7, 12, 17, 22, 27, 32, 37]
    assert any("No lung" in note for note in kept.notes)


@pytest.mark.parametrize(("h", "w"), [(100, 200), (200, 100), (7, 5), (1, 300), (64, 64)])
def test_a_square_keeps_the_shape(h: int, w: int) -> None:
    kept = square(np.full((h, w), 200, np.uint8), 64)
    assert kept.shape == (64, 64)
    image = np.full((h, w), 200, np.uint8)
    image[0, 0] = 10  # the darkest value pads
    padded = square(image, 64)
    long, short = max(h, w), min(h, w)
    assert abs(int((padded > 100).sum()) - 64 * max(1, 64 * short / long)) <= 130
