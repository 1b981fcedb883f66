"""Films of made-up chests.

The right way up, dark where there is air, and what is known of them on the same grid.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pydicom
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from client.imaging.readers import read_scan
from client.phantom.chest_ct import draw_chest
from client.phantom.chest_xray import (
    MIN_MASK_THICKNESS,
    compute_zone_fractions,
    project_mask,
    project_radiograph,
)
from client.phantom.dicom_files import write_radiograph
from client.phantom.profiles import CENTRE_PROFILES


def test_a_step_wedge_grows_brighter_with_every_step() -> None:
    """Radiographers' own test object: water of growing thickness, 0 to 186 mm in steps of 6 mm."""
    voxels = np.full((32, 32, 32), -1000, np.int16)
    for x in range(32):
        voxels[:, :x, x] = 0
    film = project_radiograph(voxels, 6.0, 6.0)
    assert film.shape == (32, 32)
    assert (np.diff(film.astype(int), axis=1) >= 0).all()
    assert film[:, 0].max() < 30
    assert film[:, -1].min() > 180
    np.testing.assert_array_equal(
        film, project_radiograph(voxels[:, ::-1], 6.0, 6.0)
    )  # along a ray the order does not matter
    assert not project_radiograph(np.full((4, 8, 8), -1000, np.int16), 6.0, 6.0).any()


def test_head_up_and_right_on_the_left() -> None:
    voxels = np.full((20, 40, 40), 0, np.int16)
    voxels[15:, :20, :10] = -1000  # air high up in the patient's right half
    film = project_radiograph(voxels, 5.0, 5.0)
    assert film[:5, :10].mean() + 80 < film[:5, 30:].mean()
    assert film[:5, :10].mean() + 80 < film[15:, :10].mean()


@given(arrays(bool, (5, 6, 7)))
def test_a_mask_is_where_rays_meet_enough_of_it(mask: np.ndarray) -> None:
    """With slices as far apart as pixels nothing is interpolated: count by hand."""
    found = project_mask(mask, 4.0, 4.0)
    for z in range(5):
        for x in range(7):
            assert found[4 - z, x] == (sum(4.0 for y in range(6) if mask[z, y, x]) >= MIN_MASK_THICKNESS)


def test_a_ball_stays_round_between_thick_slices() -> None:
    z, y, x = np.ogrid[:20, :60, :60]
    ball = ((z - 9.5) * 12.5) ** 2 + ((y - 29.5) * 3) ** 2 + ((x - 29.5) * 3) ** 2 < 60**2
    shadow = project_mask(ball, 3.0, 12.5)
    rows, columns = np.flatnonzero(shadow.any(axis=1)), np.flatnonzero(shadow.any(axis=0))
    assert shadow.shape == (83, 60)
    assert abs(len(rows) - len(columns)) <= 3
    assert abs(len(columns) - 2 * np.sqrt(60**2 - (MIN_MASK_THICKNESS / 2) ** 2) / 3) <= 2


@given(arrays(bool, (11, 6)), arrays(bool, (11, 6)), st.integers(0, 10))
def test_zones_part_a_lung(lung: np.ndarray, affected: np.ndarray, top: int) -> None:
    """Three zones of equal height (to a row) that share the lung's affected pixels among them."""
    lung[:top] = False
    shares = compute_zone_fractions(lung, affected)
    rows = np.flatnonzero(lung.any(axis=1))
    if not len(rows):
        assert shares == [0, 0, 0]
        return
    edges = [rows[0] + round(k * (rows[-1] + 1 - rows[0]) / 3) for k in range(4)]
    sizes = [int(lung[a:b].sum()) for a, b in pairwise(edges)]
    assert sum(sizes) == lung.sum()
    assert np.isclose(
        sum(share * size for share, size in zip(shares, sizes, strict=True)), (lung & affected).sum()
    )


def test_a_chest_looks_like_one_and_a_lesion_brightens_it() -> None:
    scanner = CENTRE_PROFILES["north"].scanner
    mm = scanner.field_of_view / 96
    films, shadows = [], []
    for covid in (True, False):
        voxels, truth = draw_chest(np.random.default_rng(5), np.random.default_rng(6), scanner, covid, 24, 96)
        films.append(project_radiograph(voxels, mm, 12.5))
        shadows.append(project_mask(truth.lesion, mm, 12.5))
    lungs = [project_mask(truth.lungs == side, mm, 12.5, 60) for side in (1, 2)]
    ill, well = films
    middle = well[20:60, 46:50]  # the mediastinum
    right, left = (np.median(well[lung]) for lung in lungs)
    assert max(right, left) < 130 < 200 < middle.mean()
    assert well[:, :2].mean() < 40  # beside the patient
    assert lungs[0].sum() > lungs[1].sum()  # the heart lies before the left lung
    seen = shadows[0] & (lungs[0] | lungs[1])
    assert not shadows[1].any()
    assert ill[seen].mean() > well[seen].mean() + 15


def test_a_film_is_read_as_it_was_written(tmp_path: Path) -> None:
    film = np.random.default_rng(0).integers(0, 256, (33, 27), dtype=np.uint8)  # an odd number of bytes
    film[0, :2] = 0, 255
    write_radiograph(tmp_path / "film.dcm", film, 2.8125, (7, "north", "north-0001"), "N0001", "Boreal")
    volume = read_scan(tmp_path / "film.dcm")
    assert (volume.modality, volume.voxels.shape, volume.voxels.dtype) == ("XR", (1, 33, 27), np.uint8)
    assert volume.spacing == (1.0, 2.8125, 2.8125)
    assert not volume.notes
    assert np.abs(volume.voxels[0].astype(int) - film).max() <= 1
    header = pydicom.dcmread(tmp_path / "film.dcm")
    assert (header.Modality, header.PatientID, header.file_meta.MediaStorageSOPInstanceUID) == (
        "CR",
        "N0001",
        header.SOPInstanceUID,
    )
