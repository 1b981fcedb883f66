"""Studies from an archive that speaks DICOM's own protocol (PS3.4 annex C): C-FIND, then C-GET or C-MOVE.

C-GET brings the images over the connection that asks for them, so nothing listens here. An archive without it sends them by C-MOVE to a
storage SCP of our own, which listens only while a study is fetched and only where `listen=` says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import parse_qs, urlsplit

from pydicom.dataset import Dataset
from pydicom.uid import (
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000TransferSyntaxes,
    JPEGLSTransferSyntaxes,
    JPEGTransferSyntaxes,
    RLELossless,
    SecondaryCaptureImageStorage,
)
from pynetdicom import AE, build_context, build_role, evt
from pynetdicom.association import Association

from client.ingest.deidentify import IMAGE_SOP_CLASSES
from client.ingest.selection import (
    DicomStudy,
    ImageSink,
    StudyFilter,
    StudySource,
    build_search_filters,
    check_complete,
    series_exclusion_reason,
)
from common.utils.errors import ConsiliumError

# The study root information model (PS3.4 C.4).
FIND_SOP_CLASS, MOVE_SOP_CLASS, GET_SOP_CLASS = (f"1.2.840.10008.5.1.4.1.2.2.{k}" for k in (1, 2, 3))
UNCOMPRESSED_SYNTAXES: list[Any] = [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian]
COMPRESSED_SYNTAXES: list[Any] = [
    RLELossless,
    *JPEGTransferSyntaxes,
    *JPEGLSTransferSyntaxes,
    *JPEG2000TransferSyntaxes,
]
STORAGE_SOP_CLASSES = (
    *IMAGE_SOP_CLASSES,
    SecondaryCaptureImageStorage,
)  # a screenshot within a series is to arrive, so that it is listed
PENDING_STATUSES = (0xFF00, 0xFF01)
STUDY_KEYWORDS = ("StudyInstanceUID", "PatientID", "AccessionNumber", "NumberOfStudyRelatedInstances")
SERIES_KEYWORDS = ("SeriesInstanceUID", "Modality", "BodyPartExamined", "NumberOfSeriesRelatedInstances")


class DicomPeer(NamedTuple):
    """The archive's application entity and ours; `listen` is where our storage SCP listens, None where the archive knows C-GET."""

    ae_title: str
    host: str
    port: int
    local_ae_title: str
    listen_address: tuple[str, int] | None


def parse_dicom_url(url: str) -> DicomPeer:
    """`dicom://AET@host:port?aet=OURS&listen=host:port`. Raises ConsiliumError for another form."""
    try:
        parts = urlsplit(url)
        said = {
            key: values[-1] for key, values in parse_qs(parts.query, strict_parsing=bool(parts.query)).items()
        }
        host, _, port = said.pop("listen", "").rpartition(":")
        ours = said.pop("aet", "CONSILIUM")
        peer = DicomPeer(
            parts.username or "",
            parts.hostname or "",
            parts.port or 104,
            ours,
            (host, int(port)) if port else None,
        )
        good = not said and bool(peer.host) and all(0 < len(aet) <= 16 for aet in (peer.ae_title, ours))
    except ValueError:
        good = False
    if not good:
        raise ConsiliumError(
            f"'{url}' is no DICOM address; write it as dicom://AET@host:port, with ?aet=OURS and &listen=0.0.0.0:11112 if need be"
        )
    return peer


def open_dimse_source(url: str) -> StudySource:
    """The archive at `url`, see `peer_of`."""
    peer = parse_dicom_url(url)
    return StudySource(partial(_find_studies, peer), partial(_fetch_study, peer), Counter())


@contextmanager
def _open_association(peer: DicomPeer, contexts: list[Any], **more: Any) -> Iterator[Association]:
    ae = AE(ae_title=peer.local_ae_title)
    ae.acse_timeout, ae.dimse_timeout, ae.network_timeout = 30, 300, 300  # s; archives fetch from tape
    link = ae.associate(peer.host, peer.port, contexts=contexts, ae_title=peer.ae_title, **more)
    if not link.is_established:
        raise ConsiliumError(
            f"the archive {peer.ae_title} at {peer.host}:{peer.port} cannot be reached or refuses us; check host, port and AE titles"
        )
    try:
        yield link
    finally:
        if link.is_established:
            link.release()


def _send_find(
    link: Association, level: str, keys: tuple[str, ...], filters: dict[str, str]
) -> list[Dataset]:
    """C-FIND. Raises ConsiliumError when it does not end well."""
    asked = Dataset()
    asked.QueryRetrieveLevel = level
    for word in keys:
        setattr(asked, word, "")
    for word, value in filters.items():
        setattr(asked, word, value)
    found: list[Dataset] = []
    status = None
    for status, answer in link.send_c_find(asked, FIND_SOP_CLASS):
        if status and status.Status in PENDING_STATUSES and answer is not None:
            found.append(answer)
    _check_status(status, "C-FIND")
    return found


def _check_status(status: Dataset | None, service: str) -> None:
    if not status:
        raise ConsiliumError(
            f"the archive did not answer a {service} in time, or closed the connection: does it know our AE title?"
        )
    if status.Status:
        lost = (
            f", {status.NumberOfFailedSuboperations} images failed"
            if status.get("NumberOfFailedSuboperations")
            else ""
        )
        raise ConsiliumError(f"the archive ended a {service} with status {status.Status:#06x}{lost}")


def _find_studies(peer: DicomPeer, study_filter: StudyFilter) -> Iterator[DicomStudy]:
    with _open_association(peer, [build_context(FIND_SOP_CLASS)]) as link:
        for filters in build_search_filters(study_filter):
            for answer in _send_find(link, "STUDY", STUDY_KEYWORDS, filters):
                said = [str(answer.get(word) or "") for word in STUDY_KEYWORDS]
                yield DicomStudy(*said)


def _fetch_study(peer: DicomPeer, study: DicomStudy, study_filter: StudyFilter, sink: ImageSink) -> None:
    with _open_association(peer, [build_context(FIND_SOP_CLASS)]) as link:
        answers = _send_find(link, "SERIES", SERIES_KEYWORDS, {"StudyInstanceUID": study.uid})
    for answer in answers:
        uid, modality, body_part, count = (str(answer.get(word) or "") for word in SERIES_KEYWORDS)
        reason = series_exclusion_reason(modality, body_part, study_filter)
        if reason:
            sink.skip(reason, int(count) if count.isdigit() else 1)
            continue
        asked = Dataset()
        asked.QueryRetrieveLevel, asked.StudyInstanceUID, asked.SeriesInstanceUID = "SERIES", study.uid, uid
        check_complete(
            (_retrieve_by_move if peer.listen_address else _retrieve_by_get)(peer, asked, study.uid, sink),
            count,
        )


def _make_store_handler(
    study: str, sink: ImageSink, came: list[str], trouble: list[Exception]
) -> Callable[[evt.Event], int]:
    """The handler of a C-STORE; what goes wrong in it is kept for the thread that waits."""

    def store(event: evt.Event) -> int:
        try:
            dataset = event.dataset
            dataset.file_meta = event.file_meta
            if str(dataset.StudyInstanceUID) != study:
                return 0xA900  # nobody asked for it
            sink.add(dataset)
            came.append(str(dataset.SOPInstanceUID))
            return 0x0000
        except Exception as error:
            trouble.append(error)
            return 0xA700 if isinstance(error, OSError) else 0xC000

    return store


def _await_retrieval(
    answers: Iterator[tuple[Dataset, Dataset | None]], service: str, trouble: list[Exception]
) -> None:
    status = None
    for answer in answers:
        status = answer[0]
        if trouble:
            raise trouble[0]
    _check_status(status, service)


def _retrieve_by_get(peer: DicomPeer, asked: Dataset, study: str, sink: ImageSink) -> int:
    """C-GET of a series; how many images came. Each compression is offered by itself, so that the archive need not decompress."""
    contexts = [build_context(GET_SOP_CLASS)]
    contexts += [
        build_context(kind, syntax)
        for kind in STORAGE_SOP_CLASSES
        for syntax in (UNCOMPRESSED_SYNTAXES, *COMPRESSED_SYNTAXES)
    ]
    came: list[str] = []
    trouble: list[Exception] = []
    handlers = [(evt.EVT_C_STORE, _make_store_handler(study, sink, came, trouble))]
    roles = [build_role(kind, scp_role=True) for kind in STORAGE_SOP_CLASSES]
    with _open_association(peer, contexts, ext_neg=roles, evt_handlers=handlers) as link:
        if not any(context.abstract_syntax == GET_SOP_CLASS for context in link.accepted_contexts):
            raise ConsiliumError(
                "the archive offers no C-GET; let it send by C-MOVE: add listen=host:port to its address, and make us known to it"
            )
        _await_retrieval(link.send_c_get(asked, GET_SOP_CLASS), "C-GET", trouble)
    return len(set(came))


def _retrieve_by_move(peer: DicomPeer, asked: Dataset, study: str, sink: ImageSink) -> int:
    """C-MOVE of a series to a storage SCP of our own; how many images came."""
    came: list[str] = []
    trouble: list[Exception] = []
    ae = AE(ae_title=peer.local_ae_title)
    ae.require_called_aet = True
    for kind in STORAGE_SOP_CLASSES:
        ae.add_supported_context(kind, [*UNCOMPRESSED_SYNTAXES, *COMPRESSED_SYNTAXES])
    assert peer.listen_address is not None
    try:
        ae.start_server(
            peer.listen_address,
            block=False,
            evt_handlers=[(evt.EVT_C_STORE, _make_store_handler(study, sink, came, trouble))],
        )
    except OSError as error:
        raise ConsiliumError(
            f"nothing can listen at {peer.listen_address[0]}:{peer.listen_address[1]} ({error.strerror}); give another port"
        ) from None
    try:
        with _open_association(peer, [build_context(MOVE_SOP_CLASS)]) as link:
            _await_retrieval(link.send_c_move(asked, peer.local_ae_title, MOVE_SOP_CLASS), "C-MOVE", trouble)
    finally:
        ae.shutdown()
    return len(set(came))
