"""DICOM files that the tests write, and what the readers make of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, generate_uid

from client.imaging.readers import Volume

SIZE = 24
STUDY = generate_uid(entropy_srcs=["study"])


def expected_level(z: float) -> int:
    """Return the HU of the left half of a test slice at z mm."""
    return int(10 * z) - 300


def make_slice(
    z: float = 0.0, series: str = "1.2.3", size: int = SIZE, storage: UID = CTImageStorage, **tags: Any
) -> FileDataset:
    """Return one CT slice at z mm; `tags` sets further ones, or removes those given as None."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = storage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID = storage
    ds.SOPInstanceUID = meta.MediaStorageSOPInstanceUID
    ds.StudyInstanceUID = STUDY
    ds.SeriesInstanceUID = series
    ds.SeriesNumber = 3
    ds.PatientID = "SECRET"
    ds.PatientName = "Secret^Name"
    ds.Modality = "CT"
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.Rows = ds.Columns = size
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.BitsAllocated = ds.BitsStored = 16
    ds.HighBit = 15
    ds.PixelRepresentation = 1
    ds.RescaleSlope = 1
    ds.RescaleIntercept = -1024
    ds.SliceThickness = 2.5
    ds.PixelSpacing = [0.7, 0.8]
    ds.ImagePositionPatient = [-100, -120, z]
    ds.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    ds.InstanceNumber = 1000 - int(z)
    pixels = np.full((size, size), expected_level(z) + 1024, np.int16)
    pixels[:, size // 2 :] = 1024 + 40
    ds.PixelData = pixels.tobytes()
    for tag, value in tags.items():
        if value is None:
            delattr(ds, tag)
        else:
            setattr(ds, tag, value)
    return ds


def write_files(folder: Path, slices: list[FileDataset], seed: int = 0) -> Path:
    """Write slices to files whose names say nothing of their order."""
    folder.mkdir(parents=True, exist_ok=True)
    start = len(list(folder.iterdir()))
    for name, ds in zip(np.random.default_rng(seed).permutation(len(slices)), slices, strict=True):
        ds.save_as(folder / f"IM{start + name}", enforce_file_format=True)
    return folder


def make_stack(count: int = 6, step: float = 2.5, **tags: Any) -> list[FileDataset]:
    """Return slices `step` mm apart, with the same further tags."""
    return [make_slice(z * step, **tags) for z in range(count)]


def read_levels(volume: Volume) -> list[int]:
    """Return the HU by which `expected_level` marks each slice."""
    return [int(v) for v in volume.voxels[:, 3, 3]]


def has_note(volume: Volume, *words: str) -> bool:
    """Check that one of the volume's notes holds all the words, and that none identifies the patient."""
    assert not any("SECRET" in note or STUDY in note or "1.2.3" in note for note in volume.notes)
    return any(all(word in note for word in words) for note in volume.notes)


def truncate_file(path: Path, share: float) -> None:
    """Keep only the first `share` of a file."""
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
