"""Masks in preprocessing: stored beside the slices, made for lungs, and used for the crop."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pytest

from client.imaging.masks import (
    crop_to_slices,
    find_lung_mask,
)
from client.imaging.preprocess import load_masks, preprocess_cohort
from client.imaging.readers import Volume, read_scan
from client.imaging.slice_pipeline import select_and_crop
from client.imaging.slice_store import SliceStore
from common.config.schema import PreprocessConfig
from tests.client.imaging.masked_series import write_full_mask, write_series


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
