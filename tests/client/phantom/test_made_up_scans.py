"""The made-up scans are proper DICOM, show what was drawn, and their masks lie on them."""

from __future__ import annotations

from pathlib import Path

import cv2
import nibabel
import numpy as np
import pydicom
import pytest

from client.imaging.readers import read_scan
from client.imaging.readers.nifti import read_nifti
from client.phantom.chest_ct import draw_chest
from client.phantom.dicom_files import write_ct_series, write_mask
from client.phantom.profiles import CENTRE_PROFILES
from tests.client.phantom.tiny_federation import TINY, drawn, rows_of


def test_severity_and_masks_match_what_was_drawn(federation: Path) -> None:
    north, films = rows_of(federation, "north", "CT"), rows_of(federation, "north", "XR")
    for k, row in north.iterrows():
        _, truth = drawn("north", row)
        mask = read_nifti(federation / "north" / row["lesion"]).voxels
        np.testing.assert_array_equal(mask, truth.lesion)
        per_lung = [100 * mask[truth.lungs == side].mean() for side in (1, 2)]
        assert row["severity"] == pytest.approx(max(per_lung), abs=0.006)
        assert mask.any() == (row["covid"] == 1)
        shadow = cv2.imread(str(federation / "north" / films["infection"][k]), cv2.IMREAD_UNCHANGED)
        assert set(np.unique(shadow)) <= {0, 255}
        assert shadow.shape == read_scan(federation / "north" / films["path"][k]).voxels.shape[1:]
        assert not shadow[:, ~mask.any(axis=(0, 1))].any()  # no shadow beside the columns that hold a lesion


@pytest.mark.parametrize("centre", ["north", "east"])
def test_lesion_mask_lies_on_its_series(tmp_path: Path, centre: str) -> None:
    """By the readers, and by the patient's coordinates as the two formats define them, `east` being written
    feet first and mirrored.
    """
    scanner = CENTRE_PROFILES[centre].scanner
    voxels, truth = draw_chest(np.random.default_rng(3), np.random.default_rng(3), scanner, True, 12, 64)
    (tmp_path / "series").mkdir()
    write_ct_series(tmp_path / "series", voxels, scanner, ("x",), "P", np.random.default_rng(0))
    write_mask(tmp_path / "mask.nii.gz", truth.lesion, scanner)
    volume, mask = read_scan(tmp_path / "series"), read_scan(tmp_path / "mask.nii.gz")
    np.testing.assert_array_equal(volume.voxels, voxels)
    np.testing.assert_array_equal(mask.voxels, truth.lesion)
    assert mask.spacing == pytest.approx(volume.spacing, rel=1e-4)
    np.testing.assert_allclose(mask.positions, volume.positions, atol=1e-3)

    image = nibabel.load(tmp_path / "mask.nii.gz")
    inside, outside = [], []
    for file in (tmp_path / "series").iterdir():
        ds = pydicom.dcmread(file)
        rows, columns = np.mgrid[: ds.Rows, : ds.Columns]
        along, down = (
            np.array(ds.ImageOrientationPatient[:3], float),
            np.array(ds.ImageOrientationPatient[3:], float),
        )
        step = float(ds.PixelSpacing[0])
        lps = np.array(ds.ImagePositionPatient, float) + step * (
            columns[..., None] * along + rows[..., None] * down
        )
        ras = lps * [-1, -1, 1]
        i, j, k = (
            np.rint((ras - image.affine[:3, 3]) @ np.linalg.inv(image.affine[:3, :3]).T)
            .astype(int)
            .reshape(-1, 3)
            .T
        )
        affected = np.asarray(image.dataobj)[i, j, k].astype(bool).reshape(rows.shape)
        hu = ds.pixel_array.astype(int) - 1024
        inside += hu[affected].tolist()
        outside += hu[~affected & (hu < -500) & (hu > -980)].tolist()
    assert len(inside) == truth.lesion.sum()
    assert np.mean(inside) > np.mean(outside) + 150


def test_series_are_valid_dicom_with_shuffled_file_names(federation: Path) -> None:
    syntaxes, orders = set(), set()
    for centre, hospital in CENTRE_PROFILES.items():
        df = rows_of(federation, centre, "CT")
        files = sorted((federation / centre / df["path"][0]).iterdir())
        heads = [pydicom.dcmread(f, stop_before_pixels=True) for f in files]
        z = [float(h.ImagePositionPatient[2]) for h in heads]
        assert z not in (sorted(z), sorted(z, reverse=True))
        assert len({h.SOPInstanceUID for h in heads}) == TINY.num_slices
        assert len({h.SeriesInstanceUID for h in heads}) == 1
        assert {h.PatientID for h in heads} == {df["patient"][0]}
        syntaxes.add(heads[0].file_meta.TransferSyntaxUID.name)
        orders.add(bool(np.corrcoef(z, [int(h.InstanceNumber) for h in heads])[0, 1] > 0))
        volume = read_scan(federation / centre / df["path"][0])
        assert volume.voxels.shape == (TINY.num_slices, 64, 64)
        assert volume.spacing == pytest.approx(
            (
                hospital.scanner.slice_spacing,
                hospital.scanner.field_of_view / 64,
                hospital.scanner.field_of_view / 64,
            ),
            rel=1e-4,
        )
        assert len(volume.notes) == hospital.scanner.feet_first  # a turned series is said to be one
    assert syntaxes == {"Explicit VR Little Endian", "RLE Lossless"}
    assert orders == {True, False}


def test_flipped_and_compressed_series_are_read_as_drawn(federation: Path) -> None:
    """Whatever way round a scanner writes, the reader gives the drawn voxels back, feet to head and the heart
    on the patient's left.
    """
    for centre in CENTRE_PROFILES:
        row = rows_of(federation, centre, "CT").iloc[0]
        voxels, _ = drawn(centre, row)
        np.testing.assert_array_equal(read_scan(federation / centre / row["path"]).voxels, voxels)


def test_only_covid_lungs_have_lesions() -> None:
    scanner = CENTRE_PROFILES["north"].scanner
    for seed in range(4):
        ill, truth = draw_chest(
            np.random.default_rng(seed), np.random.default_rng(seed), scanner, True, 24, 64
        )
        mask, columns = truth.lesion, np.arange(64)
        assert mask.any()
        assert mask.mean() < 0.1
        assert truth.lungs[mask].all()
        right, left = (
            (truth.lungs == side).sum(axis=(0, 1)) @ columns / (truth.lungs == side).sum() for side in (1, 2)
        )
        assert right < 32 < left  # columns run to the patient's left
        assert ill[(truth.lungs > 0) & ~mask].mean() < -600
        well, healthy = draw_chest(
            np.random.default_rng(seed), np.random.default_rng(seed), scanner, False, 24, 64
        )
        assert not healthy.lesion.any()
        assert ill[mask].mean() > well[mask].mean() + 100  # denser where the lesion is


def test_scanners_differ_outside_the_body() -> None:
    """Outside the body there is nothing but the scanner: noise and offset differ from centre to centre."""
    corners = {}
    for centre, hospital in CENTRE_PROFILES.items():
        voxels, _ = draw_chest(
            np.random.default_rng(1), np.random.default_rng(2), hospital.scanner, False, 12, 64
        )
        corners[centre] = float(voxels[:, 20:44, 28:36].std()), float(np.median(voxels[:, 20:44, 28:36]))
    offsets = [m for _, m in corners.values()]
    assert max(offsets) - min(offsets) > 20
