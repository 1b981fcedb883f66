"""Made-up scans and masks as files: CT series, radiographs, NIfTI masks."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    UID,
    ComputedRadiographyImageStorage,
    CTImageStorage,
    ExplicitVRLittleEndian,
    RLELossless,
    generate_uid,
)

from client.phantom.scanner import Scanner

LOWEST_SLICE_Z = -150.0  # mm, of a CT's lowest slice
UidParts = tuple[object, ...]  # what the identifiers are made from


def write_ct_series(
    folder: Path,
    voxels: np.ndarray,
    scanner: Scanner,
    uid_parts: UidParts,
    patient_id: str,
    rng: np.random.Generator,
) -> None:
    """Write `voxels` [Z, N, N] int16 HU as CT Image Storage: one file a slice, with shuffled file names."""
    ds = _make_ct_header(voxels, scanner, uid_parts, patient_id)
    pixel_mm = scanner.field_of_view / voxels.shape[2]
    corner = (voxels.shape[2] - 1) / 2 * pixel_mm
    corner_x = corner if scanner.feet_first else -corner
    oriented = voxels[:, :, ::-1] if scanner.feet_first else voxels
    stored = oriented.astype(np.int32) + 1024
    for z, name in enumerate(rng.permutation(len(voxels))):
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.SOPInstanceUID = _make_uid(*uid_parts, z)
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
        ds.InstanceNumber = z + 1 if scanner.feet_first else len(voxels) - z
        position = LOWEST_SLICE_Z + z * scanner.slice_spacing
        ds.ImagePositionPatient = [f"{corner_x:.6g}", f"{-corner:.6g}", f"{position:.6g}"]
        ds.SliceLocation = f"{position:.6g}"
        ds.PixelData = stored[z].astype("<u2").tobytes()
        ds["PixelData"].VR = "OW"
        if scanner.rle_compressed:
            ds.compress(RLELossless, generate_instance_uid=False)
        ds.save_as(folder / f"{name:03d}.dcm", enforce_file_format=True)


def write_radiograph(
    path: Path,
    radiograph: NDArray[np.uint8],
    pixel_mm: float,
    uid_parts: UidParts,
    patient_id: str,
    manufacturer: str,
) -> None:
    """Write `radiograph` [h, w] as Computed Radiography Image Storage, 8 bits."""
    ds = _make_header(ComputedRadiographyImageStorage, patient_id, manufacturer)
    film_parts = (*uid_parts, "film")
    ds.StudyInstanceUID = _make_uid(*film_parts, "study")
    ds.SeriesInstanceUID = _make_uid(*film_parts, "series")
    ds.SOPInstanceUID = _make_uid(*film_parts, "image")
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID
    ds.ImageType = ["DERIVED", "PRIMARY"]
    ds.Modality = "CR"
    ds.ViewPosition = "AP"
    ds.StudyTime = "110000"
    ds.SeriesNumber = 1
    ds.InstanceNumber = 1
    ds.PatientOrientation = ["L", "F"]
    ds.PresentationLUTShape = "IDENTITY"
    ds.Rows, ds.Columns = radiograph.shape
    ds.BitsAllocated = 8
    ds.BitsStored = 8
    ds.HighBit = 7
    ds.WindowCenter = 128
    ds.WindowWidth = 256
    ds.ImagerPixelSpacing = [f"{pixel_mm:.6g}"] * 2
    data = radiograph.tobytes()
    ds.PixelData = data + b"\0" * (len(data) % 2)
    ds["PixelData"].VR = "OB"
    ds.save_as(path, enforce_file_format=True)


def write_mask(path: Path, mask: np.ndarray, scanner: Scanner) -> None:
    """Write `mask` [Z, N, N] as NIfTI, where `write_ct_series` puts the voxels.

    A NIfTI's millimetres run to the right, the front and the head.
    """
    pixel_mm = scanner.field_of_view / mask.shape[2]
    corner = (mask.shape[2] - 1) / 2 * pixel_mm
    affine = np.diag([-pixel_mm, -pixel_mm, scanner.slice_spacing, 1.0])
    affine[:3, 3] = corner, corner, LOWEST_SLICE_Z
    voxels = mask.astype(np.uint8).transpose(2, 1, 0)
    image = nibabel.Nifti1Image(voxels, affine)  # type: ignore[no-untyped-call]
    nibabel.save(image, path)


def _make_ct_header(voxels: np.ndarray, scanner: Scanner, uid_parts: UidParts, patient_id: str) -> Dataset:
    """Return what all slices of a series have in common."""
    ds = _make_header(CTImageStorage, patient_id, scanner.manufacturer)
    ds.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.Modality = "CT"
    ds.StudyTime = "120000"
    ds.StudyInstanceUID = _make_uid(*uid_parts, "study")
    ds.SeriesInstanceUID = _make_uid(*uid_parts, "series")
    ds.FrameOfReferenceUID = _make_uid(*uid_parts, "frame")
    ds.SeriesNumber = 2
    ds.AcquisitionNumber = 1
    ds.KVP = 120
    ds.PositionReferenceIndicator = ""
    ds.Rows, ds.Columns = voxels.shape[1:]
    ds.BitsAllocated = 16
    ds.BitsStored = 12
    ds.HighBit = 11
    ds.RescaleIntercept = -1024
    ds.RescaleSlope = 1
    ds.RescaleType = "HU"
    pixel_mm = scanner.field_of_view / voxels.shape[2]
    ds.PixelSpacing = [f"{pixel_mm:.6g}"] * 2
    ds.SliceThickness = scanner.slice_spacing
    ds.ImageOrientationPatient = [-1 if scanner.feet_first else 1, 0, 0, 0, 1, 0]
    ds.PatientPosition = "FFS" if scanner.feet_first else "HFS"
    return ds


def _make_header(sop_class: UID, patient_id: str, manufacturer: str) -> Dataset:
    """Return what every made-up image says."""
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = sop_class
    ds.SOPClassUID = sop_class
    ds.Manufacturer = manufacturer
    ds.BodyPartExamined = "CHEST"
    ds.PatientName = f"Phantom^{patient_id}"
    ds.PatientID = patient_id
    ds.PatientBirthDate = ""
    ds.PatientSex = "O"
    ds.StudyDate = "20200401"
    ds.StudyID = "1"
    ds.AccessionNumber = ""
    ds.ReferringPhysicianName = ""
    ds.SamplesPerPixel = 1
    ds.PhotometricInterpretation = "MONOCHROME2"
    ds.PixelRepresentation = 0
    return ds


def _make_uid(*parts: object) -> UID:
    return generate_uid(entropy_srcs=[str(part) for part in parts])
