"""Studies out of a real Orthanc and out of a folder into a cohort: whole, once, under new names, and after a kill."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pydicom
import pytest
from pydicom.uid import SecondaryCaptureImageStorage
from rich.console import Console

from client.data.cohort import load_cohort
from client.imaging.readers import read_scan
from client.ingest.cli import ingest as ingest_command
from client.ingest.cohort_table import read_labels
from client.ingest.dicomweb_source import open_dicomweb_source
from client.ingest.dimse_source import open_dimse_source
from client.ingest.folder_source import open_folder_source
from client.ingest.pipeline import IngestPaths, ingest_studies
from client.ingest.selection import (
    DicomStudy,
    ImageSink,
    StudyFilter,
    StudySource,
    parse_date,
    read_study_list,
)
from client.phantom.dicom_files import write_ct_series, write_radiograph
from client.phantom.profiles import CENTRE_PROFILES
from common.utils.errors import ConsiliumError
from tests.client.orthanc import OURS, PASSWORD, PLUGIN, PROGRAM, USER, Orthanc, orthanc
from tests.client.planted import plant, signs_in, uids_of

NAMES = ("PLANTED-A", "PLANTED-B")  # two patients, the first with three studies
IMAGES = 3  # of a CT


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files named after patients: two CTs (one compressed) and a film of one patient, a CT of another; and what is not to be taken."""
    root = tmp_path_factory.mktemp("hospital")
    for study, maker, patient in (("ct1", "north", 0), ("ct2", "south", 0), ("ct3", "north", 1)):
        folder = root / f"PLANTED^{study}"
        folder.mkdir()
        rng = np.random.default_rng(len(study + maker))
        voxels = rng.integers(-1024, 1500, (IMAGES, 16, 16)).astype(np.int16)
        write_ct_series(folder, voxels, CENTRE_PROFILES[maker].scanner, (study,), "P", rng)
        for k, path in enumerate(sorted(folder.iterdir())):
            dataset = plant(pydicom.dcmread(path), NAMES[patient], f"PLANTED-{study}", everywhere=k == 0)
            dataset.StudyDate = "20200401"
            dataset.save_as(path)
    first = pydicom.dcmread(root / "PLANTED^ct1" / "000.dcm")
    burned, captured, report = (pydicom.dcmread(root / "PLANTED^ct1" / "001.dcm") for _ in range(3))
    burned.BurnedInAnnotation = "YES"
    captured.SOPClassUID = captured.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    report.SOPClassUID = report.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.88.11"
    report.Modality, report.SeriesInstanceUID = "SR", f"{first.SeriesInstanceUID[:50]}.1"
    for k, dataset in enumerate((burned, captured, report)):
        dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = (
            f"{first.SOPInstanceUID[:50]}.{k}"
        )
        dataset.save_as(root / "PLANTED^ct1" / f"other{k}.dcm")
    film = root / "PLANTED^film.dcm"
    write_radiograph(
        film, np.random.default_rng(0).integers(0, 255, (16, 16), np.uint8), 1.0, ("film",), "P", "Maker"
    )
    dataset = plant(pydicom.dcmread(film), NAMES[0], "PLANTED-film")
    dataset.StudyDate = "20200402"
    dataset.save_as(film)
    return root


@pytest.fixture(scope="module")
def archive(hospital: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Orthanc]:
    if PROGRAM is None or not PLUGIN.exists():
        pytest.skip("Orthanc is not installed: apt-get install orthanc orthanc-dicomweb")
    folder = tmp_path_factory.mktemp("orthanc")
    (folder / "netrc").write_text(f"machine 127.0.0.1 login {USER} password {PASSWORD}\n")
    with orthanc(folder) as running, pytest.MonkeyPatch.context() as patch:
        patch.setenv("NETRC", str(folder / "netrc"))
        for path in sorted(hospital.rglob("*.dcm")):
            running.put(path.read_bytes())
        yield running


def source_of(way: str, request: pytest.FixtureRequest, hospital: Path) -> StudySource:
    if way == "folder":
        return open_folder_source(hospital, 0)
    running: Orthanc = request.getfixturevalue("archive")
    return open_dicomweb_source(running.web) if way == "web" else open_dimse_source(getattr(running, way))


def place_of(tmp_path: Path, **more: object) -> IngestPaths:
    (tmp_path / "data").mkdir(exist_ok=True)
    return IngestPaths(tmp_path / "data" / "cohort.csv", tmp_path / "state", "north", **more)  # type: ignore[arg-type]


SILENT = Console(quiet=True)
ALL = StudyFilter(since="20200101", until="20201231")


@pytest.mark.parametrize("way", ["web", "get", "move", "folder"])
def test_every_way_brings_the_same_cohort(
    way: str,
    request: pytest.FixtureRequest,
    hospital: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    source, place = source_of(way, request, hospital), place_of(tmp_path)
    with caplog.at_level(logging.DEBUG):
        logging.getLogger().setLevel(logging.DEBUG)
        done = ingest_studies(source, ALL, place, SILENT)
        again = ingest_studies(source, ALL, place, SILENT)
    assert (done.added, done.already_present, done.failed, done.empty) == (4, 0, 0, 0)
    assert (again.added, again.already_present) == (0, 4)
    reasons = sorted(one.reason for one in done.skipped)
    assert [r for r in reasons if "SR" in r or "Text" in r], reasons
    assert "1 x annotations are burned into its pixels" in reasons
    assert "1 x Secondary Capture Image Storage: no CT image and no radiograph" in reasons
    assert len(reasons) == 3

    table = load_cohort(place.cohort_table, "north")
    assert (len(table), table["patient"].nunique(), sorted(table["modality"])) == (
        4,
        2,
        ["CT", "CT", "CT", "XR"],
    )
    assert table.groupby("patient")["split"].nunique().max() == 1
    files = sorted((tmp_path / "data" / "dicom").rglob("*.dcm"))
    assert len(files) == 3 * IMAGES + 1
    old = set[str]().union(*map(uids_of, hospital.rglob("*.dcm")))
    assert signs_in(tmp_path, *old) == []  # the state folder too
    said = caplog.text + "".join(capfd.readouterr()) + str(done)
    assert not [sign for sign in ("PLANTED", "Anna", *old) if sign in said]

    here = [read_scan(tmp_path / "data" / path) for path in table["path"]]
    there = [read_scan(p) for p in [*sorted(hospital.glob("*/")), hospital / "PLANTED^film.dcm"]]
    for scan in there:
        assert [
            k
            for k, one in enumerate(here)
            if one.voxels.shape == scan.voxels.shape and np.array_equal(one.voxels, scan.voxels)
        ]
    syntaxes = {str(pydicom.dcmread(p, stop_before_pixels=True).file_meta.TransferSyntaxUID) for p in files}
    assert len(syntaxes) == 2  # what was compressed came so


def test_labels_lists_and_the_mapping(hospital: Path, tmp_path: Path) -> None:
    dataset = pydicom.dcmread(next((hospital / "PLANTED^ct3").iterdir()), stop_before_pixels=True)
    pd.DataFrame({"PatientID": [NAMES[0], "x"], "covid": [1, 0], "PatientName": "PLANTED"}).to_csv(
        tmp_path / "p.csv", index=False
    )
    pd.DataFrame({"AccessionNumber": ["PLANTED-ct3"], "covid": [0], "severity": [12.5]}).to_csv(
        tmp_path / "a.csv", index=False
    )
    pd.DataFrame({"study": [dataset.StudyInstanceUID, ""], "patient": ["", NAMES[0]]}).to_csv(
        tmp_path / "list.csv", index=False
    )
    source = open_folder_source(hospital, 0)
    only = StudyFilter(until="20200401", identifiers=read_study_list(tmp_path / "list.csv"))
    done = ingest_studies(source, only, place_of(tmp_path, labels=tmp_path / "p.csv"), SILENT)
    assert (done.added, [n for n in done.notes if "PatientName" in n] != []) == (
        3,
        True,
    )  # not the film of the day after
    assert not (tmp_path / "state" / "ingest" / "mapping.csv").exists()
    ingest_studies(source, only, place_of(tmp_path, labels=tmp_path / "a.csv", keep_mapping=True), SILENT)
    table = load_cohort(tmp_path / "data" / "cohort.csv", "north").set_index("scan")
    mapping = tmp_path / "state" / "ingest" / "mapping.csv"
    assert mapping.stat().st_mode & 0o777 == 0o600
    known = pd.read_csv(mapping, dtype=str).set_index("scan")
    assert set(known["PatientID"]) == set(NAMES)
    assert dict(table["patient"]) == dict(known["patient"])
    third = known.index[known["AccessionNumber"] == "PLANTED-ct3"][0]
    assert table.loc[third, "severity"] == 12.5
    assert table["covid"].to_dict() == {scan: float(scan != third) for scan in table.index}
    assert signs_in(tmp_path / "data") == []

    edited = pd.read_csv(tmp_path / "data" / "cohort.csv", dtype=str)
    edited.loc[edited["scan"] == third, ["split", "source"]] = ["test", "scanner 2"]
    edited.to_csv(tmp_path / "data" / "cohort.csv", index=False)
    for path in sorted((hospital / "PLANTED^ct3").iterdir()):
        os.utime(path)  # as if images had been added
    assert ingest_studies(source, only, place_of(tmp_path), SILENT).added == 1
    table = load_cohort(tmp_path / "data" / "cohort.csv", "north").set_index("scan")
    assert list(table.loc[third, ["split", "source", "covid"]]) == ["test", "scanner 2", 0.0]


def test_a_study_that_does_not_come_is_told_and_tried_again(hospital: Path, tmp_path: Path) -> None:
    whole = open_folder_source(hospital, 0)
    broken = [True]

    def fetch(study: DicomStudy, wanted: StudyFilter, taker: ImageSink) -> None:
        if broken[0] and study.patient_id == NAMES[1]:
            raise OSError(5, f"cannot read {study.uid}")
        whole.fetch_study(study, wanted, taker)

    source, place = StudySource(whole.find_studies, fetch, whole.not_offered), place_of(tmp_path)
    done = ingest_studies(source, ALL, place, SILENT)
    assert (done.added, done.failed) == (3, 1)
    assert "it cannot be brought in (OSError); tried again next time" in [one.reason for one in done.skipped]
    assert not list((tmp_path / "data" / "dicom" / ".incoming").iterdir())
    broken[0] = False
    done = ingest_studies(source, ALL, place, SILENT)
    assert (done.added, done.already_present, done.failed) == (1, 3, 0)
    assert len(load_cohort(place.cohort_table, "north")) == 4


def test_an_archive_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    for source, says in (
        (open_dicomweb_source("http://127.0.0.1:9/dicom-web"), "cannot be reached"),
        (open_dimse_source("dicom://A@127.0.0.1:9"), "cannot be reached"),
    ):
        with pytest.raises(ConsiliumError, match=says):
            ingest_studies(source, ALL, place_of(tmp_path), SILENT)
    for address in ("dicom://127.0.0.1:9", "dicom://A@h:x", "dicom://A@h?aett=B"):
        with pytest.raises(ConsiliumError, match="is no DICOM address"):
            open_dimse_source(address)


def test_an_archive_that_does_not_know_us_is_one_sentence(archive: Orthanc, tmp_path: Path) -> None:
    with pytest.raises(ConsiliumError, match="refuses us; check host, port and AE titles"):
        ingest_studies(
            open_dimse_source(archive.get.replace("ARCHIVE", "WRONG")), ALL, place_of(tmp_path), SILENT
        )
    with pytest.raises(ConsiliumError, match="does it know our AE title"):
        ingest_studies(
            open_dimse_source(archive.get.replace(OURS, "STRANGER")), ALL, place_of(tmp_path), SILENT
        )
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = ingest_studies(
            open_dimse_source(f"{archive.get}&listen=127.0.0.1:{taken.getsockname()[1]}"),
            ALL,
            place_of(tmp_path),
            SILENT,
        )
    assert (done.added, done.failed) == (0, 4)
    assert [one for one in done.skipped if "nothing can listen at 127.0.0.1" in one.reason]


def test_files_are_taken_once_they_are_complete(hospital: Path, tmp_path: Path) -> None:
    inbox, place = tmp_path / "inbox", place_of(tmp_path)
    inbox.mkdir()
    (inbox / "report.pdf").write_text("PLANTED")
    source = open_folder_source(inbox, 1.5)
    original = sorted((hospital / "PLANTED^ct3").iterdir())
    for path in original[:-1]:
        shutil.copyfile(path, inbox / path.name)
    done = ingest_studies(source, ALL, place, SILENT)
    assert (done.added, done.notes) == (
        0,
        ["1 files that are no DICOM, or damaged", "1 studies that are still arriving"],
    )
    time.sleep(1.6)
    assert ingest_studies(source, ALL, place, SILENT).added == 1
    (inbox / original[-1].name).write_bytes(
        original[-1].read_bytes()[:-100]
    )  # the last image, and not all of it
    time.sleep(1.6)
    done = ingest_studies(source, ALL, place, SILENT)
    assert (done.added, [one.reason for one in done.skipped]) == (
        1,
        ["1 x its pixels are not there, or not all of them"],
    )
    shutil.copyfile(original[-1], inbox / original[-1].name)
    time.sleep(1.6)
    assert ingest_studies(source, ALL, place, SILENT).added == 1
    assert len(load_cohort(place.cohort_table, "north")) == 1
    assert len(list((tmp_path / "data" / "dicom").rglob("*.dcm"))) == IMAGES


def command(*words: object) -> list[str]:
    return [sys.executable, "-c", "from client.cli import main; main()", "ingest", *map(str, words)]


@pytest.mark.parametrize("way", ["web", "folder"])
def test_a_kill_at_any_moment_costs_nothing_but_time(
    way: str, request: pytest.FixtureRequest, hospital: Path, tmp_path: Path
) -> None:
    """Killed while a study's images come, and again when one is done; then it ends as if it had not been, with that one not fetched again."""
    where = hospital if way == "folder" else request.getfixturevalue("archive").web
    (tmp_path / "data").mkdir()
    (tmp_path / "site.yaml").write_text(
        f"centre: north\ndata: {tmp_path / 'data'}\nstate: {tmp_path / 'state'}\npacs: {where}\n"
    )
    words = command("--site", tmp_path / "site.yaml", "--since", "2020-01-01", "--quiet", 0)
    kept, dicom = tmp_path / "data" / "cohort.csv", tmp_path / "data" / "dicom"
    journal = tmp_path / "state" / "ingest" / "journal.jsonl"
    for moment in (lambda: any((dicom / ".incoming").glob("*/*/*.dcm")), journal.exists):
        running = subprocess.Popen(words, cwd=Path(__file__).parents[3], stdout=subprocess.DEVNULL)
        try:
            while running.poll() is None and not moment():
                time.sleep(0.001)
        finally:
            running.kill()
        assert running.wait() == -signal.SIGKILL
    ended = subprocess.run(words, cwd=Path(__file__).parents[3], capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    table = load_cohort(kept, "north")
    assert (len(table), table["scan"].nunique(), "0 could not be brought in" in ended.stdout) == (4, 4, True)
    assert " 0 were here" not in ended.stdout
    assert len(list(dicom.rglob("*.dcm"))) == 3 * IMAGES + 1
    assert not list((dicom / ".incoming").iterdir())
    assert "PLANTED" not in ended.stdout + ended.stderr
    assert signs_in(tmp_path) == []


def test_watching_goes_on_until_it_is_stopped(hospital: Path, tmp_path: Path) -> None:
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    words = command(inbox, "--data", tmp_path / "data", "--watch", "--every", 0.2, "--quiet", 0.5)
    running = subprocess.Popen(words, cwd=Path(__file__).parents[3], stdout=subprocess.PIPE, text=True)
    kept = tmp_path / "data" / "cohort.csv"
    try:
        for study, rows in (("PLANTED^ct1", 1), ("PLANTED^ct2", 2)):
            shutil.copytree(hospital / study, inbox / study)
            end = time.monotonic() + 200
            while time.monotonic() < end and not (kept.exists() and len(load_cohort(kept, "n")) == rows):
                assert running.poll() is None
                time.sleep(0.1)
            assert len(load_cohort(kept, "n")) == rows
    finally:
        running.terminate()
        said, _ = running.communicate(timeout=60)
    assert (running.returncode, "stopped; what came is kept" in said, "PLANTED" in said) == (0, True, False)


def test_bad_input_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("name,covid\na,1\n")
    (tmp_path / "twice.csv").write_text("patient,covid\na,1\na,0\n")
    (tmp_path / "none.csv").write_text("patient,PatientName\na,b\n")
    for path, says in (
        ("gone.csv", "cannot be read"),
        ("t.csv", "no column study"),
        ("twice.csv", "twice"),
        ("none.csv", "no column that is"),
    ):
        with pytest.raises(ConsiliumError, match=says):
            read_labels(tmp_path / path, bytes(32))
    with pytest.raises(ConsiliumError, match="write it as 2020-04-01"):
        parse_date("1.4.2020")
    with pytest.raises(ConsiliumError, match="would take all that the archive holds"):
        ingest_command("https://pacs/dicom-web", data=tmp_path)
    with pytest.raises(ConsiliumError, match="say where studies come from"):
        ingest_command()
    with pytest.raises(ConsiliumError, match="is no folder"):
        ingest_command(str(tmp_path / "gone"), data=tmp_path)
