"""DICOM files that the tests write, and what is read of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import UID, CTImageStorage, ExplicitVRLittleEndian, generate_uid

from client.imaging.readers import Volume

SIZE = 24
STUDY = generate_uid(entropy_srcs=["study"])


def level(z: float) -> int:
    """The HU of a test slice's left half tells where it lies."""
    return int(10 * z) - 300


def dataset(
    z: float = 0.0, series: str = "1.2.3", size: int = SIZE, storage: UID = CTImageStorage, **changed: Any
) -> FileDataset:
    """One CT slice at z mm; `changed` sets tags, or removes those given as None."""
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = storage, ExplicitVRLittleEndian
    meta.MediaStorageSOPInstanceUID = generate_uid()
    ds = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    ds.SOPClassUID, ds.SOPInstanceUID = storage, meta.MediaStorageSOPInstanceUID
    ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.SeriesNumber = STUDY, series, 3
    ds.PatientID, ds.PatientName, ds.Modality, ds.ImageType = (
        "SECRET",
        "Secret^Name",
        "CT",
        ["ORIGINAL", "PRIMARY", "AXIAL"],
    )
    ds.Rows = ds.Columns = size
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated = ds.BitsStored = 16
    ds.HighBit, ds.PixelRepresentation = 15, 1
    ds.RescaleSlope, ds.RescaleIntercept, ds.SliceThickness, ds.PixelSpacing = 1, -1024, 2.5, [0.7, 0.8]
    ds.ImagePositionPatient, ds.ImageOrientationPatient, ds.InstanceNumber = (
        [-100, -120, z],
        [1, 0, 0, 0, 1, 0],
        1000 - int(z),
    )
    pixels = np.full((size, size), level(z) + 1024, np.int16)
    pixels[:, size // 2 :] = 1024 + 40
    ds.PixelData = pixels.tobytes()
    for tag, value in changed.items():
        if value is None:
            delattr(ds, tag)
        else:
            setattr(ds, tag, value)
    return ds


def write(folder: Path, slices: list[FileDataset], seed: int = 0) -> Path:
    """Files whose names tell nothing of the order."""
    folder.mkdir(parents=True, exist_ok=True)
    start = len(list(folder.iterdir()))
    for name, ds in zip(np.random.default_rng(seed).permutation(len(slices)), slices, strict=True):
        ds.save_as(folder / f"IM{start + name}", enforce_file_format=True)
    return folder


def stack(count: int = 6, step: float = 2.5, **changed: Any) -> list[FileDataset]:
    return [dataset(z * step, **changed) for z in range(count)]


def levels(volume: Volume) -> list[int]:
    return [int(v) for v in volume.voxels[:, 3, 3]]


def said(volume: Volume, *words: str) -> bool:
    assert not any("SECRET" in note or STUDY in note or "1.2.3" in note for note in volume.notes)
    return any(all(word in note for word in words) for note in volume.notes)


def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])
