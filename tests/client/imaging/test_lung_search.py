"""The search for the lungs in a long scan: the quick one finds what the full one does, and decodes less."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from client.imaging.lung_segmentation import apply_window
from client.imaging.paper_body import find_paper_body_box, segment_paper_body
from client.imaging.readers import LazyVolume, Volume, read_scan
from client.imaging.slice_pipeline import extract_slices, letterbox, select_and_crop
from client.imaging.slice_selection import SelectionMethod, select_slices
from common.config.schema import PreprocessConfig
from tests.client.dicom_files import make_slice, write_files
from tests.client.imaging.test_lung_segmentation import body_box, lung_areas

SELECTIONS: list[SelectionMethod] = ["kds", "zquantile", "even"]  # those that a look at some slices serves


def make_long_scan(seed: int, Z: int, size: int = 128) -> Volume:
    """Return a chest in HU with noise: two lungs of random size in a body that swell and shrink along z."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    voxels = np.full((Z, size, size), -1000, np.int16)
    low, high, power, tall = (
        rng.uniform(0, 0.15),
        rng.uniform(0.85, 1),
        rng.uniform(0.6, 1.6),
        rng.uniform(0.15, 0.22),
    )
    for z in range(Z):
        t = np.clip(((z + 0.5) / Z - low) / (high - low), 0, 1)
        swell = np.sin(np.pi * t**power)
        voxels[z][((y - 0.47) / 0.3) ** 2 + ((x - 0.5) / 0.42) ** 2 <= 1] = 40
        for middle in (0.32, 0.68):
            voxels[z][((y - 0.45) / tall) ** 2 + ((x - middle) / 0.12) ** 2 <= swell] = -850
    voxels += rng.normal(0, 25, voxels.shape).astype(np.int16)
    return Volume(voxels, (1.5, 2.5, 2.5), 1.5 * np.arange(Z), "CT")


def write_jpegs(volume: Volume, folder: Path, names: list[str]) -> Path:
    folder.mkdir(parents=True)
    for name, voxels in zip(names, volume.voxels, strict=True):
        (folder / name).write_bytes(cv2.imencode(".jpg", apply_window(voxels, (-1000, 300)))[1].tobytes())
    return folder


def write_dicom(volume: Volume, folder: Path, order: list[int]) -> Path:
    size = volume.voxels.shape[1]
    slices = [
        make_slice(
            1.5 * z,
            size=size,
            PixelSpacing=[2.5, 2.5],
            PixelData=(volume.voxels[z] + 1024).astype(np.int16).tobytes(),
        )
        for z in order
    ]
    return write_files(folder, slices)


def apply_full_rule(
    volume: Volume, selection: SelectionMethod, size: int
) -> tuple[NDArray[np.int64], NDArray[np.uint8]]:
    """Apply the rule to every slice at full resolution: return indices, and slices cropped to the body."""
    shades = (-1000.0, 300.0) if volume.is_hounsfield else (0.0, 255.0)
    if selection == "kds_paper":
        areas, boxes = segment_paper_body(volume.voxels, shades)
        areas, box = areas * volume.spacing[1] * volume.spacing[2], find_paper_body_box(boxes, volume)
    else:
        areas, box = lung_areas(volume), body_box(volume)
    indices = select_slices(areas, 8, selection, volume.positions)
    y0, y1, x0, x1 = box
    return indices, np.stack(
        [letterbox(apply_window(volume.voxels[i, y0:y1, x0:x1], shades), size) for i in indices]
    )


@pytest.mark.parametrize("kind", ["jpeg", "dicom"])
@pytest.mark.parametrize("selection", ["kds", "kds_paper", "zquantile", "even"])
def test_full_lung_search_equals_reference_rule(
    tmp_path: Path, kind: str, selection: SelectionMethod
) -> None:
    volume = make_long_scan(3, 70, 192)
    names = [f"s{z}.jpg" for z in range(70)]
    folder = (
        write_jpegs(volume, tmp_path / "scan", names)
        if kind == "jpeg"
        else write_dicom(volume, tmp_path / "scan", list(range(70)))
    )
    result, scan = extract_slices(
        folder, None, PreprocessConfig(selection=selection, full_lung_search=True, image_size=64)
    )
    assert isinstance(scan, LazyVolume)  # one slice in memory at a time
    indices, slices = apply_full_rule(read_scan(folder), selection, 64)
    np.testing.assert_array_equal(result.indices, indices)
    np.testing.assert_array_equal(result.slices, slices)
    if selection == "kds_paper":
        np.testing.assert_array_equal(
            extract_slices(folder, None, PreprocessConfig(selection=selection, image_size=64))[0].slices,
            slices,
        )


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 10_000), st.integers(40, 150))
def test_quick_search_selects_nearly_same_slices_as_full_search(seed: int, Z: int) -> None:
    hu_volume = make_long_scan(seed, Z)
    for volume in (
        hu_volume,
        Volume(
            np.stack([apply_window(v, (-1000, 300)) for v in hu_volume.voxels]),
            hu_volume.spacing,
            hu_volume.positions,
            "CT",
        ),
    ):
        areas = lung_areas(volume)
        for selection in SELECTIONS:
            quick = select_and_crop(volume, PreprocessConfig(selection=selection, image_size=32))
            full = select_and_crop(
                volume, PreprocessConfig(selection=selection, image_size=32, full_lung_search=True)
            )
            assert np.abs(quick.areas - areas).mean() < 0.05 * areas.max()
            assert np.abs(np.subtract(quick.crop_box, full.crop_box)).max() <= 2 * 2 + 1  # two reduced pixels
            if selection == "kds":  # unstable by nature: neighbours in area need not be neighbours along z
                ranks = [
                    np.sort(np.searchsorted(np.sort(areas), areas[choice.indices]) / Z)
                    for choice in (quick, full)
                ]
                assert np.abs(ranks[0] - ranks[1]).max() < 0.15
            else:
                assert np.abs(quick.indices - full.indices).max() <= max(2, Z // 32)
    assert quick.slices.shape == (8, 32, 32)


@settings(max_examples=6, deadline=None)
@given(st.permutations(range(50)), st.sampled_from(SELECTIONS))
def test_quick_search_does_not_depend_on_file_names(
    tmp_path_factory: pytest.TempPathFactory, order: list[int], selection: SelectionMethod
) -> None:
    volume, folder = make_long_scan(1, 50), tmp_path_factory.mktemp("names")
    preprocess = PreprocessConfig(selection=selection, image_size=32)
    in_order, scan = extract_slices(write_dicom(volume, folder / "a", list(range(50))), None, preprocess)
    shuffled, _ = extract_slices(write_dicom(volume, folder / "b", order), None, preprocess)
    assert isinstance(scan, LazyVolume)
    np.testing.assert_array_equal(in_order.indices, shuffled.indices)
    np.testing.assert_array_equal(in_order.slices, shuffled.slices)
    in_memory = select_and_crop(read_scan(folder / "a"), preprocess)
    np.testing.assert_array_equal(in_order.slices, in_memory.slices)
    pictures = [
        write_jpegs(volume, folder / c, [f"{c}{z}.{'jpg' if z % 2 else 'JPEG'}" for z in range(100, 150)])
        for c in "cd"
    ]
    np.testing.assert_array_equal(*(extract_slices(p, None, preprocess)[0].slices for p in pictures))


def test_only_searched_and_kept_slices_are_decoded(tmp_path: Path) -> None:
    volume = make_long_scan(2, 96, 256)
    folder = write_jpegs(volume, tmp_path / "scan", [f"{z}.jpg" for z in range(96)])
    preprocess = PreprocessConfig(selection="zquantile", image_size=64)
    result, scan = extract_slices(folder, None, preprocess)
    y0, y1, x0, x1 = result.crop_box
    complete = read_scan(folder)
    np.testing.assert_array_equal(
        result.slices, np.stack([letterbox(complete.voxels[i, y0:y1, x0:x1], 64) for i in result.indices])
    )
    decoded = {*range(1, 96, 3), *result.indices.tolist()}
    for z in set(range(96)) - decoded:
        file = folder / f"{z}.jpg"
        data = file.read_bytes()
        file.write_bytes(
            data[:700] + bytes(len(data) - 702) + data[-2:]
        )  # the header stays, the picture goes
    np.testing.assert_array_equal(extract_slices(folder, None, preprocess)[0].slices, result.slices)
    assert scan.shape == (96, 256, 256)


def test_unusual_picture_makes_whole_scan_be_read(tmp_path: Path) -> None:
    volume = make_long_scan(2, 60)
    folder = write_jpegs(volume, tmp_path / "scan", [f"{z}.jpg" for z in range(60)])
    complete, small_jpeg = (
        (folder / "7.jpg").read_bytes(),
        cv2.imencode(".jpg", np.zeros((20, 20), np.uint8))[1].tobytes(),
    )
    for spoilt, expected_note in (
        (b"", "1 of 60 pictures cannot be read"),
        (small_jpeg, "another size"),
        (complete[:-900], ""),
    ):
        (folder / "7.jpg").write_bytes(spoilt)
        result, scan = extract_slices(folder, None, PreprocessConfig(image_size=32))
        assert isinstance(scan, Volume)
        assert result.notes == read_scan(folder).notes
        assert any(expected_note in note for note in result.notes)
    (folder / "7.jpg").write_bytes(complete)
    for z in (30, 31, 32):  # they look complete, and hold nothing
        (folder / f"{z}.jpg").write_bytes(complete[:180] + b"\xff\xd9")
    result, _ = extract_slices(folder, None, PreprocessConfig(image_size=32))
    assert result.slices.shape == (8, 32, 32)


def test_quick_search_without_lungs_falls_back_to_full_search(tmp_path: Path) -> None:
    volume = make_long_scan(4, 60)
    empty = Volume(
        np.where(volume.voxels < -500, 40, volume.voxels).astype(np.int16),
        volume.spacing,
        volume.positions,
        "CT",
    )
    empty.voxels[20, 50:60, 40:60] = -850  # a little air in a single slice
    np.testing.assert_array_equal(select_and_crop(empty, PreprocessConfig()).areas, lung_areas(empty))
    assert lung_areas(empty).max() > 0
