"""While images are moved to the centre, nobody but the archive can store, and nothing but what was asked for.

The archive and the strangers are pynetdicom's own, in real associations over TCP.
"""

from __future__ import annotations

import copy
import http.server
import io
import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.uid import CTImageStorage
from pynetdicom import AE, evt

from client.ingest.dicomweb_source import open_dicomweb_source
from client.ingest.dimse_source import FIND_SOP_CLASS, MOVE_SOP_CLASS, open_dimse_source
from client.ingest.folder_source import open_folder_source
from client.ingest.selection import DicomStudy, StudyFilter
from client.ingest.study_source import FOREIGN_IMAGE_REASON
from common.utils.errors import ConsiliumError
from tests.client.orthanc import find_free_port

SUCCESS = 0x0000
NOT_AUTHORISED = 0x0124
UNEXPECTED = 0xA900
REJECTED = -1  # no association
WRONG_ADDRESS_REASON = "it came from an address that is not the archive's"


@dataclass
class Images:
    """An image sink."""

    uids: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    def add(self, dataset: Dataset) -> None:
        self.uids.append(str(dataset.SOPInstanceUID))

    def skip(self, reason: str, count: int = 1) -> None:
        self.skipped[reason] += count


@dataclass
class Archive:
    """An archive with one image, which calls `meanwhile` during a C-MOVE before it sends it."""

    image: Dataset
    port: int
    local_port: int
    store_ae_title: str = "ARCHIVE"
    meanwhile: Callable[[], None] = lambda: None

    def url(self, options: str = "") -> str:
        return f"dicom://ARCHIVE@127.0.0.1:{self.port}?aet=OURS&listen=127.0.0.1:{self.local_port}{options}"

    def store(self, dataset: Dataset, ae_title: str, address: str = "127.0.0.1") -> int:
        """Store an image into the centre, and return the status."""
        sender = AE(ae_title)
        sender.add_requested_context(CTImageStorage, dataset.file_meta.TransferSyntaxUID)
        association = sender.associate(
            "127.0.0.1", self.local_port, ae_title="OURS", bind_address=(address, 0)
        )
        if not association.is_established:
            return REJECTED
        status = association.send_c_store(dataset)
        association.release()
        return int(status.Status)

    def find(self, event: evt.Event) -> Iterator[tuple[int, Dataset | None]]:
        answer = Dataset()
        answer.QueryRetrieveLevel = event.identifier.QueryRetrieveLevel
        for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID", "Modality"):
            setattr(answer, keyword, self.image[keyword].value)
        answer.NumberOfSeriesRelatedInstances = 1
        yield 0xFF00, answer

    def move(self, event: evt.Event) -> Iterator[Any]:
        self.meanwhile()
        if self.store_ae_title == "ARCHIVE":
            yield "127.0.0.1", self.local_port, {"ae_title": "OURS"}
            yield 1
            yield 0xFF00, self.image
            return
        is_stored = self.store(self.image, self.store_ae_title) == SUCCESS
        yield "127.0.0.1", self.local_port, {"ae_title": "OURS"}
        yield 0
        yield (0x0000 if is_stored else 0xA702), None


@pytest.fixture
def archive(hospital: Path) -> Iterator[Archive]:
    image = pydicom.dcmread(hospital / "PLANTED^ct3" / "001.dcm")
    archive = Archive(image, find_free_port(), find_free_port())
    ae = AE("ARCHIVE")
    ae.supported_contexts = []
    ae.add_supported_context(FIND_SOP_CLASS)
    ae.add_supported_context(MOVE_SOP_CLASS)
    ae.add_requested_context(CTImageStorage, image.file_meta.TransferSyntaxUID)
    handlers: list[Any] = [(evt.EVT_C_FIND, archive.find), (evt.EVT_C_MOVE, archive.move)]
    server = ae.start_server(("127.0.0.1", archive.port), block=False, evt_handlers=handlers)
    yield archive
    assert server is not None
    server.shutdown()


def fetch(archive: Archive, options: str = "") -> Images:
    images = Images()
    study = DicomStudy(str(archive.image.StudyInstanceUID), "", "", "")
    open_dimse_source(archive.url(options)).fetch_study(study, StudyFilter(), images)
    return images


def changed(image: Dataset, **values: str) -> Dataset:
    """Return the image with other UIDs, as another patient's would have."""
    other = copy.deepcopy(image)
    for keyword, value in values.items():
        setattr(other, keyword, value)
    return other


def test_only_the_archive_stores_and_only_what_was_asked_for(archive: Archive) -> None:
    statuses: dict[str, int] = {}

    def attack() -> None:
        image = archive.image
        statuses["stranger"] = archive.store(image, "STRANGER")
        statuses["other address"] = archive.store(image, "ARCHIVE", "127.0.0.2")
        for keyword in ("StudyInstanceUID", "SeriesInstanceUID", "SOPInstanceUID"):
            statuses[keyword] = archive.store(changed(image, **{keyword: "1.2.3.4"}), "ARCHIVE")

    archive.meanwhile = attack
    images = fetch(archive)
    assert statuses == {
        "stranger": REJECTED,
        "other address": NOT_AUTHORISED,
        "StudyInstanceUID": UNEXPECTED,
        "SeriesInstanceUID": UNEXPECTED,
        "SOPInstanceUID": UNEXPECTED,
    }
    assert images.uids == [archive.image.SOPInstanceUID]
    assert images.skipped == {FOREIGN_IMAGE_REASON: 3, WRONG_ADDRESS_REASON: 1}


def test_image_that_arrives_again_does_not_replace_the_first(archive: Archive) -> None:
    archive.meanwhile = lambda: print(archive.store(archive.image, "ARCHIVE"))
    assert fetch(archive).uids == [archive.image.SOPInstanceUID]


def test_nobody_listens_once_the_series_has_arrived(archive: Archive) -> None:
    fetch(archive)
    assert archive.store(archive.image, "ARCHIVE") == REJECTED


def test_archive_that_stores_under_another_title_is_named_with_the_setting(archive: Archive) -> None:
    archive.store_ae_title = "STORE"
    with pytest.raises(ConsiliumError, match=r"refused as a sender: AE title 'STORE'; .* add &from=AET@host"):
        fetch(archive)
    assert fetch(archive, "&from=STORE").uids == [archive.image.SOPInstanceUID]
    assert fetch(archive, "&from=STORE@*").uids == [archive.image.SOPInstanceUID]


def test_foreign_image_in_an_answer_of_dicomweb_is_not_taken(hospital: Path) -> None:
    image = pydicom.dcmread(hospital / "PLANTED^ct3" / "001.dcm")
    body = b""
    for dataset in (image, changed(image, SeriesInstanceUID="1.2.3.4")):
        file = io.BytesIO()
        dataset.save_as(file)
        body += b"--part\r\nContent-Type: application/dicom\r\n\r\n" + file.getvalue() + b"\r\n"
    series = {"0020000E": {"vr": "UI", "Value": [image.SeriesInstanceUID]}}
    series["00080060"] = {"vr": "CS", "Value": ["CT"]}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            is_search = self.path.partition("?")[0].endswith("/series")
            content = json.dumps([series]).encode() if is_search else body + b"--part--"
            images = 'multipart/related; type="application/dicom"; boundary=part'
            self.send_response(200)
            self.send_header("Content-Type", "application/dicom+json" if is_search else images)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    images = Images()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        source = open_dicomweb_source(f"http://127.0.0.1:{server.server_port}/dicom-web")
        study = DicomStudy(str(image.StudyInstanceUID), "", "", "")
        source.fetch_study(study, StudyFilter(), images)
        server.shutdown()
    assert (images.uids, images.skipped) == ([image.SOPInstanceUID], {FOREIGN_IMAGE_REASON: 1})


def test_file_of_a_folder_that_became_another_study_is_not_taken(hospital: Path, tmp_path: Path) -> None:
    image = pydicom.dcmread(hospital / "PLANTED^ct3" / "001.dcm")
    image.save_as(tmp_path / "a.dcm")
    source = open_folder_source(tmp_path, 0)
    (study,) = source.find_studies(StudyFilter())
    image.StudyInstanceUID = "1.2.3.4"
    image.save_as(tmp_path / "a.dcm")
    images = Images()
    source.fetch_study(study, StudyFilter(), images)
    assert (images.uids, images.skipped) == ([], {FOREIGN_IMAGE_REASON: 1})
