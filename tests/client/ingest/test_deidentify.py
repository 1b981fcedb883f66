"""De-identification: nothing that was planted survives, what reading needs does, and a patient keeps one name."""

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
from client.phantom.chest_ct import Scanner
from client.phantom.dicom_files import write_ct_series, write_radiograph
from client.phantom.profiles import CENTRE_PROFILES
from common.utils.errors import ConsiliumError
from tests.client.planted import plant, signs_in, uids_of

KEY, OTHER = bytes(range(32)), bytes(32)


@pytest.fixture(params=["north", "south", "film"])
def scan(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A folder with a CT (south: RLE, north: plain) or a film, planted."""
    folder = tmp_path / "original"
    folder.mkdir()
    rng = np.random.default_rng(1)
    if request.param == "film":
        write_radiograph(
            folder / "film.dcm", rng.integers(0, 255, (32, 32), np.uint8), 1.0, ("a",), "P1", "Maker"
        )
    else:
        scanner: Scanner = CENTRE_PROFILES[request.param].scanner
        write_ct_series(
            folder,
            rng.integers(-1024, 1500, (2, 16, 16)).astype(np.int16),
            scanner,
            ("a", request.param),
            "P1",
            rng,
        )
    for path in folder.iterdir():
        plant(pydicom.dcmread(path)).save_as(path)
    return folder


def test_nothing_planted_survives_and_every_pixel_does(scan: Path, tmp_path: Path) -> None:
    clean = tmp_path / "clean"
    clean.mkdir()
    old: set[str] = set()
    for k, path in enumerate(sorted(scan.iterdir())):
        before, after = pydicom.dcmread(path), pydicom.dcmread(path)
        assert signs_in(scan)
        assert exclusion_reason(after, StudyFilter()) == ""
        deidentify_dataset(after, KEY).save_as(clean / f"{k}.dcm", enforce_file_format=True)
        written = pydicom.dcmread(clean / f"{k}.dcm")
        assert written.PixelData == before.PixelData
        assert written.file_meta.TransferSyntaxUID == before.file_meta.TransferSyntaxUID
        assert written.PatientIdentityRemoved == "YES"
        assert written.PatientID == make_patient_pseudonym(KEY, "PLANTED-1", "")
        old |= uids_of(path)
    assert len(old) >= 3
    assert signs_in(clean, *old) == []
    a, b = read_scan(scan), read_scan(clean)
    assert np.array_equal(a.voxels, b.voxels)
    assert (a.spacing, a.origin, a.modality) == (b.spacing, b.origin, b.modality)
    assert np.array_equal(a.positions, b.positions)


def test_a_multi_frame_image_keeps_its_geometry() -> None:
    dataset = Dataset()
    for word in ("PixelMeasuresSequence", "PlanePositionSequence", "DerivationImageSequence"):
        setattr(dataset, word, [Dataset()])
    dataset.PixelMeasuresSequence[0].PixelSpacing = [0.7, 0.7]
    dataset.PixelMeasuresSequence[0].PatientName = "PLANTED"
    dataset.PlanePositionSequence[0].ImagePositionPatient = [1, 2, 3.5]
    whole = deepcopy(plant(_image()))
    whole.SOPClassUID = EnhancedCTImageStorage
    whole.PerFrameFunctionalGroupsSequence = [dataset]
    out = deidentify_dataset(whole, KEY)
    (frame,) = out.PerFrameFunctionalGroupsSequence
    assert {e.keyword for e in frame} == {"PixelMeasuresSequence", "PlanePositionSequence"}
    assert {e.keyword for e in frame.PixelMeasuresSequence[0]} == {"PixelSpacing"}
    assert frame.PlanePositionSequence[0].ImagePositionPatient == [1, 2, 3.5]


def _image(**values: object) -> Dataset:
    dataset = Dataset()
    dataset.file_meta = pydicom.dataset.FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = pydicom.uid.ExplicitVRLittleEndian
    dataset.SOPClassUID, dataset.Modality, dataset.ImageType = (
        IMAGE_SOP_CLASSES[0],
        "CT",
        ["ORIGINAL", "PRIMARY"],
    )
    dataset.StudyInstanceUID, dataset.SeriesInstanceUID, dataset.SOPInstanceUID = (
        "1.2.3",
        "1.2.3.4",
        "1.2.3.4.5",
    )
    dataset.Rows = dataset.Columns = 2
    dataset.SamplesPerPixel, dataset.BitsAllocated, dataset.PixelData = 1, 16, bytes(8)
    for word, value in values.items():
        setattr(dataset, word, value)
    return dataset


@given(
    word=st.sampled_from(sorted((CODE_KEYWORDS | NUMERIC_KEYWORDS) - {"LUTData"})),
    text=st.from_regex(r"[A-Z][a-z]{3,8}", fullmatch=True),
)
def test_no_text_survives_where_a_number_or_a_word_is_kept(word: str, text: str) -> None:
    assert text not in ALLOWED_CODE_VALUES
    dataset = _image()
    dataset.add_new(
        pydicom.datadict.tag_for_keyword(word), "LO", text
    )  # as a scanner that breaks the standard writes it
    dataset.is_little_endian, dataset.is_implicit_VR = True, False
    assert text not in str(deidentify_dataset(dataset, KEY))


def test_what_is_not_taken_is_told() -> None:
    said = {
        "an object of unknown kind: no CT image and no radiograph": _image(SOPClassUID="1.2.99.1"),
        "Secondary Capture Image Storage: no CT image and no radiograph": _image(
            SOPClassUID=SecondaryCaptureImageStorage
        ),
        "annotations are burned into its pixels": _image(BurnedInAnnotation="YES"),
        "a colour image: a screenshot or a dose report": _image(SamplesPerPixel=3),
        "a localiser": _image(ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"]),
        "its pixels are not there, or not all of them": _image(PixelData=bytes(6)),
        "modality MR is not asked for": _image(Modality="MR"),
        "it shows another part of the body": _image(BodyPartExamined="SKULL"),
        "": _image(BodyPartExamined="chest", BurnedInAnnotation="NO"),
    }
    for reason, dataset in said.items():
        assert exclusion_reason(dataset, StudyFilter(body_part="CHEST")) == reason


def test_one_patient_stays_one_and_sites_do_not_share_names() -> None:
    assert make_patient_pseudonym(KEY, "4711 ", "1.2") == make_patient_pseudonym(KEY, "4711", "1.3")
    assert make_patient_pseudonym(KEY, "", "1.2") != make_patient_pseudonym(KEY, "", "1.3")
    assert make_patient_pseudonym(KEY, "4711", "") != make_patient_pseudonym(OTHER, "4711", "")
    assert make_uid(KEY, "1.2") != make_uid(OTHER, "1.2")
    assert make_pseudonym(KEY, "study", "4711") != "s" + make_pseudonym(KEY, "patient", "4711")[1:]


@given(st.lists(st.from_regex(r"[12](\.[1-9][0-9]{0,8}){1,6}", fullmatch=True), unique=True))
def test_new_uids_are_valid_and_apart(old: list[str]) -> None:
    new = [make_uid(KEY, uid) for uid in old]
    assert all(uid.is_valid and uid.startswith("2.25.") for uid in new)
    assert len(set(new)) == len(old)


def test_the_key_is_its_owners_and_is_not_made_twice(tmp_path: Path) -> None:
    key = load_site_key(tmp_path)
    assert len(key) == 32
    assert load_site_key(tmp_path) == key
    assert (tmp_path / "key").stat().st_mode & 0o777 == 0o600
    os.chmod(tmp_path / "key", 0o644)
    with pytest.raises(ConsiliumError, match="can be read by others"):
        load_site_key(tmp_path)
    (tmp_path / "key").unlink()
    (tmp_path / "journal.jsonl").touch()
    with pytest.raises(ConsiliumError, match="is lost"):
        load_site_key(tmp_path)
