"""Masks: reading, cropping to the kept slices, storing beside them, and writing over the scan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import cv2
import nibabel
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from client.imaging.lung_segmentation import label_sides
from client.imaging.mask_files import write_nifti_mask
from client.imaging.masks import (
    crop_to_slices,
    find_lung_mask,
    read_lung_mask,
    read_mask,
    resize_to_scan,
)
from client.imaging.preprocess import load_masks, preprocess_cohort
from client.imaging.readers import Volume, read_scan
from client.imaging.slice_pipeline import letterbox, select_and_crop
from client.imaging.slice_store import SliceStore
from client.phantom.chest_ct import Scanner
from client.phantom.dicom_files import write_ct_series
from common.config.schema import PreprocessConfig
from common.utils.errors import ConsiliumError


def write_series(folder: Path, Z: int = 14, N: int = 96, flipped: bool = False) -> Path:
    """Write a DICOM series: a box-shaped body, two lungs (the right one larger), a dense spot in the left."""
    voxels = np.full((Z, N, N), -1000, np.int16)
    voxels[:, 20:76, 8:88] = 40
    voxels[2:-2, 30:68, 14:46] = -850  # at the image's left: the right lung
    voxels[2:-2, 34:64, 54:78] = -850
    voxels[5:8, 40:48, 60:70] = -100
    folder.mkdir(parents=True)
    scanner = Scanner("Test", 360.0, 5.0, 0, 0, 0, (0, 0), 0, feet_first=flipped)
    write_ct_series(folder, voxels, scanner, ("test", folder.name), "P", np.random.default_rng(0))
    return folder


def write_full_mask(mask: np.ndarray, like: Volume, path: Path) -> Path:
    write_nifti_mask(
        path, mask.astype(np.float32), np.arange(len(mask)), (0, mask.shape[1], 0, mask.shape[2]), like, 0.5
    )
    return path


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


def test_preprocessing_stores_masks_and_leaves_slices_unchanged(tmp_path: Path) -> None:
    volume = read_scan(write_series(tmp_path / "a"))
    spot = ((volume.voxels > -200) & (volume.voxels < 0)).astype(np.uint8)
    for name in "bcd":
        write_series(tmp_path / name)
    write_full_mask(spot, volume, tmp_path / "a.nii.gz")
    write_full_mask(
        spot[:-1],
        Volume(volume.voxels[:-1], volume.spacing, volume.positions[:-1], "CT"),
        tmp_path / "short.nii.gz",
    )
    cohort = pd.DataFrame({"path": list("abcd"), "lesion": ["a.nii.gz", None, "short.nii.gz", "gone.png"]})
    preprocess, store = (
        PreprocessConfig(image_size=64, num_slices=6, selection="even"),
        SliceStore(tmp_path / "store"),
    )
    keys_without_masks, _ = preprocess_cohort(cohort, tmp_path, preprocess, store, show_progress=False)
    stored = {f: f.stat().st_mtime_ns for f in store.folder.glob("*/*.npy")}
    keys, skipped = preprocess_cohort(
        cohort, tmp_path, preprocess, store, show_progress=False, mask_columns=["lesion", "lungs"]
    )
    assert keys == keys_without_masks
    assert all(f.stat().st_mtime_ns == t for f, t in stored.items())
    assert [(Path(s.path).name, s.reason.split(": ")[0]) for s in skipped] == [
        ("short.nii.gz", "the mask in column 'lesion'"),
        ("gone.png", "the mask in column 'lesion'"),
    ]
    assert "it has 13 slices of 96 x 96 pixels, its scan 14" in skipped[0].reason
    assert "it is not there" in skipped[1].reason

    lesion, *others = load_masks(store, cohort, tmp_path, keys, "lesion", preprocess)
    assert others == [None, None, None]
    result = select_and_crop(volume, preprocess)
    assert lesion is not None
    assert lesion.any()
    assert np.array_equal(lesion, crop_to_slices(spot, result.indices, result.crop_box, 64))
    lungs = load_masks(store, cohort, tmp_path, keys, "lungs", preprocess)
    assert all(m is not None and np.array_equal(np.unique(m), [0, 1, 2]) for m in lungs)
    assert np.count_nonzero(lungs[0] == 1) > 1.3 * np.count_nonzero(
        lungs[0] == 2
    )  # the right one is the larger

    before = len(list(store.folder.glob("*/*.npy")))
    write_full_mask(
        np.roll(spot, 2, axis=1), volume, tmp_path / "a.nii.gz"
    )  # another mask: only it is made anew
    assert (
        preprocess_cohort(
            cohort, tmp_path, preprocess, store, show_progress=False, mask_columns=["lesion", "lungs"]
        )[0]
        == keys_without_masks
    )
    assert len(list(store.folder.glob("*/*.npy"))) == before + 1
    reread = load_masks(store, cohort, tmp_path, keys, "lesion", preprocess)[0]
    assert reread is not None
    assert not np.array_equal(reread, lesion)
    assert load_masks(store, cohort, tmp_path, [""] * 4, "lungs", preprocess) == [None] * 4

    several = SliceStore(tmp_path / "several")
    assert (
        preprocess_cohort(
            cohort,
            tmp_path,
            preprocess,
            several,
            num_workers=2,
            show_progress=False,
            mask_columns=["lesion", "lungs"],
        )[0]
        == keys
    )
    for one, other in zip(
        lungs, load_masks(several, cohort, tmp_path, keys, "lungs", preprocess), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_lung_crop_uses_cohort_mask_resized_to_scan(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    cv2.imwrite(str(tmp_path / "x.png"), rng.integers(90, 200, (200, 300)).astype(np.uint8))
    lungs = np.zeros((400, 600), np.uint8)  # of the picture before it was made smaller
    lungs[120:300, 100:240], lungs[120:300, 320:500] = 255, 255
    cv2.imwrite(str(tmp_path / "lungs.png"), lungs)
    cv2.imwrite(str(tmp_path / "odd.png"), lungs[:, :500])
    cohort = pd.DataFrame({"path": ["x.png"] * 3, "lungs": ["lungs.png", "odd.png", None]})
    store, crop = SliceStore(tmp_path / "store"), PreprocessConfig(image_size=64, crop="lungs")
    keys, skipped = preprocess_cohort(
        cohort, tmp_path, crop, store, show_progress=False, mask_columns=["lungs"]
    )
    assert len(set(keys)) == 3
    assert store.read_metadata(keys[0])["box"] == [50, 160, 40, 260]  # the mask's and 10 pixels
    assert any("cannot be used" in note for note in store.read_metadata(keys[1])["notes"])
    assert [Path(s.path).name for s in skipped] == ["odd.png"]
    masks = load_masks(store, cohort, tmp_path, keys, "lungs", crop)
    assert masks[1] is None
    assert masks[2] is None  # noise has no lungs
    assert masks[0] is not None
    assert np.array_equal(np.unique(masks[0]), [0, 1])  # of a radiograph the sides are not told apart
    assert np.count_nonzero(masks[0]) == pytest.approx(90 * 160 * (64 / 220) ** 2, rel=0.05)
    body = PreprocessConfig(image_size=64)
    assert (
        len(set(preprocess_cohort(cohort, tmp_path, body, store, show_progress=False)[0])) == 1
    )  # another crop does not look at them


def test_single_ct_slice_is_not_segmented_as_radiograph(tmp_path: Path) -> None:
    volume = read_scan(write_series(tmp_path / "a"))
    cv2.imwrite(
        str(tmp_path / "s.png"), np.clip((volume.voxels[4].astype(int) + 1000) / 5, 0, 255).astype(np.uint8)
    )
    cohort = pd.DataFrame({"path": ["s.png"], "modality": ["CT"]})
    preprocess, store = PreprocessConfig(image_size=96, crop="none"), SliceStore(tmp_path / "store")
    keys, _ = preprocess_cohort(
        cohort, tmp_path, preprocess, store, show_progress=False, mask_columns=["lungs"]
    )
    mask_read = load_masks(store, cohort, tmp_path, keys, "lungs", preprocess)[0]
    truth = find_lung_mask(volume, True)[4]
    assert mask_read is not None
    assert np.mean(mask_read[0] == truth) > 0.98


def test_mask_of_other_shape_is_refused() -> None:
    mask = np.ones((1, 20, 30), np.uint8)
    assert resize_to_scan(mask, (1, 40, 60), True).shape == (1, 40, 60)
    assert resize_to_scan(mask, (1, 40, 61), True).shape == (1, 40, 61)
    for shape, picture in (((1, 40, 60), False), ((2, 20, 30), True), ((1, 40, 63), True)):
        with pytest.raises(ConsiliumError, match="give a mask of the scan's own size"):
            resize_to_scan(mask, shape, picture)
