"""Radiographs in DICOM: their grey values, and the view that is read; the tests write every file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import FileDataset
from pydicom.uid import (
    DigitalXRayImageStorageForPresentation,
)

from client.imaging.readers import read_scan
from tests.client.dicom_files import (
    has_note,
    make_slice,
    write_files,
)


def radiograph(pixels: NDArray[Any], **more_tags: Any) -> FileDataset:
    tags: dict[str, Any] = {
        "Modality": "DX",
        "PixelRepresentation": 0,
        "Rows": pixels.shape[0],
        "Columns": pixels.shape[1],
    }
    tags |= {
        "PixelData": pixels.astype(np.uint16).tobytes(),
        "ImagePositionPatient": None,
        "ImageOrientationPatient": None,
    }
    tags |= {
        "RescaleSlope": None,
        "RescaleIntercept": None,
        "PixelSpacing": None,
        "ImagerPixelSpacing": [0.14, 0.15],
    }
    return make_slice(0, storage=DigitalXRayImageStorageForPresentation, **(tags | more_tags))


def test_radiographs_are_windowed_and_bone_is_bright(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 4000, 50), (40, 1)).astype(np.uint16)
    uncompressed = read_scan(next(write_files(tmp_path / "a", [radiograph(ramp)]).iterdir()))
    assert (uncompressed.modality, uncompressed.is_hounsfield, uncompressed.voxels.shape) == (
        "XR",
        False,
        (1, 40, 50),
    )
    assert uncompressed.spacing == (1.0, 0.14, 0.15)
    row = uncompressed.voxels[0, 0].astype(int)
    assert (row[0], row[-1]) == (0, 255)
    assert (np.diff(row) >= 0).all()
    inverted = read_scan(
        write_files(tmp_path / "b", [radiograph(ramp, PhotometricInterpretation="MONOCHROME1")])
    )
    np.testing.assert_array_equal(inverted.voxels, 255 - uncompressed.voxels)
    windowed = read_scan(
        write_files(tmp_path / "c", [radiograph(ramp, WindowCenter=1000, WindowWidth=1000)])
    ).voxels[0, 0]
    assert windowed[ramp[0] < 490].max() == 0
    assert windowed[ramp[0] > 1510].min() == 255
    assert 120 <= windowed[np.abs(ramp[0].astype(int) - 1000).argmin()] <= 140
    useless = read_scan(write_files(tmp_path / "d", [radiograph(ramp, WindowCenter=-9000, WindowWidth=10)]))
    np.testing.assert_array_equal(useless.voxels, uncompressed.voxels)


def test_frontal_view_is_preferred(tmp_path: Path) -> None:
    lateral, frontal = np.zeros((20, 30), np.uint16), np.tile(np.arange(40, dtype=np.uint16), (20, 1))
    folder = write_files(
        tmp_path / "scan",
        [
            radiograph(lateral, ViewPosition="LL", series="1"),
            radiograph(frontal, ViewPosition="PA", series="2"),
        ],
    )
    volume = read_scan(folder)
    assert volume.voxels.shape == (1, 20, 40)
    assert has_note(volume, "2 series")
