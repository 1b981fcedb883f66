"""Write scans to measure on as files of every kind, and list every installed decoder of them."""

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

CODECS = {
    "JPEG Lossless": JPEGLosslessSV1,
    "JPEG 2000": JPEG2000Lossless,
    "RLE": RLELossless,
    "JPEG-LS": JPEGLSLossless,
}
# The codecs that pydicom cannot encode.
ENCODERS: dict[UID, Callable[[Any], bytes | bytearray]] = {
    JPEGLosslessSV1: partial(imagecodecs.jpeg_encode, lossless=True, bitspersample=16),
    JPEGLSLossless: imagecodecs.jpegls_encode,
}
Decoder = Callable[[Path], NDArray[Any]]


def make_volume(data: Path | None, num_slices: int) -> NDArray[np.int16]:
    """A chest CT [Z, 512, 512] in HU of so many slices.

    It is a real series, interpolated between its slices with its noise restored; without `data` a phantom's.
    """
    series = data / "ct_dicom" / "ricord1a_000082_covid" if data else None
    if series is not None and series.is_dir():
        return resample_slices(read_scan(series).voxels, num_slices)
    patient_rng = np.random.default_rng(1)
    visit_rng = np.random.default_rng(2)
    scanner = CENTRE_PROFILES["south"].scanner
    voxels, _ = draw_chest(patient_rng, visit_rng, scanner, True, num_slices, 512)
    return voxels


def resample_slices(voxels: NDArray[Any], num_slices: int) -> NDArray[np.int16]:
    """Interpolate between slices, and add the noise that interpolation averages away."""
    rng = np.random.default_rng(0)
    resampled = np.empty((num_slices, *voxels.shape[1:]), np.int16)
    for z, position in enumerate(np.linspace(0, len(voxels) - 1, num_slices)):
        below = min(int(position), len(voxels) - 2)
        fraction = position - below
        mixed = (1 - fraction) * voxels[below].astype(np.float32) + fraction * voxels[below + 1]
        noise_std = 15 * np.sqrt(2 * fraction * (1 - fraction))
        resampled[z] = (mixed + rng.normal(0, noise_std, mixed.shape)).clip(-1024, 3000)
    return resampled


def write_jpegs(voxels: NDArray[np.int16], folder: Path) -> Path:
    """Write one JPEG a slice, quality 95; return the folder."""
    folder.mkdir()
    for z, image in enumerate(voxels):
        grey = lung_segmentation.apply_window(image, (-1000, 300))
        _, encoded = cv2.imencode(".jpg", grey, [cv2.IMWRITE_JPEG_QUALITY, 95])
        (folder / f"{z:04d}.jpg").write_bytes(encoded.tobytes())
    return folder


def write_dicom(voxels: NDArray[np.int16], folder: Path, syntax: UID = ExplicitVRLittleEndian) -> Path:
    """Write one file a slice, in an order other than the slices'; return the folder."""
    folder.mkdir()
    series_uid = generate_uid()
    study_uid = generate_uid()
    file_numbers = np.random.default_rng(0).permutation(len(voxels))
    for z, file_number in enumerate(file_numbers):
        dataset = make_dicom_header(z, voxels.shape[1:])
        dataset.StudyInstanceUID = study_uid
        dataset.SeriesInstanceUID = series_uid
        set_pixels(dataset, voxels[z], syntax)
        dataset.save_as(folder / f"IM{file_number:04d}", enforce_file_format=True)
    return folder


def make_dicom_header(z: int, shape: tuple[int, ...]) -> Dataset:
    """A CT slice without pixels; the UIDs of its study and series are left to the caller."""
    dataset = Dataset()
    dataset.SOPClassUID = CTImageStorage
    dataset.SOPInstanceUID = generate_uid()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.file_meta.MediaStorageSOPClassUID = dataset.SOPClassUID
    dataset.file_meta.MediaStorageSOPInstanceUID = dataset.SOPInstanceUID
    dataset.Modality = "CT"
    dataset.PatientID = "P1"
    dataset.ImageType = ["ORIGINAL", "PRIMARY", "AXIAL"]
    dataset.InstanceNumber = z + 1
    dataset.SeriesNumber = 2
    dataset.Rows, dataset.Columns = shape
    dataset.SamplesPerPixel = 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    dataset.PixelRepresentation = 0
    dataset.BitsAllocated = 16
    dataset.BitsStored = 16
    dataset.HighBit = 15
    dataset.RescaleIntercept = -1024
    dataset.RescaleSlope = 1
    dataset.PixelSpacing = [0.7, 0.7]
    dataset.SliceThickness = 1
    dataset.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    dataset.ImagePositionPatient = [-180, -180, z]
    return dataset


def set_pixels(dataset: Dataset, image: NDArray[np.int16], syntax: UID) -> None:
    """Put a slice in HU into the dataset, compressed as the transfer syntax demands."""
    stored = (image.astype(np.int32) + 1024).astype(np.uint16)
    dataset.PixelData = stored.tobytes()
    dataset["PixelData"].VR = "OW"
    if syntax in ENCODERS:
        dataset.PixelData = encapsulate([bytes(ENCODERS[syntax](stored))])
        dataset["PixelData"].VR = "OB"
        dataset["PixelData"].is_undefined_length = True
        dataset.file_meta.TransferSyntaxUID = syntax
    elif syntax != ExplicitVRLittleEndian:
        dataset.compress(syntax, generate_instance_uid=False)


def list_decoders(syntax: UID) -> dict[str, Decoder]:
    """Every installed decoder of a transfer syntax: pydicom's plugins and imagecodecs."""
    decoders: dict[str, Decoder] = {}
    for plugin in get_decoder(syntax).available_plugins:
        decoders[plugin] = partial(decode_by_plugin, plugin=plugin)
    decoders["imagecodecs"] = partial(decode_by_imagecodecs, syntax=syntax)
    return decoders


def decode_by_plugin(path: Path, plugin: str) -> NDArray[Any]:
    dataset = pydicom.dcmread(path)
    dataset.pixel_array_options(decoding_plugin=plugin)
    return np.asarray(dataset.pixel_array)


def decode_by_imagecodecs(path: Path, syntax: UID) -> NDArray[Any]:
    frame = next(generate_frames(pydicom.dcmread(path).PixelData, number_of_frames=1))
    return np.asarray(FRAME_DECODERS[syntax](frame))


def decode_rle_frame(frame: bytes) -> NDArray[Any]:
    return np.frombuffer(imagecodecs.dicomrle_decode(frame, np.dtype("<u2")), "<u2")


FRAME_DECODERS: dict[UID, Callable[[bytes], Any]] = {
    JPEGLosslessSV1: imagecodecs.jpeg_decode,
    JPEG2000Lossless: imagecodecs.jpeg2k_decode,
    JPEGLSLossless: imagecodecs.jpegls_decode,
    RLELossless: decode_rle_frame,
}
