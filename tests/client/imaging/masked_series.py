"""A small CT series that is written as DICOM, and a mask over it; used by the tests of masks."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from client.imaging.mask_files import write_nifti_mask
from client.imaging.readers import Volume
from client.phantom.chest_ct import Scanner
from client.phantom.dicom_files import write_ct_series


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
