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

from client.ingest.deidentify import IMAGES
from client.ingest.wanted import Source, Study, Taker, Wanted, queries, unwanted, whole
from common.errors import ConsiliumError

# The study root information model (PS3.4 C.4).
FIND, MOVE, GET = (f"1.2.840.10008.5.1.4.1.2.2.{k}" for k in (1, 2, 3))
PLAIN: list[Any] = [ExplicitVRLittleEndian, ImplicitVRLittleEndian, ExplicitVRBigEndian]
COMPRESSED: list[Any] = [RLELossless, *JPEGTransferSyntaxes, *JPEGLSTransferSyntaxes, *JPEG2000TransferSyntaxes]
STORED = (*IMAGES, SecondaryCaptureImageStorage)  # a screenshot within a series is to arrive, so that it is listed
PENDING = (0xFF00, 0xFF01)
STUDY = ("StudyInstanceUID", "PatientID", "AccessionNumber", "NumberOfStudyRelatedInstances")
SERIES = ("SeriesInstanceUID", "Modality", "BodyPartExamined", "NumberOfSeriesRelatedInstances")


class Peer(NamedTuple):
    """The archive's application entity and ours; `listen` is where our storage SCP listens, None where the archive knows C-GET."""

    aet: str
    host: str
    port: int
    ours: str
    listen: tuple[str, int] | None


def peer_of(url: str) -> Peer:
    """`dicom://AET@host:port?aet=OURS&listen=host:port`. Raises ConsiliumError for another form."""
    try:
        parts = urlsplit(url)
        said = {key: values[-1] for key, values in parse_qs(parts.query, strict_parsing=bool(parts.query)).items()}
        host, _, port = said.pop("listen", "").rpartition(":")
        ours = said.pop("aet", "CONSILIUM")
        peer = Peer(parts.username or "", parts.hostname or "", parts.port or 104, ours, (host, int(port)) if port else None)
        good = not said and bool(peer.host) and all(0 < len(aet) <= 16 for aet in (peer.aet, ours))
    except ValueError:
        good = False
    if not good:
        raise ConsiliumError(
            f"'{url}' is no DICOM address; write it as dicom://AET@host:port, with ?aet=OURS and &listen=0.0.0.0:11112 if need be"
        )
    return peer


def dimse(url: str) -> Source:
    """The archive at `url`, see `peer_of`."""
    peer = peer_of(url)
    return Source(partial(_find, peer), partial(_fetch, peer), Counter())


@contextmanager
def _associated(peer: Peer, contexts: list[Any], **more: Any) -> Iterator[Association]:
    ae = AE(ae_title=peer.ours)
    ae.acse_timeout, ae.dimse_timeout, ae.network_timeout = 30, 300, 300  # s; archives fetch from tape
    link = ae.associate(peer.host, peer.port, contexts=contexts, ae_title=peer.aet, **more)
    if not link.is_established:
        raise ConsiliumError(
            f"the archive {peer.aet} at {peer.host}:{peer.port} cannot be reached or refuses us; check host, port and AE titles"
        )
    try:
        yield link
    finally:
        if link.is_established:
            link.release()


def _answers(link: Association, level: str, keys: tuple[str, ...], filters: dict[str, str]) -> list[Dataset]:
    """C-FIND. Raises ConsiliumError when it does not end well."""
    asked = Dataset()
    asked.QueryRetrieveLevel = level
    for word in keys:
        setattr(asked, word, "")
    for word, value in filters.items():
        setattr(asked, word, value)
    found: list[Dataset] = []
    status = None
    for status, answer in link.send_c_find(asked, FIND):
        if status and status.Status in PENDING and answer is not None:
            found.append(answer)
    _ended(status, "C-FIND")
    return found


def _ended(status: Dataset | None, service: str) -> None:
    if not status:
        raise ConsiliumError(f"the archive did not answer a {service} in time, or closed the connection: does it know our AE title?")
    if status.Status:
        lost = f", {status.NumberOfFailedSuboperations} images failed" if status.get("NumberOfFailedSuboperations") else ""
        raise ConsiliumError(f"the archive ended a {service} with status {status.Status:#06x}{lost}")


def _find(peer: Peer, wanted: Wanted) -> Iterator[Study]:
    with _associated(peer, [build_context(FIND)]) as link:
        for filters in queries(wanted):
            for answer in _answers(link, "STUDY", STUDY, filters):
                said = [str(answer.get(word) or "") for word in STUDY]
                yield Study(*said)


def _fetch(peer: Peer, study: Study, wanted: Wanted, taker: Taker) -> None:
    with _associated(peer, [build_context(FIND)]) as link:
        answers = _answers(link, "SERIES", SERIES, {"StudyInstanceUID": study.uid})
    for answer in answers:
        uid, modality, body_part, count = (str(answer.get(word) or "") for word in SERIES)
        reason = unwanted(modality, body_part, wanted)
        if reason:
            taker.skip(reason, int(count) if count.isdigit() else 1)
            continue
        asked = Dataset()
        asked.QueryRetrieveLevel, asked.StudyInstanceUID, asked.SeriesInstanceUID = "SERIES", study.uid, uid
        whole((_move if peer.listen else _get)(peer, asked, study.uid, taker), count)


def _storing(study: str, taker: Taker, came: list[str], trouble: list[Exception]) -> Callable[[evt.Event], int]:
    """The handler of a C-STORE; what goes wrong in it is kept for the thread that waits."""

    def store(event: evt.Event) -> int:
        try:
            dataset = event.dataset
            dataset.file_meta = event.file_meta
            if str(dataset.StudyInstanceUID) != study:
                return 0xA900  # nobody asked for it
            taker.take(dataset)
            came.append(str(dataset.SOPInstanceUID))
            return 0x0000
        except Exception as error:
            trouble.append(error)
            return 0xA700 if isinstance(error, OSError) else 0xC000

    return store


def _retrieve(answers: Iterator[tuple[Dataset, Dataset | None]], service: str, trouble: list[Exception]) -> None:
    status = None
    for answer in answers:
        status = answer[0]
        if trouble:
            raise trouble[0]
    _ended(status, service)


def _get(peer: Peer, asked: Dataset, study: str, taker: Taker) -> int:
    """C-GET of a series; how many images came. Each compression is offered by itself, so that the archive need not decompress."""
    contexts = [build_context(GET)]
    contexts += [build_context(kind, syntax) for kind in STORED for syntax in (PLAIN, *COMPRESSED)]
    came: list[str] = []
    trouble: list[Exception] = []
    handlers = [(evt.EVT_C_STORE, _storing(study, taker, came, trouble))]
    roles = [build_role(kind, scp_role=True) for kind in STORED]
    with _associated(peer, contexts, ext_neg=roles, evt_handlers=handlers) as link:
        if not any(context.abstract_syntax == GET for context in link.accepted_contexts):
            raise ConsiliumError(
                "the archive offers no C-GET; let it send by C-MOVE: add listen=host:port to its address, and make us known to it"
            )
        _retrieve(link.send_c_get(asked, GET), "C-GET", trouble)
    return len(set(came))


def _move(peer: Peer, asked: Dataset, study: str, taker: Taker) -> int:
    """C-MOVE of a series to a storage SCP of our own; how many images came."""
    came: list[str] = []
    trouble: list[Exception] = []
    ae = AE(ae_title=peer.ours)
    ae.require_called_aet = True
    for kind in STORED:
        ae.add_supported_context(kind, [*PLAIN, *COMPRESSED])
    assert peer.listen is not None
    try:
        ae.start_server(peer.listen, block=False, evt_handlers=[(evt.EVT_C_STORE, _storing(study, taker, came, trouble))])
    except OSError as error:
        raise ConsiliumError(f"nothing can listen at {peer.listen[0]}:{peer.listen[1]} ({error.strerror}); give another port") from None
    try:
        with _associated(peer, [build_context(MOVE)]) as link:
            _retrieve(link.send_c_move(asked, peer.ours, MOVE), "C-MOVE", trouble)
    finally:
        ae.shutdown()
    return len(set(came))
