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
    store_ae_title: str = ""  # from which the archive sends by C-MOVE; empty: its own
    store_host: str = ""  # from which it sends; empty: its own; `*`: any


def parse_dicom_url(url: str) -> DicomPeer:
    """Parse `dicom://AET@host:port?aet=OURS&listen=host:port&from=AET@host`.

    `from` is where an archive sends from by C-MOVE when that is not its own AE title and host; `@host` may be
    left out, and `@*` is any host. Raises ConsiliumError for another form.
    """
    try:
        return _parse_peer(url)
    except ValueError:
        raise ConsiliumError(
            f"'{url}' is not a DICOM address; write it as dicom://AET@host:port, if necessary with "
            "?aet=OURS, &listen=0.0.0.0:11112 and &from=STORE_AET@host"
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
    store_ae_title, _, store_host = options.pop("from", "").partition("@")
    if options:
        raise ValueError(f"unknown options {sorted(options)}")
    if not parts.hostname:
        raise ValueError("no host")
    for title in (ae_title, local_ae_title, store_ae_title or ae_title):
        if not 0 < len(title) <= MAX_AE_TITLE_LENGTH:
            raise ValueError(f"AE title of {len(title)} characters")
    return DicomPeer(
        ae_title=ae_title,
        host=parts.hostname,
        port=parts.port or DEFAULT_PORT,
        local_ae_title=local_ae_title,
        listen_address=listen_address,
        store_ae_title=store_ae_title,
        store_host=store_host,
    )
