"""A chest film of a CT: its digitally reconstructed projection from back to front, and masks on the same grid.

Rays are parallel (Siddon, Med. Phys. 1985, with every ray along y). The film is processed as digital ones are: the logarithm of the exposure,
which is the attenuation's line integral, with its local contrast raised, through an S-shaped curve whose middle is set by the body itself
(automatic exposure). Head up, the patient's right on the image's left; bone bright (MONOCHROME2).
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ComputedRadiographyImageStorage, ExplicitVRLittleEndian, generate_uid

WATER_ATTENUATION = 0.02  # 1/mm: what water takes of X-rays on a millimetre
BONE_THRESHOLD_HU, BONE_ATTENUATION_FACTOR = (
    150,
    2.5,
)  # HU above the first stop this many times more than a CT's numbers say: films are taken at a lower voltage
MIN_BODY_ATTENUATION = 1.0  # of line integral, 50 mm of water: less is beside the patient
CONTRAST_BLUR = 12.0  # mm of blur: what is larger keeps its grey, smaller things (ribs, vessels) are raised
MIN_MASK_THICKNESS = 10.0  # mm along a ray that make a mask's pixel


def project_radiograph(voxels: NDArray[np.int16], pixel_mm: float, slice_mm: float) -> NDArray[np.uint8]:
    """The film `[h, w]` of a CT `[Z, N, N]` (HU; feet to head, rows to the back, columns to the patient's left).

    `mm` per pixel and `slice_mm` per slice; the film's pixels are `mm` square, so w = N. Without a patient it is black.
    """
    soft = np.maximum(voxels, -1000).sum(axis=1, dtype=np.int32) + 1000 * voxels.shape[1]
    bone = (
        np.maximum(voxels, BONE_THRESHOLD_HU).sum(axis=1, dtype=np.int32)
        - BONE_THRESHOLD_HU * voxels.shape[1]
    )
    taken = _to_square_pixels(
        WATER_ATTENUATION / 1000 * pixel_mm * (soft + BONE_ATTENUATION_FACTOR * bone), pixel_mm, slice_mm
    )
    body = taken > MIN_BODY_ATTENUATION
    if not body.any():
        return np.zeros(taken.shape, np.uint8)
    raised = taken + 0.8 * (taken - cv2.GaussianBlur(taken, (0, 0), CONTRAST_BLUR / pixel_mm))
    low, high = np.percentile(raised[body], (2, 98))
    grey = 255 / (1 + np.exp((low + 0.4 * (high - low) - raised) * (6 / max(high - low, 1e-3))))
    return np.asarray(np.rint(grey), np.uint8)


def project_mask(
    mask: NDArray[np.bool_], pixel_mm: float, slice_mm: float, min_thickness: float = MIN_MASK_THICKNESS
) -> NDArray[np.bool_]:
    """Where a ray meets at least `thick` mm of a mask `[Z, N, N]`, `[h, w]` on the film's grid."""
    return np.asarray(
        _to_square_pixels(mask.sum(axis=1, dtype=np.float32) * pixel_mm, pixel_mm, slice_mm) >= min_thickness
    )


def _to_square_pixels(sums: NDArray[np.float32], pixel_mm: float, slice_mm: float) -> NDArray[np.float32]:
    """Sums along the rays `[Z, N]`, feet first, as a smooth picture with square pixels, head up."""
    Z, N = sums.shape
    size = (N, max(1, round(Z * slice_mm / pixel_mm)))
    return np.asarray(cv2.resize(sums[::-1].astype(np.float32), size, interpolation=cv2.INTER_CUBIC))


def compute_zone_fractions(lung: NDArray[np.bool_], affected: NDArray[np.bool_]) -> list[float]:
    """The affected share of a lung's upper, middle and lower third by height on the film (both `[h, w]`); 0 where there is no lung."""
    rows = np.flatnonzero(lung.any(axis=1))
    if not len(rows):
        return [0.0] * 3
    edges = np.linspace(rows[0], rows[-1] + 1, 4).round().astype(int)
    zones = [(lung[a:b], affected[a:b]) for a, b in pairwise(edges)]
    return [float((zone & ill).sum() / max(zone.sum(), 1)) for zone, ill in zones]


def write_radiograph(
    path: Path,
    radiograph: NDArray[np.uint8],
    pixel_mm: float,
    uid_parts: tuple[object, ...],
    patient_id: str,
    manufacturer: str,
) -> None:
    """`film [h, w]` as Computed Radiography Image Storage, 8 bits; `names` make its identifiers."""
    study, series, image = (
        generate_uid(entropy_srcs=[str(n) for n in (*uid_parts, "film", part)])
        for part in ("study", "series", "image")
    )
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = ComputedRadiographyImageStorage
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = image
    ds.StudyInstanceUID, ds.SeriesInstanceUID = study, series
    ds.ImageType = ["DERIVED", "PRIMARY"]
    ds.Modality, ds.Manufacturer, ds.BodyPartExamined, ds.ViewPosition = "CR", manufacturer, "CHEST", "AP"
    ds.PatientName, ds.PatientID, ds.PatientBirthDate, ds.PatientSex = (
        f"Phantom^{patient_id}",
        patient_id,
        "",
        "O",
    )
    ds.StudyDate, ds.StudyTime, ds.StudyID, ds.AccessionNumber, ds.ReferringPhysicianName = (
        "20200401",
        "110000",
        "1",
        "",
        "",
    )
    ds.SeriesNumber, ds.InstanceNumber, ds.PatientOrientation = 1, 1, ["L", "F"]
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PresentationLUTShape = 1, "MONOCHROME2", "IDENTITY"
    ds.Rows, ds.Columns = radiograph.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 8, 8, 7, 0
    ds.WindowCenter, ds.WindowWidth = 128, 256
    ds.ImagerPixelSpacing = [f"{pixel_mm:.6g}"] * 2
    data = radiograph.tobytes()
    ds.PixelData = data + b"\0" * (len(data) % 2)
    ds["PixelData"].VR = "OB"
    ds.save_as(path, enforce_file_format=True)
