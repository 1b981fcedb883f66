"""CT series in DICOM as hospitals keep them, intact and damaged; the tests write every file."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.pixels.encoders.base import get_encoder
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    EnhancedCTImageStorage,
    JPEG2000Lossless,
    JPEGLSLossless,
    RLELossless,
)

from client.imaging.readers import detect_format, read_scan
from client.imaging.readers.dicom_series import choose_series, find_series
from common.utils.errors import ConsiliumError
from tests.client.dicom_files import (
    SIZE,
    expected_level,
    has_note,
    make_slice,
    make_stack,
    read_levels,
    truncate_file,
    write_files,
)


def test_series_is_read_in_hounsfield_units_ordered_by_position(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "scan", make_stack())
    (folder / "notes.txt").write_text("not a slice")
    volume = read_scan(folder)
    assert detect_format(folder) == "dicom"
    assert volume.is_hounsfield
    assert volume.voxels.dtype == np.int16
    assert volume.voxels.shape == (6, SIZE, SIZE)
    assert read_levels(volume) == [expected_level(2.5 * z) for z in range(6)]
    assert (volume.voxels[:, :, -1] == 40).all()
    assert volume.spacing == (2.5, 0.7, 0.8)
    np.testing.assert_allclose(volume.positions, np.arange(6) * 2.5)
    assert (volume.modality, volume.notes) == ("CT", [])


@given(st.permutations(range(7)), st.integers(0, 99))
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_file_names_do_not_determine_slice_order(tmp_path: Path, order: list[int], seed: int) -> None:
    folder = tmp_path / f"{seed}-{''.join(map(str, order))}"
    if folder.exists():
        return
    volume = read_scan(write_files(folder, [make_slice(2.0 * z) for z in order], seed))
    assert read_levels(volume) == [expected_level(2.0 * z) for z in range(7)]


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, JPEGLSLossless])
def test_compressed_slices_equal_uncompressed_ones(tmp_path: Path, syntax: UID) -> None:
    if not get_encoder(syntax).is_available:
        pytest.skip(f"no encoder for {syntax.name} here")
    uncompressed, compressed = make_stack(3, size=64), make_stack(3, size=64)
    for ds in compressed:
        ds.compress(syntax, generate_instance_uid=False)
    np.testing.assert_array_equal(
        read_scan(write_files(tmp_path / "packed", compressed)).voxels,
        read_scan(write_files(tmp_path / "plain", uncompressed)).voxels,
    )


def test_rescale_padding_and_clipping_are_applied(tmp_path: Path) -> None:
    pixels = np.full((SIZE, SIZE), 500, np.int16)
    pixels[0], pixels[1], pixels[2] = -2000, 32000, -1500
    slices = [
        make_slice(
            z, RescaleSlope=2, RescaleIntercept=-1000, PixelPaddingValue=-2000, PixelData=pixels.tobytes()
        )
        for z in (0, 1)
    ]
    volume = read_scan(write_files(tmp_path / "a", slices))
    assert volume.voxels[0, :4, 0].tolist() == [-1024, 32767, -1024, 0]
    unsigned = pixels.astype(np.uint16)
    unsigned[0] = 63536
    slices = [
        make_slice(z, PixelRepresentation=0, PixelPaddingValue=63536, PixelData=unsigned.tobytes())
        for z in (0, 1)
    ]
    assert read_scan(write_files(tmp_path / "b", slices)).voxels[0, [0, 3], 0].tolist() == [-1024, 500 - 1024]
    volume = read_scan(write_files(tmp_path / "c", make_stack(3, RescaleIntercept=None, RescaleSlope=None)))
    assert read_levels(volume) == [expected_level(2.5 * z) + 1024 for z in range(3)]
    assert has_note(volume, "No rescale intercept")


def test_tilted_series_is_ordered_along_normal_and_noted(tmp_path: Path) -> None:
    angle = math.radians(12)
    orientation = [1, 0, 0, 0, math.cos(angle), -math.sin(angle)]
    volume = read_scan(write_files(tmp_path / "a", make_stack(ImageOrientationPatient=orientation)))
    assert read_levels(volume) == [expected_level(2.5 * z) for z in range(6)]
    assert volume.spacing[0] == pytest.approx(2.5 * math.cos(angle))
    assert has_note(volume, "tilted by 12.0 degrees")
    # The same slices stacked along their own normal are no tilt, however the body lay.
    along = np.array([0, math.sin(angle), math.cos(angle)])
    untilted = [
        make_slice(2.5 * z, ImageOrientationPatient=orientation, ImagePositionPatient=list(2.5 * z * along))
        for z in range(6)
    ]
    volume = read_scan(write_files(tmp_path / "b", untilted))
    assert volume.spacing[0] == pytest.approx(2.5)
    assert volume.notes == []


def test_prone_slices_are_flipped_to_radiological_view(tmp_path: Path) -> None:
    prone = make_stack(3, ImageOrientationPatient=[-1, 0, 0, 0, -1, 0])
    volume = read_scan(write_files(tmp_path / "scan", prone))
    assert [int(v) for v in volume.voxels[:, 3, -3]] == [expected_level(2.5 * z) for z in range(3)]
    assert (volume.voxels[:, :, 0] == 40).all()
    assert has_note(volume, "turned")


def test_missing_duplicate_and_odd_sized_slices_are_noted(tmp_path: Path) -> None:
    slices = [make_slice(2.5 * z) for z in range(10) if z not in (4, 5)]
    volume = read_scan(write_files(tmp_path / "missing", slices))
    assert len(volume.voxels) == 8
    assert volume.spacing[0] == 2.5
    assert volume.positions[4] - volume.positions[3] == pytest.approx(7.5)
    assert has_note(volume, "About 2 slices missing")

    duplicate = make_slice(5.0, InstanceNumber=5000)  # the later of two in one place goes
    duplicate.PixelData = np.zeros((SIZE, SIZE), np.int16).tobytes()
    volume = read_scan(write_files(tmp_path / "twice", [duplicate, *make_stack()]))
    assert read_levels(volume) == [expected_level(2.5 * z) for z in range(6)]
    assert has_note(volume, "1 slice in the same place")

    volume = read_scan(
        write_files(tmp_path / "sizes", [*make_stack(), make_slice(15.0, size=16), make_slice(17.5, size=16)])
    )
    assert volume.voxels.shape == (6, SIZE, SIZE)
    assert has_note(volume, "2 slices of another size")


def test_instance_number_orders_slices_without_positions(tmp_path: Path) -> None:
    slices = [make_slice(2.5 * z, ImagePositionPatient=None, InstanceNumber=z + 1) for z in range(12)]
    volume = read_scan(write_files(tmp_path / "numbers", slices))
    assert read_levels(volume) == [expected_level(2.5 * z) for z in range(12)]
    assert volume.positions.tolist() == list(range(12))
    assert volume.spacing[0] == 2.5
    assert has_note(volume, "instance number")
    slices = [make_slice(2.5 * z, ImagePositionPatient=None, InstanceNumber=None) for z in range(4)]
    with pytest.raises(ConsiliumError, match="instance numbers are missing too"):
        read_scan(write_files(tmp_path / "neither", slices))


def test_truncated_files_are_left_out_until_fewer_than_half_remain(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "scan", make_stack())
    files = sorted(folder.iterdir())
    truncate_file(files[0], 0.8)  # in its pixels
    volume = read_scan(folder)
    assert len(volume.voxels) == len(volume.positions) == 5
    assert has_note(volume, "1 of 6 slices cannot be decoded")
    truncate_file(files[1], 0.1)  # in its header
    volume = read_scan(folder)
    assert len(volume.voxels) == 4
    assert has_note(volume, "1 file with a damaged DICOM header")
    for file in files[2:4]:
        truncate_file(file, 0.8)
    with pytest.raises(ConsiliumError, match="3 of 5 slices cannot be decoded"):
        read_scan(folder)
    folder = write_files(tmp_path / "ruins", make_stack())
    for file in folder.iterdir():
        truncate_file(file, 0.1)
    with pytest.raises(ConsiliumError, match="6 damaged files"):
        read_scan(folder)


def test_thinnest_axial_series_that_covers_chest_is_chosen(tmp_path: Path) -> None:
    study = tmp_path / "study"
    write_files(study / "thick", make_stack(8, 5.0, series="1.2.3.5", SliceThickness=5, SeriesNumber=2))
    write_files(study / "thin", make_stack(30, 1.25, series="1.2.3.1", SliceThickness=1.25, SeriesNumber=4))
    write_files(
        study / "bolus",
        [make_slice(z, series="1.2.3.2", SliceThickness=0.6, SeriesNumber=5) for z in (10.0, 10.6)],
    )
    coronal = [1, 0, 0, 0, 0, -1]
    coronal_slices = [
        make_slice(
            z,
            series="1.2.3.3",
            SliceThickness=1,
            SeriesNumber=6,
            ImageOrientationPatient=coronal,
            ImagePositionPatient=[0, z, 0],
        )
        for z in range(40)
    ]
    write_files(study / "coronal", coronal_slices)
    write_files(
        study / "scout", [make_slice(0, series="1.2.3.4", ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])]
    )
    candidates, _, _ = find_series(study)
    assert sorted(s.series_uid for s in candidates) == ["1.2.3.1", "1.2.3.2", "1.2.3.3", "1.2.3.5"]
    assert {s.patient_id for s in candidates} == {"SECRET"}
    chosen, notes = choose_series(candidates)
    assert (chosen.series_uid, chosen.is_axial, chosen.slice_thickness, len(chosen.files)) == (
        "1.2.3.1",
        True,
        1.25,
        30,
    )
    assert len(notes) == 1
    volume = read_scan(study)
    assert len(volume.voxels) == 30
    assert has_note(volume, "4 series", "number 4 (1.25 mm, 30 images) was read", "number 2 (5 mm, 8 images)")
    assert len(read_scan(study, series_uid="1.2.3.5").voxels) == 8
    with pytest.raises(ConsiliumError, match=r"does not hold the series 9\.9"):
        read_scan(study, series_uid="9.9")
    write_files(study / "other", make_stack(3, series="1.2.3.9", StudyInstanceUID="1.2.9"))
    with pytest.raises(ConsiliumError, match="2 studies"):
        read_scan(study)


def test_multi_frame_file_is_read_as_series(tmp_path: Path) -> None:
    def item(**tags: Any) -> Dataset:
        item_dataset = Dataset()
        for tag, value in tags.items():
            setattr(item_dataset, tag, value)
        return item_dataset

    positions = [5.0, 0.0, 2.5]
    ds = make_slice(
        0,
        storage=EnhancedCTImageStorage,
        ImagePositionPatient=None,
        ImageOrientationPatient=None,
        PixelSpacing=None,
    )
    del ds.RescaleSlope, ds.RescaleIntercept, ds.SliceThickness
    ds.NumberOfFrames = len(positions)
    ds.SharedFunctionalGroupsSequence = Sequence(
        [
            item(
                PlaneOrientationSequence=Sequence([item(ImageOrientationPatient=[1, 0, 0, 0, 1, 0])]),
                PixelMeasuresSequence=Sequence([item(PixelSpacing=[0.7, 0.8], SliceThickness=2.5)]),
                PixelValueTransformationSequence=Sequence([item(RescaleSlope=1, RescaleIntercept=-1024)]),
            )
        ]
    )
    ds.PerFrameFunctionalGroupsSequence = Sequence(
        [item(PlanePositionSequence=Sequence([item(ImagePositionPatient=[0, 0, z])])) for z in positions]
    )
    ds.PixelData = b"".join(make_slice(z).PixelData for z in positions)
    folder = write_files(tmp_path / "scan", [ds])
    volume = read_scan(next(folder.iterdir()))
    assert read_levels(volume) == [expected_level(z) for z in sorted(positions)]
    assert volume.spacing == (2.5, 0.7, 0.8)
    assert volume.notes == []
