"""Lung segmentation: sizes are right, and tables, gas in the gut and close crops do not mislead it."""

from __future__ import annotations

import os
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray

from client.imaging.lung_segmentation import (
    Box,
    apply_window,
    find_body_box,
    find_lung_box,
    make_lung_mask,
    measure_lung_areas,
    segment_lungs,
)
from client.imaging.lung_segmentation_xr import segment_radiograph_lungs
from client.imaging.paper_body import find_paper_body_box, segment_paper_body
from client.imaging.readers import read_scan
from client.imaging.readers.image_files import read_image_file
from client.imaging.readers.volume import Volume
from client.imaging.slice_pipeline import find_radiograph_box

REAL = (
    Path(os.environ.get("CONSILIUM_REAL_DATA", Path(__file__).parents[3].parent / "shared" / "data"))
    / "ct_dicom"
)
RADIOGRAPHS = REAL.parent / "cxr_cohen"


def lung_areas(volume: Volume) -> NDArray[np.float64]:
    return measure_lung_areas(segment_lungs(volume.voxels), volume.spacing)


def body_box(volume: Volume) -> Box:
    return find_body_box(segment_lungs(volume.voxels))


def lung_box(volume: Volume) -> Box:
    return find_lung_box(segment_lungs(volume.voxels), volume.spacing)


def measure_paper_body(volume: Volume) -> tuple[NDArray[np.float64], Box]:
    """The body's areas [Z] in mm2 and box, as `selection: kds_paper` has them."""
    areas, boxes = segment_paper_body(
        volume.voxels, (-1000.0, 300.0) if volume.is_hounsfield else (0.0, 255.0)
    )
    return areas * volume.spacing[1] * volume.spacing[2], find_paper_body_box(boxes, volume)


def draw_ellipse(size: int, cy: float, cx: float, ry: float, rx: float) -> NDArray[np.bool_]:
    y, x = np.mgrid[:size, :size]
    return np.asarray(((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2 <= 1)


def make_phantom(
    size: int = 256, Z: int = 20, table: bool = True, gas: bool = True
) -> tuple[Volume, NDArray[np.bool_]]:
    """Return a body (40 HU), two lungs (-850 HU), a hollow table and gas in the gut; and the lungs' mask."""
    voxels = np.full((Z, size, size), -1000, np.int16)
    lungs = np.zeros((Z, size, size), bool)
    unit = size / 256
    body = draw_ellipse(size, 120 * unit, 128 * unit, 75 * unit, 105 * unit)
    for z in range(Z):
        voxels[z][body] = 40
        r = np.sin(np.pi * (z - 3) / (Z - 6)) if 3 < z < Z - 3 else 0
        for x in (80, 176):
            lungs[z] |= (
                draw_ellipse(size, 115 * unit, x * unit, 50 * r * unit + 1e-9, 30 * r * unit + 1e-9)
                if r > 0
                else False
            )
        voxels[z][lungs[z]] = -850
        if gas and z < 4:
            voxels[z][draw_ellipse(size, 90 * unit, 128 * unit, 8 * unit, 8 * unit)] = -990
        if table:
            slab = slice(int(205 * unit), int(225 * unit))
            voxels[z, slab, int(20 * unit) : int(236 * unit)] = 100
            voxels[z, int(208 * unit) : int(222 * unit), int(23 * unit) : int(233 * unit)] = -1000
    noise = np.random.default_rng(0).normal(0, 15, voxels.shape)
    return Volume((voxels + noise).astype(np.int16), (5.0, 1.5, 1.5), np.arange(0, 5.0 * Z, 5), "CT"), lungs


def to_picture(volume: Volume, window: tuple[float, float]) -> Volume:
    return Volume(
        np.stack([apply_window(s, window) for s in volume.voxels]), volume.spacing, volume.positions, "CT"
    )


@pytest.mark.parametrize("size", [128, 256, 512])
@pytest.mark.parametrize("kind", ["HU", "lung window", "soft window"])
def test_lungs_of_known_size_are_measured_correctly(size: int, kind: str) -> None:
    volume, lungs = make_phantom(size)
    truth = lungs.sum(axis=(1, 2)) * 1.5**2
    if kind != "HU":
        volume = to_picture(volume, (-1000, 300) if kind == "lung window" else (-160, 240))
    areas = lung_areas(volume)
    assert areas.shape == truth.shape
    np.testing.assert_allclose(areas, truth, atol=0.06 * truth.max())
    assert (areas[:3] == 0).all()  # gas in the gut is not lung
    mask = make_lung_mask(volume.voxels)
    overlap = 2 * (mask & lungs).sum() / (mask.sum() + lungs.sum())
    assert overlap > 0.96
    np.testing.assert_array_equal(make_lung_mask(volume.voxels[10]), make_lung_mask(volume.voxels[10:11])[0])


def test_boxes_exclude_table_and_include_lung_margin() -> None:
    volume, lungs = make_phantom(256)
    y0, y1, x0, x1 = body_box(volume)
    assert (abs(y0 - 45) <= 4, abs(y1 - 196) <= 4, abs(x0 - 23) <= 4, abs(x1 - 234) <= 4) == (True,) * 4
    rows, columns = np.flatnonzero(lungs.any(axis=(0, 2))), np.flatnonzero(lungs.any(axis=(0, 1)))
    y0, y1, x0, x1 = lung_box(volume)
    margin = 10 / 1.5
    np.testing.assert_allclose(
        [rows[0] - y0, y1 - rows[-1], columns[0] - x0, x1 - columns[-1]], margin, atol=3
    )


@pytest.mark.parametrize("fill", [-1000, 40])
def test_scan_without_lungs_has_zero_areas_and_whole_slice_box(fill: int) -> None:
    empty = Volume(np.full((5, 64, 80), fill, np.int16), (1.0, 1.0, 1.0), np.arange(5.0), "CT")
    assert (lung_areas(empty) == 0).all()
    assert not make_lung_mask(empty.voxels).any()
    assert body_box(empty) == lung_box(empty) == (0, 64, 0, 80)
    for value in (0, 255):
        picture = Volume(np.full((1, 33, 70), value, np.uint8), (1.0, 1.0, 1.0), np.zeros(1), "CT")
        assert lung_areas(picture).tolist() == [0]
        assert body_box(picture) == (0, 33, 0, 70)


def test_lungs_are_found_in_close_crops_and_round_fields() -> None:
    volume, lungs = make_phantom(256, table=False, gas=False)
    picture = to_picture(volume, (-1000, 300)).voxels[8:13]
    close = picture[:, 75:155, 60:196]  # both lungs touch the left and right border
    truth = lungs[8:13, 75:155, 60:196].sum(axis=(1, 2))
    areas = lung_areas(Volume(close, (1.0, 1.0, 1.0), np.arange(5.0), "CT"))
    np.testing.assert_allclose(areas, truth, rtol=0.1)
    # Black around the round field, air at 75, tissue at 120: the largest step is not the lungs' border.
    field = draw_ellipse(256, 128, 128, 127, 127)
    squeezed = np.where(field, np.clip((volume.voxels[8:13] + 1000) // 23 + 75, 0, 255), 0).astype(np.uint8)
    areas = lung_areas(Volume(squeezed, (1.0, 1.0, 1.0), np.arange(5.0), "CT"))
    np.testing.assert_allclose(areas, lungs[8:13].sum(axis=(1, 2)), rtol=0.05)


def test_paper_area_is_that_of_body() -> None:
    volume, _ = make_phantom(256, table=False)
    body = draw_ellipse(256, 120, 128, 75, 105).sum() * 1.5**2
    areas, box = measure_paper_body(volume)
    np.testing.assert_allclose(areas, body, rtol=0.05)
    np.testing.assert_allclose(box, [45 - 5, 196 + 5, 23 - 5, 234 + 5], atol=3)
    nothing = Volume(np.zeros((2, 40, 50), np.uint8), (1.0, 1.0, 1.0), np.arange(2.0), "CT")
    areas, box = measure_paper_body(nothing)
    assert (areas.tolist(), box) == ([0, 0], (0, 40, 0, 50))


@pytest.mark.skipif(not REAL.is_dir(), reason="the real CT series are not here")
@pytest.mark.parametrize(
    "name",
    ["cptac_lscc_C3N-00247", "lung_pet_ct_dx_A0001_B", "lung_pet_ct_dx_A0002_B40f", "ricord1a_000082_covid"],
)
def test_real_chests_have_plausible_lungs(name: str) -> None:
    volume = read_scan(REAL / name)
    areas = lung_areas(volume)
    litres = areas.sum() * volume.spacing[0] / 1e6
    assert 2 < litres < 8
    middle = np.flatnonzero(areas > 0.2 * areas.max())
    assert (np.diff(middle) == 1).all()  # one stack of lung, no slice where they were lost
    mask = make_lung_mask(volume.voxels)
    assert -900 < np.median(volume.voxels[mask]) < -650
    y0, y1, x0, x1 = body_box(volume)
    lung_slices = mask[middle]
    assert lung_slices[:, y0:y1, x0:x1].sum() > 0.999 * lung_slices.sum()


def test_radiograph_lungs_are_found_and_empty_images_have_none() -> None:
    y, x = np.mgrid[:240, :300].astype(float)
    lungs = [((y - 115) / 85) ** 2 + ((x - c) / 48) ** 2 < 1 for c in (90, 205)]
    grey = np.where(lungs[0] | lungs[1], 90, 170) + np.random.default_rng(0).normal(0, 8, (240, 300))
    image = cv2.GaussianBlur(grey, (0, 0), 2).clip(0, 255).astype(np.uint8)
    mask = segment_radiograph_lungs(image)
    assert 2 * (mask & (lungs[0] | lungs[1])).sum() / (mask.sum() + lungs[0].sum() + lungs[1].sum()) > 0.85
    assert not mask[:, 145:152].any()
    for empty in (np.full((50, 60), 90, np.uint8), 255 - image, np.zeros((4, 4), np.uint8)):
        assert not segment_radiograph_lungs(empty).any()


@pytest.mark.skipif(not (RADIOGRAPHS / "manifest.csv").is_file(), reason="the real radiographs are not here")
def test_real_radiographs_reach_expected_overlap() -> None:
    """Compare all 166 that have a lung mask; the outline and its penalties were fitted on them too.

    The mean Dice is 0.81, the mean IoU of the boxes 0.85 (0.67 for the box of `find_radiograph_box`).
    """
    table = pd.read_csv(RADIOGRAPHS / "manifest.csv").dropna(subset=["mask"])
    dice, overlap = [], []
    for row in table.itertuples():
        image, drawn_mask = (
            read_image_file(RADIOGRAPHS / str(f)).voxels[0].astype(np.uint8) for f in (row.file, row.mask)
        )
        truth = drawn_mask > 127
        mask = segment_radiograph_lungs(image)
        dice.append(2 * (mask & truth).sum() / (mask.sum() + truth.sum()))
        boxes = np.zeros((2, *truth.shape), bool)
        rows, columns = np.flatnonzero(truth.any(axis=1)), np.flatnonzero(truth.any(axis=0))
        boxes[0, rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = True
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        y0, y1, x0, x1 = (
            (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1) if len(rows) else find_radiograph_box(image)
        )
        boxes[1, y0:y1, x0:x1] = True
        overlap.append(boxes.all(axis=0).sum() / boxes.any(axis=0).sum())
    print(
        f"{len(dice)} radiographs: Dice {np.mean(dice):.3f}, IoU of the boxes {np.mean(overlap):.3f}, "
        f"worst tenth {np.percentile(overlap, 10):.2f}"
    )
    assert np.mean(dice) > 0.79
    assert np.mean(overlap) > 0.83
    assert np.percentile(overlap, 10) > 0.7
