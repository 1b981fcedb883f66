"""Receive the images that an archive stores into the centre (C-STORE), and nothing else.

Anyone in the hospital's network may connect while a C-MOVE is under way. So the application entity and the
address of the sender must be the archive's, and an image must be one of those that were asked for.
"""

from __future__ import annotations

import ipaddress
import socket

from pynetdicom import evt

from client.ingest.study_source import FOREIGN_IMAGE_REASON, ImageSink, is_of_series

# Statuses of a C-STORE (PS3.4 table B.2-1, PS3.7 annex C).
STORE_SUCCESS = 0x0000
STORE_NOT_AUTHORISED = 0x0124
STORE_OUT_OF_RESOURCES = 0xA700
STORE_UNEXPECTED_DATASET = 0xA900
STORE_FAILED = 0xC000
ANY_HOST = "*"


class StoreReceiver:
    """Passes the images of one series to a sink, from pynetdicom's thread.

    Errors are kept in `errors` for the thread that waits for the retrieval.
    """

    def __init__(self, study_uid: str, series_uid: str, image_uids: frozenset[str], sink: ImageSink) -> None:
        """Receive a series; without `image_uids` every image of the series is expected."""
        self._study_uid = study_uid
        self._series_uid = series_uid
        self._image_uids = image_uids
        self.sink = sink
        self.received_uids: set[str] = set()
        self.errors: list[Exception] = []
        self.refused_senders: set[str] = set()  # as a person reads it

    def handle_store(self, event: evt.Event) -> int:
        """Handle a C-STORE and return its status."""
        try:
            dataset = event.dataset
            dataset.file_meta = event.file_meta
            uid = str(dataset.SOPInstanceUID)
            is_expected = not self._image_uids or uid in self._image_uids
            if not is_expected or not is_of_series(dataset, self._study_uid, self._series_uid):
                self.sink.skip(FOREIGN_IMAGE_REASON)
                return STORE_UNEXPECTED_DATASET
            if uid not in self.received_uids:  # sent again, it must not replace the first
                self.sink.add(dataset)
                self.received_uids.add(uid)
            return STORE_SUCCESS
        except Exception as error:
            self.errors.append(error)
            return STORE_OUT_OF_RESOURCES if isinstance(error, OSError) else STORE_FAILED

    def explain_refusals(self) -> str:
        """Return the end of an error message: who was refused, and the setting that admits it."""
        if not self.refused_senders:
            return ""
        senders = ", ".join(sorted(self.refused_senders))
        return (
            f"; refused as a sender: {senders}; if that is the archive, add &from=AET@host to the "
            "archive's address"
        )


class StoreGate:
    """Lets an archive, and nobody else, store into a receiver."""

    def __init__(self, ae_title: str, addresses: frozenset[str], receiver: StoreReceiver) -> None:
        """Expect an AE title, and one of the addresses; without addresses every one is expected."""
        self._ae_title = ae_title
        self._addresses = addresses
        self._receiver = receiver

    def handle_store(self, event: evt.Event) -> int:
        """Handle a C-STORE and return its status."""
        address = _normalise_address(event.assoc.requestor.address)
        if self._addresses and address not in self._addresses:
            self._receiver.refused_senders.add(f"address {address}")
            self._receiver.sink.skip("it came from an address that is not the archive's")
            return STORE_NOT_AUTHORISED
        return self._receiver.handle_store(event)

    def handle_rejected(self, event: evt.Event) -> None:
        """Note an association that was rejected, perhaps because of its AE title."""
        title = event.assoc.requestor.ae_title
        if title != self._ae_title:
            self._receiver.refused_senders.add(f"AE title {title!r}")


def resolve_addresses(host: str) -> frozenset[str]:
    """Return the addresses of a host; none for any host, and for one that has no address."""
    if host == ANY_HOST:
        return frozenset()
    try:
        answers = socket.getaddrinfo(host, None)
    except OSError:
        return frozenset({host})  # nobody has it: the association with the archive fails first
    return frozenset(_normalise_address(str(answer[4][0])) for answer in answers)


def _normalise_address(text: str) -> str:
    """Return an IP address in one form: IPv4 within IPv6 as IPv4."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return text
    mapped = getattr(address, "ipv4_mapped", None)
    return str(mapped or address)
