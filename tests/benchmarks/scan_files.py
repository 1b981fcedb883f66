"""Scans to measure on, as files of every kind, and every decoder of them that is installed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import imagecodecs
import numpy as np
import pydicom
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate, generate_frames
from pydicom.pixels.decoders.base import get_decoder
from pydicom.uid import (
    UID,
    CTImageStorage,
    ExplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
    generate_uid,
)

from client.imaging import lung_segmentation
from client.imaging.readers import read_scan
from client.phantom.chest_ct import draw_chest
from client.phantom.profiles import CENTRE_PROFILES


def volume_of(data: Path | None, Z: int) -> NDArray[np.int16]:
    """[Z, 512, 512] HU: a real series read between its slices, its noise kept up; else a phantom's."""
    real = data / "ct_dicom" / "ricord1a_000082_covid" if data else None
    if real is None or not real.is_dir():
        return draw_chest(
            np.random.default_rng(1), np.random.default_rng(2), CENTRE_PROFILES["south"].scanner, True, Z, 512
        )[0]
    voxels = read_scan(real).voxels
    rng, made = np.random.default_rng(0), np.empty((Z, *voxels.shape[1:]), np.int16)
    for k, place in enumerate(np.linspace(0, len(voxels) - 1, Z)):
        below = min(int(place), len(voxels) - 2)
        share = place - below
        mixed = (1 - share) * voxels[below].astype(np.float32) + share * voxels[below + 1]
        made[k] = (mixed + rng.normal(0, 15 * np.sqrt(2 * share * (1 - share)), mixed.shape)).clip(
            -1024, 3000
        )
    return made


def write_jpegs(voxels: NDArray[np.int16], folder: Path) -> Path:
    folder.mkdir()
    for z, image in enumerate(voxels):
        coded = cv2.imencode(
            ".jpg", lung_segmentation.apply_window(image, (-1000, 300)), [cv2.IMWRITE_JPEG_QUALITY, 95]
        )[1]
        (folder / f"{z:04d}.jpg").write_bytes(coded.tobytes())
    return folder


def write_dicom(voxels: NDArray[np.int16], folder: Path, syntax: UID = ExplicitVRLittleEndian) -> Path:
    """One file a slice, names shuffled."""
    folder.mkdir()
    encode: dict[UID, Callable[[NDArray[np.uint16]], bytes]] = {
        JPEGLosslessSV1: partial(imagecodecs.jpeg_encode, lossless=True, bitspersample=16),
        JPEGLSLossless: imagecodecs.jpegls_encode,
    }
    series, study = generate_uid(), generate_uid()
    for z, name in enumerate(np.random.default_rng(0).permutation(len(voxels))):
        ds = Dataset()
        ds.file_meta = FileMetaDataset()
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = CTImageStorage
        ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = generate_uid()
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.Modality, ds.PatientID = study, series, "CT", "P1"
        ds.ImageType, ds.InstanceNumber, ds.SeriesNumber = ["ORIGINAL", "PRIMARY", "AXIAL"], z + 1, 2
        ds.Rows, ds.Columns = voxels.shape[1:]
        ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 0
        ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.RescaleIntercept, ds.RescaleSlope = (
            16,
            16,
            15,
            -1024,
            1,
        )
        ds.PixelSpacing, ds.SliceThickness, ds.ImageOrientationPatient = [0.7, 0.7], 1, [1, 0, 0, 0, 1, 0]
        ds.ImagePositionPatient = [-180, -180, z]
        stored = (voxels[z].astype(np.int32) + 1024).astype(np.uint16)
        ds.PixelData = stored.tobytes()
        ds["PixelData"].VR = "OW"
        if syntax in encode:
            ds.PixelData = encapsulate([encode[syntax](stored)])
            ds["PixelData"].VR, ds["PixelData"].is_undefined_length, ds.file_meta.TransferSyntaxUID = (
                "OB",
                True,
                syntax,
            )
        elif syntax != ExplicitVRLittleEndian:
            ds.compress(syntax, generate_instance_uid=False)
        ds.save_as(folder / f"IM{name:04d}", enforce_file_format=True)
    return folder


CODECS = {
    "JPEG Lossless": JPEGLosslessSV1,
    "JPEG 2000": JPEG2000Lossless,
    "RLE": RLELossless,
    "JPEG-LS": JPEGLSLossless,
}


def decoders(syntax: UID) -> dict[str, Callable[[Path], NDArray[Any]]]:
    """Every decoder of `syntax` that is installed: pydicom's plugins and imagecodecs."""
    decode = {
        JPEGLosslessSV1: imagecodecs.jpeg_decode,
        JPEG2000Lossless: imagecodecs.jpeg2k_decode,
        JPEGLSLossless: imagecodecs.jpegls_decode,
        RLELossless: lambda frame: np.frombuffer(imagecodecs.dicomrle_decode(frame, np.dtype("<u2")), "<u2"),
    }[syntax]

    def by_plugin(path: Path, plugin: str) -> NDArray[Any]:
        ds = pydicom.dcmread(path)
        ds.pixel_array_options(decoding_plugin=plugin)
        return np.asarray(ds.pixel_array)

    def by_imagecodecs(path: Path) -> NDArray[Any]:
        return np.asarray(decode(next(generate_frames(pydicom.dcmread(path).PixelData, number_of_frames=1))))

    found: dict[str, Callable[[Path], NDArray[Any]]] = {
        p: partial(by_plugin, plugin=p) for p in get_decoder(syntax).available_plugins
    }
    return found | {"imagecodecs": by_imagecodecs}
