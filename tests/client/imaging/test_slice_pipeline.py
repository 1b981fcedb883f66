"""The slices that are kept of a scan: their number, size, window and shape."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest

from client.imaging.readers import Volume
from client.imaging.slice_pipeline import letterbox, select_and_crop
from client.imaging.slice_selection import SelectionMethod, select_slices
from common.config.schema import PreprocessConfig


def make_scan(Z: int = 24, H: int = 120, W: int = 160) -> Volume:
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
def test_ct_gives_eight_square_slices_in_order(
    crop: Literal["body", "lungs", "none"], selection: SelectionMethod
) -> None:
    volume = make_scan()
    result = select_and_crop(volume, PreprocessConfig(crop=crop, selection=selection, image_size=64))
    assert result.slices.shape == (8, 64, 64)
    assert result.slices.dtype == np.uint8
    assert result.areas.shape == (24,)
    np.testing.assert_array_equal(result.indices, select_slices(result.areas, 8, selection, volume.positions))
    y0, y1, x0, x1 = result.crop_box
    if crop == "none":
        assert result.crop_box == (0, 120, 0, 160)
    elif crop == "body":
        np.testing.assert_allclose(result.crop_box, [20, 100, 20, 140], atol=6)
    else:
        np.testing.assert_allclose([y0, y1, x0, x1], [35 - 5, 85 + 5, 30 - 5, 130 + 5], atol=4)
    assert result.notes[0] == "A note of the reader's."
    assert volume.notes == ["A note of the reader's."]  # the volume's own list is left alone


def test_cohort_window_takes_precedence_over_settings() -> None:
    volume = make_scan()
    settings = PreprocessConfig(crop="none", image_size=160, window=(-1000, 300))
    result = select_and_crop(volume, settings)
    tissue, lung = result.slices[4][20 + 5, 80], np.sort(np.unique(result.slices[4]))
    assert tissue == 0  # the padding above a wide slice is its darkest value
    middle = result.slices[4][80]  # through both lungs and the tissue between them
    assert middle[80] == round(1040 / 1300 * 255)
    assert middle[50] == round(150 / 1300 * 255)
    assert set(lung[[0, -1]].tolist()) == {0, round(1040 / 1300 * 255)}
    windowed = select_and_crop(volume, settings, window=(-100.0, 100.0)).slices[4][80]
    assert windowed[80] == round(140 / 200 * 255)
    assert windowed[50] == 0
    picture = Volume(
        np.clip((volume.voxels + 1000) // 8, 0, 255).astype(np.uint8), volume.spacing, volume.positions, "CT"
    )
    assert select_and_crop(picture, settings).slices[4][80][80] == 130
    assert select_and_crop(picture, settings, window=(0.0, 130.0)).slices[4][80][80] == 255


def test_radiograph_gives_one_slice_without_dark_margins() -> None:
    image = np.zeros((300, 400), np.uint8)
    image[30:290, 50:360] = np.random.default_rng(0).integers(60, 255, (260, 310))
    volume = Volume(image[None], (1.0, 0.2, 0.2), np.zeros(1), "XR")
    result = select_and_crop(volume, PreprocessConfig(image_size=128))
    assert result.slices.shape == (1, 128, 128)
    assert result.indices.tolist() == [0]
    assert result.crop_box == (30, 290, 50, 360)
    assert select_and_crop(volume, PreprocessConfig(image_size=128, crop="none")).crop_box == (0, 300, 0, 400)


@pytest.mark.parametrize("selection", ["kds", "kds_paper"])
def test_lung_crop_uses_given_mask(selection: SelectionMethod) -> None:
    volume, mask = make_scan(), np.zeros((24, 120, 160), np.uint8)
    mask[3:5, 40:80, 60:100] = 1
    preprocess = PreprocessConfig(crop="lungs", selection=selection, image_size=64)
    result = select_and_crop(volume, preprocess, lung_mask=mask)
    assert result.crop_box == (35, 85, 55, 105)  # and 10 mm
    assert np.array_equal(result.indices, select_and_crop(volume, preprocess).indices)
    assert (
        select_and_crop(volume, preprocess, lung_mask=mask * 0).crop_box
        == select_and_crop(volume, preprocess).crop_box
    )  # an empty one says nothing


def test_few_slices_are_repeated_and_scan_without_lungs_gives_even_grid() -> None:
    short_scan = make_scan(Z=3)
    result = select_and_crop(short_scan, PreprocessConfig(image_size=32))
    assert set(result.indices.tolist()) == {0, 1, 2}
    assert all(s.max() > s.min() for s in result.slices)  # none is blank
    assert any("3 of the 8" in note for note in result.notes)
    solid = Volume(np.full((40, 32, 32), 40, np.int16), (1.0, 1.0, 1.0), np.arange(40.0), "CT")
    result = select_and_crop(solid, PreprocessConfig(image_size=32))
    assert result.indices.tolist() == [2, 7, 12, 17, 22, 27, 32, 37]
    assert any("No lung" in note for note in result.notes)


@pytest.mark.parametrize(("h", "w"), [(100, 200), (200, 100), (7, 5), (1, 300), (64, 64)])
def test_letterbox_keeps_aspect_ratio(h: int, w: int) -> None:
    result = letterbox(np.full((h, w), 200, np.uint8), 64)
    assert result.shape == (64, 64)
    image = np.full((h, w), 200, np.uint8)
    image[0, 0] = 10  # the darkest value pads
    padded = letterbox(image, 64)
    long, short = max(h, w), min(h, w)
    assert abs(int((padded > 100).sum()) - 64 * max(1, 64 * short / long)) <= 130
