"""What one HTTPS answer tells of its server: how long its certificate is good for, and whether the clocks agree."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime
from pathlib import Path

import httpx

from common.utils.checks import CheckResult


def https_client(ca_file: Path) -> httpx.Client:
    """A client that trusts the federation's ca.crt, and nobody else. Raises OSError where it cannot be read."""
    return httpx.Client(verify=ssl.create_default_context(cafile=str(ca_file)), timeout=15)


def read_certificate_expiry(response: httpx.Response) -> datetime:
    """When the certificate of an open answer's server expires."""
    tls = response.extensions["network_stream"].get_extra_info("ssl_object")
    return datetime.fromtimestamp(ssl.cert_time_to_seconds(tls.getpeercert()["notAfter"]), UTC)


def check_expiry(subject: str, expires_at: datetime, warning_days: int, remedy: str) -> CheckResult:
    """How long `what` is still good for; a warning `warn` days before."""
    left = (expires_at - datetime.now(UTC)).days
    if expires_at <= datetime.now(UTC):
        return CheckResult("fault", f"{subject} expired on {expires_at:%Y-%m-%d}", remedy)
    if left < warning_days:
        return CheckResult("warning", f"{subject} expires in {left} days, on {expires_at:%Y-%m-%d}", remedy)
    return CheckResult("ok", f"{subject} is good until {expires_at:%Y-%m-%d}, {left} days")


def check_clock_skew(seconds_ahead: float) -> CheckResult:
    """This machine's clock against the coordinator's, in seconds. Flower refuses a signature from 5 s in the future or 5 minutes in the past."""
    said = (
        f"clock: {abs(seconds_ahead):.0f} s {'ahead of' if seconds_ahead > 0 else 'behind'} the coordinator's"
    )
    if -240 < seconds_ahead < 3:
        return CheckResult("ok" if seconds_ahead > -10 else "warning", said)
    return CheckResult("fault", f"{said}, which will refuse what is signed here", "set it by NTP")
