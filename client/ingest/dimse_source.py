"""Studies from an archive that speaks DICOM's own protocol (PS3.4 annex C): C-FIND, then C-GET or C-MOVE.

C-GET returns the images over the connection that requests them, so nothing listens at the centre. An archive
without C-GET sends them by C-MOVE to a storage SCP of ours, which listens only while a study is fetched, and
only at the address that `listen=` gives.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

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
from client.ingest.dicom_peer import DicomPeer, parse_dicom_url
from client.ingest.dicom_receiver import StoreGate, StoreReceiver, resolve_addresses
from client.ingest.selection import DicomStudy, StudyFilter, build_search_filters
from client.ingest.study_source import (
    SERIES_KEYWORDS,
    STUDY_KEYWORDS,
    ArchiveSeries,
    ImageSink,
    check_complete,
    iter_selected_series,
    parse_study_answer,
)
from common.utils.errors import ConsiliumError

# The study root information model (PS3.4 C.6.2).
FIND_SOP_CLASS = "1.2.840.10008.5.1.4.1.2.2.1"
MOVE_SOP_CLASS = "1.2.840.10008.5.1.4.1.2.2.2"
GET_SOP_CLASS = "1.2.840.10008.5.1.4.1.2.2.3"
UNCOMPRESSED_SYNTAXES: list[Any] = [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian]
COMPRESSED_SYNTAXES: list[Any] = [
    RLELossless,
    *JPEGTransferSyntaxes,
    *JPEGLSTransferSyntaxes,
    *JPEG2000TransferSyntaxes,
]
# A screenshot within a series is received, too, so that it is counted as skipped.
STORAGE_SOP_CLASSES = (*IMAGE_SOP_CLASSES, SecondaryCaptureImageStorage)
PENDING_STATUSES = (0xFF00, 0xFF01)
UID_KEYWORDS = ("StudyInstanceUID", "SeriesInstanceUID")
CONNECT_TIMEOUT = 30  # s
ANSWER_TIMEOUT = 300  # s; archives fetch from tape


def open_dimse_source(url: str) -> DimseSource:
    """Return the archive at a URL (`parse_dicom_url`); nothing is sent yet."""
    return DimseSource(parse_dicom_url(url))


class DimseSource:
    """A study source behind C-FIND, with C-GET or C-MOVE."""

    def __init__(self, peer: DicomPeer) -> None:
        self._peer = peer
        self.not_offered: Counter[str] = Counter()

    def find_studies(self, study_filter: StudyFilter) -> Iterator[DicomStudy]:
        """Search for the selected studies."""
        with _open_association(self._peer, [build_context(FIND_SOP_CLASS)]) as association:
            for filters in build_search_filters(study_filter):
                answers = _send_find(association, "STUDY", STUDY_KEYWORDS, filters)
                yield from map(parse_study_answer, answers)

    def fetch_study(self, study: DicomStudy, study_filter: StudyFilter, sink: ImageSink) -> None:
        """Fetch the study's selected series."""
        with _open_association(self._peer, [build_context(FIND_SOP_CLASS)]) as association:
            filters = {"StudyInstanceUID": study.uid}
            answers = _send_find(association, "SERIES", SERIES_KEYWORDS, filters)
        for series in iter_selected_series(answers, study_filter, sink):
            request = _make_series_request(study, series)
            receiver = StoreReceiver(study.uid, series.uid, self._find_image_uids(request), sink)
            try:
                if self._peer.listen_address is None:
                    _retrieve_by_get(self._peer, request, receiver)
                else:
                    _retrieve_by_move(self._peer, request, receiver, self._peer.listen_address)
                check_complete(len(receiver.received_uids), series)
            except ConsiliumError as error:
                raise ConsiliumError(f"{error}{receiver.explain_refusals()}") from None

    def _find_image_uids(self, series_request: Dataset) -> frozenset[str]:
        """Return the UIDs of a series' images; none when the archive does not answer on this level."""
        filters = {keyword: series_request[keyword].value for keyword in UID_KEYWORDS}
        try:
            with _open_association(self._peer, [build_context(FIND_SOP_CLASS)]) as association:
                answers = _send_find(association, "IMAGE", ("SOPInstanceUID",), filters)
        except ConsiliumError:
            return frozenset()
        return frozenset(str(answer.get("SOPInstanceUID") or "") for answer in answers) - {""}


@contextmanager
def _open_association(
    peer: DicomPeer,
    contexts: list[Any],
    roles: Sequence[Any] = (),
    handlers: Sequence[Any] = (),
) -> Iterator[Association]:
    """Open an association for a block; raises ConsiliumError when it is not established."""
    ae = AE(ae_title=peer.local_ae_title)
    ae.acse_timeout = CONNECT_TIMEOUT
    ae.dimse_timeout = ANSWER_TIMEOUT
    ae.network_timeout = ANSWER_TIMEOUT
    association = ae.associate(
        peer.host,
        peer.port,
        contexts=contexts,
        ae_title=peer.ae_title,
        ext_neg=list(roles),
        evt_handlers=list(handlers),
    )
    if not association.is_established:
        raise ConsiliumError(
            f"the archive {peer.ae_title} at {peer.host}:{peer.port} cannot be reached or refuses us; "
            "check host, port and AE titles"
        )
    try:
        yield association
    finally:
        if association.is_established:
            association.release()


def _send_find(
    association: Association, level: str, keywords: tuple[str, ...], filters: dict[str, str]
) -> list[Dataset]:
    """Search by C-FIND; raises ConsiliumError when it fails."""
    query = Dataset()
    query.QueryRetrieveLevel = level
    for keyword in keywords:
        setattr(query, keyword, "")
    for keyword, value in filters.items():
        setattr(query, keyword, value)
    answers: list[Dataset] = []
    status = None
    for status, answer in association.send_c_find(query, FIND_SOP_CLASS):
        if status and status.Status in PENDING_STATUSES and answer is not None:
            answers.append(answer)
    _check_status(status, "C-FIND")
    return answers


def _check_status(status: Dataset | None, service: str) -> None:
    """Raise ConsiliumError unless the last status of a service is success."""
    if not status:
        raise ConsiliumError(
            f"the archive did not answer a {service} in time, or closed the connection; "
            "check that it knows our AE title"
        )
    if status.Status:
        num_failed = status.get("NumberOfFailedSuboperations")
        failures = f", {num_failed} images failed" if num_failed else ""
        raise ConsiliumError(
            f"the archive ended a {service} with status {status.Status:#06x}{failures}; see its log"
        )


def _make_series_request(study: DicomStudy, series: ArchiveSeries) -> Dataset:
    request = Dataset()
    request.QueryRetrieveLevel = "SERIES"
    request.StudyInstanceUID = study.uid
    request.SeriesInstanceUID = series.uid
    return request


def _await_retrieval(
    answers: Iterator[tuple[Dataset, Dataset | None]], service: str, receiver: StoreReceiver
) -> None:
    """Wait for the end of a retrieval; raises the receiver's first error, or ConsiliumError when it fails."""
    last_status = None
    for status, _ in answers:
        last_status = status
        if receiver.errors:
            raise receiver.errors[0]
    _check_status(last_status, service)


def _retrieve_by_get(peer: DicomPeer, request: Dataset, receiver: StoreReceiver) -> None:
    """Retrieve a series by C-GET.

    Each compression is offered in a context of its own, so that the archive need not decompress.
    """
    contexts = [build_context(GET_SOP_CLASS)]
    for sop_class in STORAGE_SOP_CLASSES:
        contexts.append(build_context(sop_class, UNCOMPRESSED_SYNTAXES))
        contexts += [build_context(sop_class, syntax) for syntax in COMPRESSED_SYNTAXES]
    roles = [build_role(sop_class, scp_role=True) for sop_class in STORAGE_SOP_CLASSES]
    handlers = [(evt.EVT_C_STORE, receiver.handle_store)]
    with _open_association(peer, contexts, roles, handlers) as association:
        accepted_classes = [context.abstract_syntax for context in association.accepted_contexts]
        if GET_SOP_CLASS not in accepted_classes:
            raise ConsiliumError(
                "the archive does not offer C-GET; add listen=host:port to its address and register us with "
                "the archive, so that it can send by C-MOVE"
            )
        _await_retrieval(association.send_c_get(request, GET_SOP_CLASS), "C-GET", receiver)


def _retrieve_by_move(
    peer: DicomPeer, request: Dataset, receiver: StoreReceiver, listen_address: tuple[str, int]
) -> None:
    """Retrieve a series by C-MOVE to a storage SCP of our own, which listens until the series has arrived.

    It accepts associations from the archive's AE title only, and images from the archive's address only.
    """
    store_ae_title = peer.store_ae_title or peer.ae_title
    gate = StoreGate(store_ae_title, resolve_addresses(peer.store_host or peer.host), receiver)
    ae = AE(ae_title=peer.local_ae_title)
    ae.require_called_aet = True
    ae.require_calling_aet = [store_ae_title]
    for sop_class in STORAGE_SOP_CLASSES:
        ae.add_supported_context(sop_class, [*UNCOMPRESSED_SYNTAXES, *COMPRESSED_SYNTAXES])
    handlers: list[Any] = [
        (evt.EVT_REJECTED, gate.handle_rejected),
        (evt.EVT_C_STORE, gate.handle_store),
    ]
    try:
        ae.start_server(listen_address, block=False, evt_handlers=handlers)
    except OSError as error:
        host, port = listen_address
        raise ConsiliumError(
            f"cannot listen at {host}:{port} ({error.strerror}); give another port in `listen=`"
        ) from None
    try:
        with _open_association(peer, [build_context(MOVE_SOP_CLASS)]) as association:
            answers = association.send_c_move(request, peer.local_ae_title, MOVE_SOP_CLASS)
            _await_retrieval(answers, "C-MOVE", receiver)
    finally:
        ae.shutdown()
