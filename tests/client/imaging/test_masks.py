"""Masks: reading, telling the lungs' sides apart, cropping to the kept slices, and writing over the scan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import nibabel
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from client.imaging.lung_segmentation import label_sides
from client.imaging.mask_files import write_nifti_mask
from client.imaging.masks import (
    crop_to_slices,
    read_lung_mask,
    read_mask,
    resize_to_scan,
)
from client.imaging.readers import Volume, read_scan
from client.imaging.slice_pipeline import letterbox
from common.utils.errors import ConsiliumError
from tests.client.imaging.masked_series import write_full_mask, write_series


def test_masks_are_binarised_by_file_type(tmp_path: Path) -> None:
    grey = np.zeros((20, 30), np.uint8)
    grey[5:10, 5:10], grey[10:15] = 130, 120
    grey[0, 0] = 250
    cv2.imwrite(str(tmp_path / "a.png"), grey)
    assert np.array_equal(read_mask(tmp_path / "a.png"), (grey > 125)[None])
    (tmp_path / "folder").mkdir()
    for z in (2, 10):
        cv2.imwrite(str(tmp_path / "folder" / f"{z}.png"), grey * (z == 10))
    assert np.array_equal(read_mask(tmp_path / "folder"), np.stack([grey * 0, grey > 125]))
    values = np.zeros((4, 5, 6), np.float32)
    values[0, 0, 1] = 0.01
    image: Any = nibabel.Nifti1Image(values, np.eye(4))  # type: ignore[no-untyped-call]
    nibabel.save(image, tmp_path / "a.nii.gz")
    mask_read = read_mask(tmp_path / "a.nii.gz")
    assert mask_read.shape == (6, 5, 4)
    assert np.argwhere(mask_read).tolist() == [
        [1, 4, 3]
    ]  # right and front come first in the file, left and back in a slice


@given(st.integers(5, 30), st.integers(0, 6), st.integers(5, 30), st.integers(0, 2**32))
def test_lung_sides_are_optimal_two_means_clusters(wide: int, gap: int, other: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    lungs = rng.random((2, 6, wide + gap + other)) < 0.6
    lungs[:, :, wide : wide + gap] = False
    x = np.nonzero(lungs)[2].astype(float)
    spreads = [
        sum(((part - part.mean()) ** 2).sum() for part in (x[x <= c], x[x > c]))
        for c in range(int(x.min()), int(x.max()))
    ]
    labelled = label_sides(lungs)
    assert np.array_equal(labelled > 0, lungs)
    ends = [x[labelled[lungs] == side] for side in (1, 2)]
    assert ends[0].max() < ends[1].min()
    assert sum(((part - part.mean()) ** 2).sum() for part in ends) == pytest.approx(min(spreads))


def test_lung_mask_keeps_its_own_side_labels_or_is_split(tmp_path: Path) -> None:
    sides = np.zeros((20, 40), np.uint8)
    sides[5:15, 5:15], sides[5:15, 25:38] = 2, 1  # the file's own word, even if it is odd
    cv2.imwrite(str(tmp_path / "a.png"), sides)
    assert np.array_equal(read_lung_mask(tmp_path / "a.png", True)[0], sides)
    assert np.array_equal(read_lung_mask(tmp_path / "a.png", False)[0], sides > 0)
    cv2.imwrite(str(tmp_path / "b.png"), (sides > 0) * np.uint8(255))
    assert np.array_equal(read_lung_mask(tmp_path / "b.png", True)[0], (3 - sides) * (sides > 0))


@given(st.data(), st.integers(16, 80))
@settings(max_examples=60)
def test_mask_is_cropped_like_its_image(data: st.DataObject, size: int) -> None:
    H, W = data.draw(st.integers(20, 90)), data.draw(st.integers(20, 90))
    y0, x0 = data.draw(st.integers(0, H - 12)), data.draw(st.integers(0, W - 12))
    box = (y0, data.draw(st.integers(y0 + 12, H)), x0, data.draw(st.integers(x0 + 12, W)))
    mask = (
        ndimage.gaussian_filter(np.random.default_rng(data.draw(st.integers(0, 999))).normal(size=(H, W)), 4)
        > 0
    ).astype(np.uint8)
    mask[box[0], box[2]] = 0  # a square is padded with its darkest value, a mask with 0
    result = crop_to_slices(mask[None], [0, 0], box, size)
    letterboxed = letterbox(mask[box[0] : box[1], box[2] : box[3]] * 255, size).astype(int)
    assert result.shape == (2, size, size)
    assert np.array_equal(result[0], result[1])
    clear = np.abs(letterboxed - 127) > 1  # square rounds grey values to whole ones
    assert np.array_equal(result[0][clear], (letterboxed > 127)[clear])


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_written_mask_matches_original_within_one_pixel(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    Z, H, W = data.draw(st.integers(3, 8)), data.draw(st.integers(40, 70)), data.draw(st.integers(40, 70))
    y0, x0 = data.draw(st.integers(0, 10)), data.draw(st.integers(0, 10))
    box = (y0, data.draw(st.integers(30, H)), x0, data.draw(st.integers(30, W)))
    size = data.draw(st.sampled_from([16, 24, max(box[1] - y0, box[3] - x0), 96]))
    mask = np.zeros((Z, H, W), np.uint8)
    mask[1:, y0 + 4 : box[1] - 6, x0 + 5 : box[3] - 3] = 1
    volume = Volume(
        np.zeros((Z, H, W), np.int16),
        (2.5, 0.7, 0.8),
        np.arange(10, 10 + 2.5 * Z, 2.5),
        "CT",
        [],
        (-30.0, -20.0),
    )
    path = tmp_path_factory.mktemp("back") / "m.nii.gz"
    write_nifti_mask(
        path, crop_to_slices(mask, np.arange(Z), box, size).astype(np.float32), np.arange(Z), box, volume, 0.5
    )
    read_back = read_mask(path)
    scale = size / max(box[1] - y0, box[3] - x0)
    if scale == 1:
        assert np.array_equal(read_back, mask)
    width = int(np.ceil(max(1, 1 / scale))) + 1
    pixel_width = np.ones((1, 2 * width + 1, 2 * width + 1))
    assert (read_back >= ndimage.binary_erosion(mask, pixel_width)).all()
    assert (read_back <= ndimage.binary_dilation(mask, pixel_width)).all()
    reread = read_scan(path)
    np.testing.assert_allclose(reread.positions, volume.positions, atol=1e-3)
    np.testing.assert_allclose(reread.spacing, volume.spacing, rtol=1e-4)
    np.testing.assert_allclose(reread.origin, volume.origin, atol=1e-3)


def test_written_mask_is_interpolated_between_kept_slices_and_empty_beyond(tmp_path: Path) -> None:
    positions = np.array([0.0, 1, 2, 4, 5, 6])  # one slice is missing
    volume = Volume(np.zeros((6, 8, 8), np.int16), (1.0, 1.0, 1.0), positions, "CT")
    maps = np.stack([np.full((8, 8), p, np.float32) for p in (0.0, 0.0, 1.0)])
    write_nifti_mask(
        tmp_path / "m.nii", maps, [1, 1, 4], (0, 8, 0, 8), volume, 0.5
    )  # at 1 mm nothing, at 5 mm all
    assert read_mask(tmp_path / "m.nii").mean(axis=(1, 2)).tolist() == [
        0,
        0,
        0,
        1,
        1,
        1,
        0,
    ]  # 0 to 6 mm, the missing one too


@pytest.mark.parametrize("flipped", [False, True])
def test_written_mask_lies_over_dicom_scan_in_millimetres(tmp_path: Path, flipped: bool) -> None:
    volume = read_scan(write_series(tmp_path / "scan", flipped=flipped))
    assert volume.origin == pytest.approx((-(96 - 1) / 2 * 3.75,) * 2)
    dense = ((volume.voxels > -200) & (volume.voxels < 0)).astype(np.uint8)
    assert dense.sum() == 3 * 8 * 10
    write_full_mask(dense, volume, tmp_path / "m.nii.gz")
    assert np.array_equal(read_mask(tmp_path / "m.nii.gz"), dense)
    image: Any = nibabel.load(tmp_path / "m.nii.gz")
    centre = image.affine @ [*np.argwhere(np.asarray(image.dataobj)).mean(axis=0), 1]
    # LPS by hand: column 64.5 of 96 lies (64.5 - 47.5) * 3.75 mm to the left, row 43.5 15 mm to the front.
    # RAS turns both signs.
    np.testing.assert_allclose(centre[:3], [-17 * 3.75, 4 * 3.75, -150 + 6 * 5], atol=1e-3)


def test_mask_of_other_shape_is_refused() -> None:
    mask = np.ones((1, 20, 30), np.uint8)
    assert resize_to_scan(mask, (1, 40, 60), True).shape == (1, 40, 60)
    assert resize_to_scan(mask, (1, 40, 61), True).shape == (1, 40, 61)
    for shape, picture in (((1, 40, 60), False), ((2, 20, 30), True), ((1, 40, 63), True)):
        with pytest.raises(ConsiliumError, match="give a mask of the scan's own size"):
            resize_to_scan(mask, shape, picture)
