"""De-identification removes planted identifiers and keeps what reading needs; pseudonyms are stable."""

from __future__ import annotations

import os
from copy import deepcopy
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydicom.dataset import Dataset
from pydicom.uid import EnhancedCTImageStorage, SecondaryCaptureImageStorage

from client.imaging.readers import read_scan
from client.ingest.deidentify import (
    ALLOWED_CODE_VALUES,
    CODE_KEYWORDS,
    IMAGE_SOP_CLASSES,
    NUMERIC_KEYWORDS,
    deidentify_dataset,
    exclusion_reason,
)
from client.ingest.pseudonyms import load_site_key, make_patient_pseudonym, make_pseudonym, make_uid
from client.ingest.selection import StudyFilter
from client.phantom.dicom_files import write_ct_series, write_radiograph
from client.phantom.profiles import CENTRE_PROFILES
from client.phantom.scanner import Scanner
from common.utils.errors import ConsiliumError
from tests.client.planted import find_signs, plant, read_uids

KEY = bytes(range(32))
OTHER_KEY = bytes(32)


@pytest.fixture(params=["north", "south", "film"])
def scan(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with a CT (south: RLE, north: uncompressed) or a radiograph that hold planted identifiers."""
    folder = tmp_path / "original"
    folder.mkdir()
    rng = np.random.default_rng(1)
    if request.param == "film":
        pixels = rng.integers(0, 255, (32, 32), np.uint8)
        write_radiograph(folder / "film.dcm", pixels, 1.0, ("a",), "P1", "Maker")
    else:
        scanner: Scanner = CENTRE_PROFILES[request.param].scanner
        voxels = rng.integers(-1024, 1500, (2, 16, 16)).astype(np.int16)
        write_ct_series(folder, voxels, scanner, ("a", request.param), "P1", rng)
    for path in folder.iterdir():
        plant(pydicom.dcmread(path)).save_as(path)
    return folder


def test_planted_identifiers_are_removed_and_pixels_are_kept(scan: Path, tmp_path: Path) -> None:
    clean_dir = tmp_path / "clean"
    clean_dir.mkdir()
    original_uids: set[str] = set()
    assert find_signs(scan)
    for number, path in enumerate(sorted(scan.iterdir())):
        original, dataset = pydicom.dcmread(path), pydicom.dcmread(path)
        assert exclusion_reason(dataset, StudyFilter()) == ""
        clean_path = clean_dir / f"{number}.dcm"
        deidentify_dataset(dataset, KEY).save_as(clean_path, enforce_file_format=True)
        written = pydicom.dcmread(clean_path)
        assert written.PixelData == original.PixelData
        assert written.file_meta.TransferSyntaxUID == original.file_meta.TransferSyntaxUID
        assert written.PatientIdentityRemoved == "YES"
        assert written.PatientID == make_patient_pseudonym(KEY, "PLANTED-1", "")
        original_uids |= read_uids(path)
    assert len(original_uids) >= 3
    assert find_signs(clean_dir, *original_uids) == []
    before, after = read_scan(scan), read_scan(clean_dir)
    assert np.array_equal(before.voxels, after.voxels)
    assert before.spacing == after.spacing
    assert before.origin == after.origin
    assert before.modality == after.modality
    assert np.array_equal(before.positions, after.positions)


def test_multi_frame_image_keeps_its_geometry() -> None:
    frame = Dataset()
    for keyword in ("PixelMeasuresSequence", "PlanePositionSequence", "DerivationImageSequence"):
        setattr(frame, keyword, [Dataset()])
    frame.PixelMeasuresSequence[0].PixelSpacing = [0.7, 0.7]
    frame.PixelMeasuresSequence[0].PatientName = "PLANTED"
    frame.PlanePositionSequence[0].ImagePositionPatient = [1, 2, 3.5]
    image = deepcopy(plant(_make_image()))
    image.SOPClassUID = EnhancedCTImageStorage
    image.PerFrameFunctionalGroupsSequence = [frame]
    (clean_frame,) = deidentify_dataset(image, KEY).PerFrameFunctionalGroupsSequence
    assert {element.keyword for element in clean_frame} == {"PixelMeasuresSequence", "PlanePositionSequence"}
    assert {element.keyword for element in clean_frame.PixelMeasuresSequence[0]} == {"PixelSpacing"}
    assert clean_frame.PlanePositionSequence[0].ImagePositionPatient == [1, 2, 3.5]


def _make_image(**values: object) -> Dataset:
    """A CT image of 2 x 2 pixels, with some values replaced."""
    dataset = Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.SOPClassUID = IMAGE_SOP_CLASSES[0]
    dataset.Modality = "CT"
    dataset.ImageType = ["ORIGINAL", "PRIMARY"]
    dataset.StudyInstanceUID = "1.2.3"
    dataset.SeriesInstanceUID = "1.2.3.4"
    dataset.SOPInstanceUID = "1.2.3.4.5"
    dataset.Rows = dataset.Columns = 2
    dataset.SamplesPerPixel = 1
    dataset.BitsAllocated = 16
    dataset.PixelData = bytes(8)
    for keyword, value in values.items():
        setattr(dataset, keyword, value)
    return dataset


@given(
    keyword=st.sampled_from(sorted((CODE_KEYWORDS | NUMERIC_KEYWORDS) - {"LUTData"})),
    text=st.from_regex(r"[A-Z][a-z]{3,8}", fullmatch=True),
)
def test_text_in_the_place_of_a_number_or_a_code_is_removed(keyword: str, text: str) -> None:
    assert text not in ALLOWED_CODE_VALUES
    dataset = _make_image()
    # As a scanner that breaks the standard writes it.
    dataset.add_new(pydicom.datadict.tag_for_keyword(keyword), "LO", text)
    dataset.is_little_endian, dataset.is_implicit_VR = True, False
    assert text not in str(deidentify_dataset(dataset, KEY))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"SOPClassUID": "1.2.99.1"}, "an object of unknown kind is neither a CT image nor a radiograph"),
        (
            {"SOPClassUID": SecondaryCaptureImageStorage},
            "Secondary Capture Image Storage is neither a CT image nor a radiograph",
        ),
        ({"BurnedInAnnotation": "YES"}, "annotations are burned into its pixels"),
        ({"SamplesPerPixel": 3}, "it is a colour image, such as a screenshot or a dose report"),
        ({"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"]}, "it is a localiser"),
        ({"PixelData": bytes(6)}, "its pixel data is missing or incomplete"),
        ({"Modality": "MR"}, "modality MR is not selected"),
        ({"BodyPartExamined": "SKULL"}, "it shows another body part"),
        ({"BodyPartExamined": "chest", "BurnedInAnnotation": "NO"}, ""),
    ],
)
def test_exclusion_reason_names_what_is_wrong(values: dict[str, object], reason: str) -> None:
    assert exclusion_reason(_make_image(**values), StudyFilter(body_part="CHEST")) == reason


def test_pseudonyms_differ_between_patients_kinds_and_sites() -> None:
    assert make_patient_pseudonym(KEY, "4711 ", "1.2") == make_patient_pseudonym(KEY, "4711", "1.3")
    assert make_patient_pseudonym(KEY, "", "1.2") != make_patient_pseudonym(KEY, "", "1.3")
    assert make_patient_pseudonym(KEY, "4711", "") != make_patient_pseudonym(OTHER_KEY, "4711", "")
    assert make_uid(KEY, "1.2") != make_uid(OTHER_KEY, "1.2")
    assert make_pseudonym(KEY, "study", "4711") != "s" + make_pseudonym(KEY, "patient", "4711")[1:]


@given(st.lists(st.from_regex(r"[12](\.[1-9][0-9]{0,8}){1,6}", fullmatch=True), unique=True))
def test_new_uids_are_valid_and_distinct(old_uids: list[str]) -> None:
    new_uids = [make_uid(KEY, uid) for uid in old_uids]
    assert all(uid.is_valid and uid.startswith("2.25.") for uid in new_uids)
    assert len(set(new_uids)) == len(old_uids)


def test_site_key_is_private_and_created_only_once(tmp_path: Path) -> None:
    key = load_site_key(tmp_path)
    assert len(key) == 32
    assert load_site_key(tmp_path) == key
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    os.chmod(tmp_path / "key", 0o644)
    with pytest.raises(ConsiliumError, match="can be read by others"):
        load_site_key(tmp_path)
    (tmp_path / "key").unlink()
    (tmp_path / "journal.jsonl").touch()
    with pytest.raises(ConsiliumError, match="is missing, but studies were ingested with it"):
        load_site_key(tmp_path)
