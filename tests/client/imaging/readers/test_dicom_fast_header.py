"""A glance at a DICOM file sees what pydicom sees, or leaves it to pydicom; slices read alone are those of the whole volume."""

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
from client.imaging.readers import dicom_series as headers_room
from client.imaging.readers.dicom_fast_header import parse_header_fast
from client.imaging.readers.dicom_series import find_series
from client.imaging.readers.volume import reduce_slice
from tests.client.dicom_files import dataset, stack, write
from tests.client.imaging.readers.test_readers import REAL


def saved(ds: FileDataset, path: Path, syntax: UID = ExplicitVRLittleEndian) -> Path:
    ds.file_meta.TransferSyntaxUID = syntax
    ds.save_as(
        path, enforce_file_format=True, implicit_vr=syntax == ImplicitVRLittleEndian, little_endian=True
    )
    return path


def nested(depth: int, opened: bool) -> Sequence:
    """Sequences in sequences that hold the tags of a slice too, with other values."""
    item = Dataset()
    item.Rows, item.PixelSpacing, item.RescaleSlope, item.InstanceNumber = 7, [9, 9], 5, 77
    item.add_new(0x00091010, "OB", b"\xfe\xff\xdd\xe0\0\0\0\0")
    if depth:
        item.ReferencedImageSequence = nested(depth - 1, opened)
        item["ReferencedImageSequence"].is_undefined_length = opened
    item.is_undefined_length_sequence_item = opened
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
def test_it_sees_what_pydicom_sees(
    tmp_path: Path, tags: dict[str, Any], syntax: UID, data: st.DataObject
) -> None:
    ds = dataset(0.0)
    for tag, value in tags.items():
        if value is None:
            ds.pop(tag, None)
        else:
            setattr(ds, tag, value)
    opened = data.draw(st.booleans())
    if data.draw(st.booleans()):
        for sequence in ("ReferencedStudySequence", "ReferencedImageSequence", "DerivationCodeSequence"):
            setattr(ds, sequence, nested(data.draw(st.integers(0, 3)), opened))
            ds[sequence].is_undefined_length = opened
    ds.add_new(0x00190010, "LO", "MAKER")
    ds.add_new(
        0x00191001,
        data.draw(st.sampled_from(["OB", "UN", "LO"])),
        data.draw(st.sampled_from([b"", b"\xe0\x7f\x10\0OW\0\0"])),
    )
    path = saved(ds, tmp_path / "slice", syntax)
    seen = parse_header_fast(path)
    assert seen is not None
    truth = pydicom.dcmread(path, stop_before_pixels=True)
    assert next(headers_room._iter_slice_headers(path, seen[0], None)) == next(
        headers_room._iter_slice_headers(path, truth, None)
    )
    for tag in ("StudyInstanceUID", "SeriesInstanceUID", "PatientID", "Modality", "SeriesNumber"):
        assert str(seen[0].get(tag) or "") == str(truth.get(tag) or "")
    kinds = truth.get("ImageType") or []
    assert list(seen[0].get("ImageType") or []) == ([kinds] if isinstance(kinds, str) else list(kinds))
    assert seen[1] is not None
    H, W = truth.Rows, truth.Columns
    np.testing.assert_array_equal(
        np.fromfile(path, seen[1].dtype, H * W, offset=seen[1].offset).reshape(H, W),
        pydicom.dcmread(path).pixel_array,
    )


def test_what_is_not_plain_is_left_to_pydicom(tmp_path: Path) -> None:
    assert parse_header_fast(saved(dataset(), tmp_path / "deflated", DeflatedExplicitVRLittleEndian)) is None
    big = (
        saved(dataset(), tmp_path / "big")
        .read_bytes()
        .replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.2\0")
    )
    (tmp_path / "big").write_bytes(big)
    assert parse_header_fast(tmp_path / "big") is None
    assert parse_header_fast(saved(dataset(NumberOfFrames=1), tmp_path / "frames")) is None
    whole = saved(dataset(), tmp_path / "whole").read_bytes()
    (tmp_path / "cut").write_bytes(whole[:-1])
    seen = parse_header_fast(tmp_path / "cut")
    assert seen is not None
    assert seen[1] is None  # its pixels are not all there
    for end in range(0, len(whole) - 1152, 7):
        (tmp_path / "cut").write_bytes(whole[:end])
        seen = parse_header_fast(tmp_path / "cut")
        assert seen is None or seen[1] is None
    noise = np.random.default_rng(0)
    for _ in range(300):  # a damaged header is never believed where it says too much
        spoilt = bytearray(whole)
        for at in noise.integers(132, len(whole) - 1152, 3):
            spoilt[at] = noise.integers(256)
        (tmp_path / "spoilt").write_bytes(spoilt)
        parse_header_fast(tmp_path / "spoilt")
    eight = dataset(BitsAllocated=8, BitsStored=8, HighBit=7, PixelRepresentation=0, PixelData=bytes(24 * 24))
    seen = parse_header_fast(saved(eight, tmp_path / "eight"))
    assert seen is not None
    assert seen[1] is None


def compressed(ds: FileDataset, syntax: UID) -> FileDataset:
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


def smooth(z: int, size: int = 64, signed: bool = True, bits: int = 16) -> FileDataset:
    """A slice of smooth random values that fill its bits."""
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)
    noise = cv2.GaussianBlur(np.random.default_rng(z).normal(0, 1, (size, size)), (0, 0), 12)
    pixels = (low + (noise - noise.min()) / np.ptp(noise) * (high - low)).astype(
        np.int16 if signed else np.uint16
    )
    ds = dataset(
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
def test_slices_read_alone_are_the_volumes(tmp_path: Path, syntax: UID, signed: bool, bits: int) -> None:
    slices = [compressed(smooth(z, signed=signed, bits=bits), syntax) for z in range(4)]
    folder = write(tmp_path / "scan", slices)
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
    which = np.array([0, 3])
    for step in (1, 2, 8):
        small = scan.read_reduced(which, step)
        if syntax == JPEG2000Lossless and step > 1:  # by wavelets, not by the mean of a row
            means = [
                cv2.resize(
                    volume.voxels[z].astype(np.float32), (64 // step,) * 2, interpolation=cv2.INTER_AREA
                )
                for z in which
            ]
            assert np.abs(small - np.stack(means)).mean() < 0.1 * np.ptp(volume.voxels.astype(int))
        else:
            np.testing.assert_array_equal(small, volume.read_reduced(which, step))
            np.testing.assert_array_equal(small[1], reduce_slice(volume.voxels[3], step))


@pytest.mark.parametrize("turn", [[-1, 0, 0, 0, -1, 0], [1, 0, 0, 0, -1, 0], [-1, 0, 0, 0, 1, 0]])
@pytest.mark.parametrize("syntax", [ExplicitVRLittleEndian, RLELossless])
def test_turned_slices_too(tmp_path: Path, turn: list[int], syntax: UID) -> None:
    slices = [smooth(z, size=40) for z in range(3)]
    for ds in slices:
        ds.ImageOrientationPatient = turn
        if syntax == RLELossless:
            ds.compress(syntax, generate_instance_uid=False)
    scan, volume = open_scan(write(tmp_path / "scan", slices)), read_scan(tmp_path / "scan")
    assert isinstance(scan, LazyVolume)
    assert scan.notes == volume.notes
    np.testing.assert_array_equal(np.stack(list(scan.iter_slices())), volume.voxels)
    for step in (1, 4, 8):
        np.testing.assert_array_equal(
            scan.read_reduced(np.arange(3), step), volume.read_reduced(np.arange(3), step)
        )


def test_one_slice_cut_short_and_the_whole_scan_is_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "scan", stack(6))
    file = min(folder.iterdir())
    file.write_bytes(file.read_bytes()[:-10])
    scan = open_scan(folder)
    assert isinstance(scan, Volume)
    assert any("1 of 6 slices cannot be decoded" in note for note in scan.notes)


@pytest.mark.skipif(not (REAL / "ct_dicom").is_dir(), reason="the real CT series are not here")
def test_a_real_jpeg_lossless_series() -> None:
    folder = REAL / "ct_dicom" / "ricord1a_000082_covid"
    scan, volume = open_scan(folder), read_scan(folder)
    assert isinstance(scan, LazyVolume)
    np.testing.assert_array_equal(scan.positions, volume.positions)
    for z in (0, 40, 84):
        np.testing.assert_array_equal(scan.read_slice(z), volume.voxels[z])
    assert all(head.pixel_location for head in find_series(folder)[0][0].headers)
