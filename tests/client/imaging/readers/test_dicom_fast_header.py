"""The fast header parser against pydicom, and slices read singly against those of the whole volume."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import cv2
import imagecodecs
import numpy as np
import pydicom
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileDataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence
from pydicom.uid import (
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from client.imaging.readers import LazyVolume, Volume, open_scan, read_scan
from client.imaging.readers.dicom_fast_header import parse_header_fast
from client.imaging.readers.dicom_series import find_series
from client.imaging.readers.dicom_slice_header import iter_slice_headers
from client.imaging.readers.volume import reduce_slice
from tests.client.dicom_files import make_slice, make_stack, write_files
from tests.client.imaging.readers.test_readers import REAL


def save_slice(ds: FileDataset, path: Path, syntax: UID = ExplicitVRLittleEndian) -> Path:
    ds.file_meta.TransferSyntaxUID = syntax
    ds.save_as(
        path, enforce_file_format=True, implicit_vr=syntax == ImplicitVRLittleEndian, little_endian=True
    )
    return path


def make_nested_sequences(depth: int, undefined_length: bool) -> Sequence:
    """Sequences in sequences that hold the tags of a slice too, with other values."""
    item = Dataset()
    item.Rows, item.PixelSpacing, item.RescaleSlope, item.InstanceNumber = 7, [9, 9], 5, 77
    item.add_new(0x00091010, "OB", b"\xfe\xff\xdd\xe0\0\0\0\0")
    if depth:
        item.ReferencedImageSequence = make_nested_sequences(depth - 1, undefined_length)
        item["ReferencedImageSequence"].is_undefined_length = undefined_length
    item.is_undefined_length_sequence_item = undefined_length
    return Sequence([item, Dataset()])


TAGS: dict[str, Any] = {
    "RescaleSlope": st.sampled_from([1, 2, "0.5", None]),
    "RescaleIntercept": st.sampled_from([-1024, "-1024.0 ", 0, None]),
    "PixelPaddingValue": st.sampled_from([-2000, 0, 30000]),
    "PixelSpacing": st.sampled_from([[0.7, 0.8], [0, 0.8], None]),
    "SliceThickness": st.sampled_from(["2.5", "", None]),
    "GantryDetectorTilt": st.sampled_from([0, 12.5, -3]),
    "InstanceNumber": st.sampled_from([1, "0012", None]),
    "ImageOrientationPatient": st.sampled_from([[1, 0, 0, 0, 1, 0], [-1, 0, 0, 0, -1, 0], None]),
    "ImagePositionPatient": st.sampled_from([[-100, -120.25, 3], ["-1e2", "0", "5"], None]),
    "ImageType": st.sampled_from([["ORIGINAL", "PRIMARY", "AXIAL"], "DERIVED", None]),
    "ViewPosition": st.sampled_from(["AP", ""]),
    "Modality": st.sampled_from(["CT", "MR"]),
}


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    st.fixed_dictionaries({}, optional=TAGS),
    st.sampled_from([ImplicitVRLittleEndian, ExplicitVRLittleEndian]),
    st.data(),
)
def test_fast_header_agrees_with_pydicom(
    tmp_path: Path, tags: dict[str, Any], syntax: UID, data: st.DataObject
) -> None:
    ds = make_slice(0.0)
    for tag, value in tags.items():
        if value is None:
            ds.pop(tag, None)
        else:
            setattr(ds, tag, value)
    undefined_length = data.draw(st.booleans())
    if data.draw(st.booleans()):
        for sequence in ("ReferencedStudySequence", "ReferencedImageSequence", "DerivationCodeSequence"):
            setattr(ds, sequence, make_nested_sequences(data.draw(st.integers(0, 3)), undefined_length))
            ds[sequence].is_undefined_length = undefined_length
    ds.add_new(0x00190010, "LO", "MAKER")
    ds.add_new(
        0x00191001,
        data.draw(st.sampled_from(["OB", "UN", "LO"])),
        data.draw(st.sampled_from([b"", b"\xe0\x7f\x10\0OW\0\0"])),
    )
    path = save_slice(ds, tmp_path / "slice", syntax)
    header = parse_header_fast(path)
    assert header is not None
    truth = pydicom.dcmread(path, stop_before_pixels=True)
    assert next(iter_slice_headers(path, header[0], None)) == next(iter_slice_headers(path, truth, None))
    for tag in ("StudyInstanceUID", "SeriesInstanceUID", "PatientID", "Modality", "SeriesNumber"):
        assert str(header[0].get(tag) or "") == str(truth.get(tag) or "")
    image_type = truth.get("ImageType") or []
    assert list(header[0].get("ImageType") or []) == (
        [image_type] if isinstance(image_type, str) else list(image_type)
    )
    assert header[1] is not None
    H, W = truth.Rows, truth.Columns
    np.testing.assert_array_equal(
        np.fromfile(path, header[1].dtype, H * W, offset=header[1].offset).reshape(H, W),
        pydicom.dcmread(path).pixel_array,
    )


def test_unusual_or_damaged_files_are_left_to_pydicom(tmp_path: Path) -> None:
    assert (
        parse_header_fast(save_slice(make_slice(), tmp_path / "deflated", DeflatedExplicitVRLittleEndian))
        is None
    )
    big_endian = (
        save_slice(make_slice(), tmp_path / "big")
        .read_bytes()
        .replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.2\0")
    )
    (tmp_path / "big").write_bytes(big_endian)
    assert parse_header_fast(tmp_path / "big") is None
    assert parse_header_fast(save_slice(make_slice(NumberOfFrames=1), tmp_path / "frames")) is None
    content = save_slice(make_slice(), tmp_path / "whole").read_bytes()
    (tmp_path / "cut").write_bytes(content[:-1])
    header = parse_header_fast(tmp_path / "cut")
    assert header is not None
    assert header[1] is None  # its pixels are not all there
    for end in range(0, len(content) - 1152, 7):
        (tmp_path / "cut").write_bytes(content[:end])
        header = parse_header_fast(tmp_path / "cut")
        assert header is None or header[1] is None
    noise = np.random.default_rng(0)
    for _ in range(300):  # a damaged header is never believed where it says too much
        damaged = bytearray(content)
        for position in noise.integers(132, len(content) - 1152, 3):
            damaged[position] = noise.integers(256)
        (tmp_path / "spoilt").write_bytes(damaged)
        parse_header_fast(tmp_path / "spoilt")
    eight_bit = make_slice(
        BitsAllocated=8, BitsStored=8, HighBit=7, PixelRepresentation=0, PixelData=bytes(24 * 24)
    )
    header = parse_header_fast(save_slice(eight_bit, tmp_path / "eight"))
    assert header is not None
    assert header[1] is None


def compress_slice(ds: FileDataset, syntax: UID) -> FileDataset:
    """The same slice by a codec; JPEG's by imagecodecs' encoders, pydicom has none here."""
    encode = {
        JPEGLSLossless: imagecodecs.jpegls_encode,
        JPEGLosslessSV1: partial(imagecodecs.jpeg_encode, lossless=True),
    }.get(syntax)
    if encode is None:
        if syntax != ExplicitVRLittleEndian:
            ds.compress(syntax, generate_instance_uid=False)
        return ds
    pixels = np.frombuffer(ds.PixelData, np.uint16).reshape(ds.Rows, ds.Columns)
    if ds.BitsStored == 12:
        pixels = pixels & 0xFFF
    ds.PixelData = encapsulate(
        [encode(pixels, bitspersample=ds.BitsStored) if syntax != JPEGLSLossless else encode(pixels)]
    )
    ds["PixelData"].VR, ds["PixelData"].is_undefined_length, ds.file_meta.TransferSyntaxUID = (
        "OB",
        True,
        syntax,
    )
    return ds


def make_smooth_slice(z: int, size: int = 64, signed: bool = True, bits: int = 16) -> FileDataset:
    """A slice of smooth random values that fill its bits."""
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    noise = cv2.GaussianBlur(np.random.default_rng(z).normal(0, 1, (size, size)), (0, 0), 12)
    pixels = (low + (noise - noise.min()) / np.ptp(noise) * (high - low)).astype(
        np.int16 if signed else np.uint16
    )
    ds = make_slice(
        2.5 * z,
        size=size,
        PixelRepresentation=int(signed),
        BitsStored=bits,
        HighBit=bits - 1,
        PixelData=pixels.tobytes(),
    )
    ds.RescaleIntercept = 0 if signed else low - 1024
    return ds


@pytest.mark.parametrize(
    "syntax", [ExplicitVRLittleEndian, RLELossless, JPEG2000Lossless, JPEGLSLossless, JPEGLosslessSV1]
)
@pytest.mark.parametrize(("signed", "bits"), [(False, 12), (False, 16), (True, 16), (True, 12)])
def test_slices_read_singly_equal_those_of_volume(
    tmp_path: Path, syntax: UID, signed: bool, bits: int
) -> None:
    slices = [compress_slice(make_smooth_slice(z, signed=signed, bits=bits), syntax) for z in range(4)]
    folder = write_files(tmp_path / "scan", slices)
    scan, volume = open_scan(folder), read_scan(folder)
    if syntax != ExplicitVRLittleEndian and signed and bits < 16:
        assert isinstance(scan, Volume)  # the decoders do not agree on the sign
        return
    assert isinstance(scan, LazyVolume)
    assert (scan.shape, scan.spacing, scan.notes, scan.is_hounsfield) == (
        volume.shape,
        volume.spacing,
        volume.notes,
        True,
    )
    np.testing.assert_array_equal(scan.positions, volume.positions)
    for z in range(4):
        np.testing.assert_array_equal(scan.read_slice(z), volume.voxels[z])
    indices = np.array([0, 3])
    for step in (1, 2, 8):
        small = scan.read_reduced(indices, step)
        if syntax == JPEG2000Lossless and step > 1:  # by wavelets, not by the mean of a row
            means = [
                cv2.resize(
                    volume.voxels[z].astype(np.float32), (64 // step,) * 2, interpolation=cv2.INTER_AREA
                )
                for z in indices
            ]
            assert np.abs(small - np.stack(means)).mean() < 0.1 * np.ptp(volume.voxels.astype(int))
        else:
            np.testing.assert_array_equal(small, volume.read_reduced(indices, step))
            np.testing.assert_array_equal(small[1], reduce_slice(volume.voxels[3], step))


@pytest.mark.parametrize("orientation", [[-1, 0, 0, 0, -1, 0], [1, 0, 0, 0, -1, 0], [-1, 0, 0, 0, 1, 0]])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless])
def test_flipped_slices_read_singly_equal_those_of_volume(
    tmp_path: Path, orientation: list[int], syntax: UID
) -> None:
    slices = [make_smooth_slice(z, size=40) for z in range(3)]
    for ds in slices:
        ds.ImageOrientationPatient = orientation
        if syntax == RLELossless:
            ds.compress(syntax, generate_instance_uid=False)
    scan, volume = open_scan(write_files(tmp_path / "scan", slices)), read_scan(tmp_path / "scan")
    assert isinstance(scan, LazyVolume)
    assert scan.notes == volume.notes
    np.testing.assert_array_equal(np.stack(list(scan.iter_slices())), volume.voxels)
    for step in (1, 4, 8):
        np.testing.assert_array_equal(
            scan.read_reduced(np.arange(3), step), volume.read_reduced(np.arange(3), step)
        )


def test_truncated_slice_makes_open_scan_read_whole_volume(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "scan", make_stack(6))
    file = min(folder.iterdir())
    file.write_bytes(file.read_bytes()[:-10])
    scan = open_scan(folder)
    assert isinstance(scan, Volume)
    assert any("1 of 6 slices cannot be decoded" in note for note in scan.notes)


@pytest.mark.skipif(not (REAL / "ct_dicom").is_dir(), reason="the real CT series are not here")
def test_real_jpeg_lossless_series_is_read_slice_by_slice() -> None:
    folder = REAL / "ct_dicom" / "ricord1a_000082_covid"
    scan, volume = open_scan(folder), read_scan(folder)
    assert isinstance(scan, LazyVolume)
    np.testing.assert_array_equal(scan.positions, volume.positions)
    for z in (0, 40, 84):
        np.testing.assert_array_equal(scan.read_slice(z), volume.voxels[z])
    assert all(head.pixel_location for head in find_series(folder)[0][0].headers)
