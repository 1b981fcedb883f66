"""Readers of NIfTI files and pictures, paths without a scan, and real scans where they are available."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import cv2
import nibabel
import numpy as np
import pydicom
import pytest
from numpy.typing import NDArray

from client.imaging.readers import detect_format, read_scan
from common.utils.errors import ConsiliumError
from tests.client.dicom_files import has_note, make_slice, read_levels, truncate_file, write_files

REAL = Path(os.environ.get("CONSILIUM_REAL_DATA", Path(__file__).parents[4].parent / "shared" / "data"))


def test_path_without_scan_is_refused_with_reason(tmp_path: Path) -> None:
    with pytest.raises(ConsiliumError, match="does not exist"):
        read_scan(tmp_path / "nowhere")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert detect_format(empty) is None
    with pytest.raises(ConsiliumError, match="holds no DICOM"):
        read_scan(empty)
    with pytest.raises(ConsiliumError, match="only MR"):
        read_scan(write_files(tmp_path / "mr", [make_slice(0, Modality="MR")]))
    scout = make_slice(0, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    with pytest.raises(ConsiliumError, match="localiser"):
        read_scan(write_files(tmp_path / "scout", [scout]))
    (tmp_path / "fake.dcm").write_bytes(b"this is no DICOM file at all" * 30)
    with pytest.raises(ConsiliumError, match="damaged"):
        read_scan(tmp_path / "fake.dcm")


def save(data: NDArray[Any], affine: NDArray[Any], path: Path) -> None:
    nibabel.save(nibabel.Nifti1Image(data, affine), path)  # type: ignore[no-untyped-call]


def test_nifti_of_any_orientation_is_read_as_axial_slices(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    ras = rng.integers(-1000, 400, (10, 12, 5)).astype(
        np.int16
    )  # x to the right, y to the front, z to the head
    affine = np.diag([0.8, 0.7, 2.5, 1.0])
    affine[2, 3] = -50
    save(ras, affine, tmp_path / "a.nii.gz")
    image: Any = nibabel.Nifti1Image(ras, affine)  # type: ignore[no-untyped-call]
    flipped = image.as_reoriented(np.array([[0, -1], [1, -1], [2, -1]]))
    nibabel.save(flipped, tmp_path / "b.nii")
    stored, reoriented = read_scan(tmp_path / "a.nii.gz"), read_scan(tmp_path / "b.nii")
    assert stored.is_hounsfield
    np.testing.assert_array_equal(stored.voxels, reoriented.voxels)
    np.testing.assert_array_equal(stored.voxels[2, ::-1, ::-1].T, ras[:, :, 2])
    np.testing.assert_allclose(stored.spacing, (2.5, 0.7, 0.8), rtol=1e-6)
    np.testing.assert_allclose(stored.positions, -50 + 2.5 * np.arange(5), rtol=1e-6)
    np.testing.assert_allclose(reoriented.positions, stored.positions, rtol=1e-6)
    folder = tmp_path / "one"
    folder.mkdir()
    (tmp_path / "a.nii.gz").rename(folder / "a.nii.gz")
    assert detect_format(folder) == "nifti"
    np.testing.assert_array_equal(read_scan(folder).voxels, stored.voxels)


def test_nifti_without_hounsfield_units_is_grey_and_damaged_files_are_refused(tmp_path: Path) -> None:
    ramp = np.linspace(0, 1, 6 * 6 * 4).reshape(6, 6, 4)
    arrays: dict[str, NDArray[Any]] = {
        "unit": ramp.astype(np.float32),
        "byte": (ramp * 255).astype(np.uint8),
        "stored": (ramp * 3000).astype(np.int16),
    }
    for name, data in arrays.items():
        save(data, np.eye(4), tmp_path / f"{name}.nii")
        volume = read_scan(tmp_path / f"{name}.nii")
        assert volume.voxels.dtype == np.uint8
        assert (int(volume.voxels.min()), int(volume.voxels.max())) == (0, 255)
        assert has_note(volume, "not Hounsfield units")
    save(np.zeros((4, 4, 4, 3), np.int16), np.eye(4), tmp_path / "four.nii")
    with pytest.raises(ConsiliumError, match="three dimensions"):
        read_scan(tmp_path / "four.nii")
    save(
        np.random.default_rng(0).integers(-999, 99, (9, 9, 9)).astype(np.int16),
        np.eye(4),
        tmp_path / "cut.nii.gz",
    )
    truncate_file(tmp_path / "cut.nii.gz", 0.5)
    with pytest.raises(ConsiliumError, match="cannot be read as NIfTI"):
        read_scan(tmp_path / "cut.nii.gz")
    with pytest.raises(ConsiliumError, match="several NIfTI"):
        read_scan(tmp_path)


def test_folder_of_pictures_is_read_in_natural_order(tmp_path: Path) -> None:
    for number in (1, 2, 9, 10, 11, 100):
        cv2.imwrite(str(tmp_path / f"{number}.png"), np.full((20, 24), number, np.uint8))
    cv2.imwrite(str(tmp_path / "50.png"), np.full((8, 8), 50, np.uint8))
    (tmp_path / "60.jpg").write_bytes(b"no picture")
    volume = read_scan(tmp_path)
    assert detect_format(tmp_path) == "slices"
    assert read_levels(volume) == [1, 2, 9, 10, 11, 100]
    assert (volume.modality, volume.is_hounsfield, volume.spacing) == ("CT", False, (1.0, 1.0, 1.0))
    assert has_note(volume, "1 of 8 pictures cannot be read")
    assert has_note(volume, "1 of 7 pictures have another size")
    for number in range(200, 210):
        (tmp_path / f"{number}.jpg").write_bytes(b"")
    with pytest.raises(ConsiliumError, match="11 of 18 pictures cannot be read"):
        read_scan(tmp_path)


def test_single_picture_is_read_as_radiograph(tmp_path: Path) -> None:
    twelve_bit = np.linspace(0, 4095, 30 * 40).reshape(30, 40).astype(np.uint16)
    cv2.imwrite(str(tmp_path / "deep.png"), twelve_bit)
    cv2.imwrite(str(tmp_path / "colour.JPG"), np.full((30, 40, 3), 77, np.uint8))
    volume = read_scan(tmp_path / "deep.png")
    assert (volume.modality, volume.voxels.shape, int(volume.voxels.max())) == ("XR", (1, 30, 40), 255)
    assert detect_format(tmp_path / "colour.JPG") == "image"
    assert read_scan(tmp_path / "colour.JPG").voxels[0, 5, 5] == 77
    (tmp_path / "bad.png").write_bytes(b"\x89PNG no more")
    with pytest.raises(ConsiliumError, match="cannot be read as a picture"):
        read_scan(tmp_path / "bad.png")


@pytest.mark.skipif(not (REAL / "ct_dicom").is_dir(), reason="the real CT series are not here")
@pytest.mark.parametrize("name", ["lung_pet_ct_dx_A0002_B40f", "ricord1a_000082_covid"])
def test_real_ct_series_are_read_exactly(name: str) -> None:
    folder = REAL / "ct_dicom" / name
    volume = read_scan(folder)
    assert len(volume.voxels) == len(list(folder.iterdir()))
    assert (np.diff(volume.positions) > 0).all()
    assert volume.voxels.min() == -1024
    assert 0.4 < volume.spacing[2] < 1
    assert volume.notes == []
    first = pydicom.dcmread(min(folder.iterdir()))
    position = float(first.ImagePositionPatient[2])
    index = int(np.abs(volume.positions - position).argmin())
    truth = (first.pixel_array.astype(int) * int(first.RescaleSlope) + int(first.RescaleIntercept)).clip(
        -1024
    )
    np.testing.assert_array_equal(volume.voxels[index], truth)


@pytest.mark.skipif(not (REAL / "mosmed_masks3d").is_dir(), reason="the real NIfTI masks are not here")
def test_real_nifti_mask_is_read() -> None:
    volume = read_scan(min((REAL / "mosmed_masks3d").glob("*.nii.gz")))
    assert volume.voxels.shape[1:] == (512, 512)
    assert volume.spacing[0] > 2
