"""The addresses of archives that speak DICOM's own protocol."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import parse_qsl, urlsplit

from common.utils.errors import ConsiliumError

DEFAULT_PORT = 104
DEFAULT_AE_TITLE = "CONSILIUM"
MAX_AE_TITLE_LENGTH = 16


@dataclass(frozen=True)
class DicomPeer:
    """The archive's application entity and ours."""

    ae_title: str
    host: str
    port: int
    local_ae_title: str
    listen_address: tuple[str, int] | None  # where our storage SCP listens; None where C-GET is used


def parse_dicom_url(url: str) -> DicomPeer:
    """Parse `dicom://AET@host:port?aet=OURS&listen=host:port`; raises ConsiliumError for another form."""
    try:
        return _parse_peer(url)
    except ValueError:
        raise ConsiliumError(
            f"'{url}' is not a DICOM address; write it as dicom://AET@host:port, if necessary with "
            "?aet=OURS and &listen=0.0.0.0:11112"
        ) from None


def _parse_peer(url: str) -> DicomPeer:
    """Parse the address; raises ValueError when it is malformed."""
    parts = urlsplit(url)
    options = dict(parse_qsl(parts.query, strict_parsing=bool(parts.query)))
    ae_title = parts.username or ""
    local_ae_title = options.pop("aet", DEFAULT_AE_TITLE)
    listen_address = None
    listen_host, _, listen_port = options.pop("listen", "").rpartition(":")
    if listen_port:
        listen_address = (listen_host, int(listen_port))
    if options:
        raise ValueError(f"unknown options {sorted(options)}")
    if not parts.hostname:
        raise ValueError("no host")
    for title in (ae_title, local_ae_title):
        if not 0 < len(title) <= MAX_AE_TITLE_LENGTH:
            raise ValueError(f"AE title of {len(title)} characters")
    return DicomPeer(ae_title, parts.hostname, parts.port or DEFAULT_PORT, local_ae_title, listen_address)
