"""What one HTTPS answer tells of its server: how long its certificate is good for, and whether the clocks agree."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime
from pathlib import Path

import httpx

from common.findings import Finding


def trusting(authority: Path) -> httpx.Client:
    """A client that trusts the federation's ca.crt, and nobody else. Raises OSError where it cannot be read."""
    return httpx.Client(verify=ssl.create_default_context(cafile=str(authority)), timeout=15)


def certificate_until(answer: httpx.Response) -> datetime:
    """When the certificate of an open answer's server expires."""
    tls = answer.extensions["network_stream"].get_extra_info("ssl_object")
    return datetime.fromtimestamp(ssl.cert_time_to_seconds(tls.getpeercert()["notAfter"]), UTC)


def expires(what: str, until: datetime, warn: int, remedy: str) -> Finding:
    """How long `what` is still good for; a warning `warn` days before."""
    left = (until - datetime.now(UTC)).days
    if until <= datetime.now(UTC):
        return Finding("fault", f"{what} expired on {until:%Y-%m-%d}", remedy)
    if left < warn:
        return Finding("warning", f"{what} expires in {left} days, on {until:%Y-%m-%d}", remedy)
    return Finding("ok", f"{what} is good until {until:%Y-%m-%d}, {left} days")


def clock(ahead: float) -> Finding:
    """This machine's clock against the coordinator's, in seconds. Flower refuses a signature from 5 s in the future or 5 minutes in the past."""
    said = f"clock: {abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the coordinator's"
    if -240 < ahead < 3:
        return Finding("ok" if ahead > -10 else "warning", said)
    return Finding("fault", f"{said}, which will refuse what is signed here", "set it by NTP")
