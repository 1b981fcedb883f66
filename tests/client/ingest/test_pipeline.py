"""Studies from a real Orthanc and from a folder enter the cohort completely, once, and under pseudonyms."""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest

from client.data.cohort import load_cohort
from client.imaging.readers import read_scan
from client.ingest.cli import ingest as ingest_command
from client.ingest.cohort_table import read_labels
from client.ingest.dicomweb_source import open_dicomweb_source
from client.ingest.dimse_source import open_dimse_source
from client.ingest.folder_source import FolderSource, open_folder_source
from client.ingest.pipeline import IngestSummary, ingest_studies
from client.ingest.selection import DicomStudy, StudyFilter, parse_date, read_study_list
from client.ingest.study_source import ImageSink, StudySource
from common.utils.errors import ConsiliumError
from tests.client.ingest.planted_studies import IMAGES_PER_CT, PATIENTS, SILENT, YEAR_2020, make_paths
from tests.client.orthanc import ARCHIVE_AE_TITLE, LOCAL_AE_TITLE, Orthanc
from tests.client.planted import find_signs, read_uids


def open_source(protocol: str, request: pytest.FixtureRequest, hospital: Path) -> StudySource:
    if protocol == "folder":
        return open_folder_source(hospital, 0)
    archive: Orthanc = request.getfixturevalue("archive")
    if protocol == "web":
        return open_dicomweb_source(archive.web)
    return open_dimse_source(archive.get if protocol == "get" else archive.move)


def reasons(summary: IngestSummary) -> list[str]:
    return sorted(item.reason for item in summary.skipped)


@pytest.mark.parametrize("protocol", ["web", "get", "move", "folder"])
def test_every_source_yields_the_same_cohort(
    protocol: str,
    request: pytest.FixtureRequest,
    hospital: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    source = open_source(protocol, request, hospital)
    paths = make_paths(tmp_path)
    with caplog.at_level(logging.DEBUG):
        logging.getLogger().setLevel(logging.DEBUG)
        first = ingest_studies(source, YEAR_2020, paths, SILENT)
        second = ingest_studies(source, YEAR_2020, paths, SILENT)
    assert (first.added, first.already_present, first.failed, first.empty) == (4, 0, 0, 0)
    assert (second.added, second.already_present) == (0, 4)
    assert len(reasons(first)) == 3
    assert "1 image(s) skipped: annotations are burned into its pixels" in reasons(first)
    capture_reason = "Secondary Capture Image Storage is neither a CT image nor a radiograph"
    assert f"1 image(s) skipped: {capture_reason}" in reasons(first)
    assert any("SR" in reason or "Text" in reason for reason in reasons(first)), reasons(first)

    table = load_cohort(paths.cohort_table, "north")
    assert len(table) == 4
    assert table["patient"].nunique() == 2
    assert sorted(table["modality"]) == ["CT", "CT", "CT", "XR"]
    assert table.groupby("patient")["split"].nunique().max() == 1
    files = sorted((tmp_path / "data" / "dicom").rglob("*.dcm"))
    assert len(files) == 3 * IMAGES_PER_CT + 1
    original_uids = set[str]().union(*map(read_uids, hospital.rglob("*.dcm")))
    assert find_signs(tmp_path, *original_uids) == []  # in the state folder neither
    output = caplog.text + "".join(capfd.readouterr()) + str(first)
    assert not [sign for sign in ("PLANTED", "Anna", *original_uids) if sign in output]

    ingested_scans = [read_scan(tmp_path / "data" / path) for path in table["path"]]
    for path in [*sorted(hospital.glob("*/")), hospital / "PLANTED^film.dcm"]:
        original = read_scan(path)
        assert any(np.array_equal(scan.voxels, original.voxels) for scan in ingested_scans)
    headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in files]
    transfer_syntaxes = {str(header.file_meta.TransferSyntaxUID) for header in headers}
    assert len(transfer_syntaxes) == 2  # what was compressed stays compressed


def test_lists_labels_and_mapping(hospital: Path, tmp_path: Path) -> None:
    third_file = next((hospital / "PLANTED^ct3").iterdir())
    third_uid = pydicom.dcmread(third_file, stop_before_pixels=True).StudyInstanceUID
    patient_labels, accession_labels = tmp_path / "patients.csv", tmp_path / "accessions.csv"
    pd.DataFrame({"PatientID": [PATIENTS[0], "x"], "covid": [1, 0], "PatientName": "PLANTED"}).to_csv(
        patient_labels, index=False
    )
    pd.DataFrame({"AccessionNumber": ["PLANTED-ct3"], "covid": [0], "severity": [12.5]}).to_csv(
        accession_labels, index=False
    )
    study_list = tmp_path / "list.csv"
    pd.DataFrame({"study": [third_uid, ""], "patient": ["", PATIENTS[0]]}).to_csv(study_list, index=False)
    source = open_folder_source(hospital, 0)
    study_filter = StudyFilter(until="20200401", identifiers=read_study_list(study_list))
    mapping_path = tmp_path / "state" / "ingest" / "mapping.csv"

    summary = ingest_studies(source, study_filter, make_paths(tmp_path, patient_labels), SILENT)
    assert summary.added == 3  # without the radiograph, which is from the day after
    assert any("PatientName" in note for note in summary.notes)
    assert not mapping_path.exists()
    with_mapping = make_paths(tmp_path, accession_labels, keep_mapping=True)
    ingest_studies(source, study_filter, with_mapping, SILENT)
    table = load_cohort(with_mapping.cohort_table, "north").set_index("scan")
    assert mapping_path.stat().st_mode & 0o777 == 0o600
    mapping = pd.read_csv(mapping_path, dtype=str).set_index("scan")
    assert set(mapping["PatientID"]) == set(PATIENTS)
    assert dict(table["patient"]) == dict(mapping["patient"])
    third_scan = mapping.index[mapping["AccessionNumber"] == "PLANTED-ct3"][0]
    assert table.loc[third_scan, "severity"] == 12.5
    assert table["covid"].to_dict() == {scan: float(scan != third_scan) for scan in table.index}
    assert find_signs(tmp_path / "data") == []


def test_edits_in_the_cohort_table_survive_a_changed_study(hospital: Path, tmp_path: Path) -> None:
    source = open_folder_source(hospital, 0)
    paths = make_paths(tmp_path)
    ingest_studies(source, YEAR_2020, paths, SILENT)
    table = pd.read_csv(paths.cohort_table, dtype=str)
    scan = table["scan"][table["patient"].map(table["patient"].value_counts()) == 1].item()  # ct3
    table.loc[table["scan"] == scan, ["split", "source", "covid"]] = ["test", "scanner 2", "0"]
    table.to_csv(paths.cohort_table, index=False)
    for path in sorted((hospital / "PLANTED^ct3").iterdir()):
        os.utime(path)  # as if images had been added
    assert ingest_studies(source, YEAR_2020, paths, SILENT).added == 1
    reloaded = load_cohort(paths.cohort_table, "north").set_index("scan")
    assert list(reloaded.loc[scan, ["split", "source", "covid"]]) == ["test", "scanner 2", 0.0]


class BrokenSource(FolderSource):
    """A folder from which one patient's studies cannot be read while it is broken."""

    is_broken = True

    def fetch_study(self, study: DicomStudy, study_filter: StudyFilter, sink: ImageSink) -> None:
        if self.is_broken and study.patient_id == PATIENTS[1]:
            raise OSError(5, f"cannot read {study.uid}")
        super().fetch_study(study, study_filter, sink)


def test_failed_study_is_reported_and_tried_again(hospital: Path, tmp_path: Path) -> None:
    source = BrokenSource(hospital, 0)
    paths = make_paths(tmp_path)
    summary = ingest_studies(source, YEAR_2020, paths, SILENT)
    assert (summary.added, summary.failed) == (3, 1)
    failure = "it cannot be ingested (OSError); it will be tried again by the next ingest"
    assert failure in reasons(summary)
    assert not list(paths.incoming_dir.iterdir())
    source.is_broken = False
    summary = ingest_studies(source, YEAR_2020, paths, SILENT)
    assert (summary.added, summary.already_present, summary.failed) == (1, 3, 0)
    assert len(load_cohort(paths.cohort_table, "north")) == 4


def test_unreachable_archive_and_invalid_address_are_explained(tmp_path: Path) -> None:
    for source in (
        open_dicomweb_source("http://127.0.0.1:9/dicom-web"),
        open_dimse_source("dicom://A@127.0.0.1:9"),
    ):
        with pytest.raises(ConsiliumError, match="cannot be reached"):
            ingest_studies(source, YEAR_2020, make_paths(tmp_path), SILENT)
    for address in ("dicom://127.0.0.1:9", "dicom://A@h:x", "dicom://A@h?aett=B"):
        with pytest.raises(ConsiliumError, match="is not a DICOM address"):
            open_dimse_source(address)


def test_archive_that_refuses_us_is_explained(archive: Orthanc, tmp_path: Path) -> None:
    wrong_archive = open_dimse_source(archive.get.replace(ARCHIVE_AE_TITLE, "WRONG"))
    with pytest.raises(ConsiliumError, match="refuses us; check host, port and AE titles"):
        ingest_studies(wrong_archive, YEAR_2020, make_paths(tmp_path), SILENT)
    unknown_centre = open_dimse_source(archive.get.replace(LOCAL_AE_TITLE, "STRANGER"))
    with pytest.raises(ConsiliumError, match="check that it knows our AE title"):
        ingest_studies(unknown_centre, YEAR_2020, make_paths(tmp_path), SILENT)


def test_listen_address_in_use_is_explained(archive: Orthanc, tmp_path: Path) -> None:
    with socket.socket() as occupant:
        occupant.bind(("127.0.0.1", 0))
        occupant.listen()
        source = open_dimse_source(f"{archive.get}&listen=127.0.0.1:{occupant.getsockname()[1]}")
        summary = ingest_studies(source, YEAR_2020, make_paths(tmp_path), SILENT)
    assert (summary.added, summary.failed) == (0, 4)
    assert any("cannot listen at 127.0.0.1" in reason for reason in reasons(summary))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("name,covid\na,1\n", "has no column study"),
        ("patient,covid\na,1\na,0\n", "labels 1 of its patient values twice"),
        ("patient,PatientName\na,b\n", "has no column that is a label"),
    ],
)
def test_invalid_labels_table_is_refused(content: str | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "labels.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ConsiliumError, match=message):
        read_labels(path, bytes(32))


def test_invalid_command_line_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConsiliumError, match="is not a date; write it as 2020-04-01"):
        parse_date("1.4.2020")
    with pytest.raises(ConsiliumError, match="the whole archive would be ingested"):
        ingest_command("https://pacs/dicom-web", data=tmp_path)
    with pytest.raises(ConsiliumError, match="no source or no data folder is given"):
        ingest_command()
    with pytest.raises(ConsiliumError, match="is not a folder"):
        ingest_command(str(tmp_path / "gone"), data=tmp_path)
