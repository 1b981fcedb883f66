"""Check an HTTPS server's certificate and compare its clock with this machine's."""

from __future__ import annotations

import ssl
from datetime import UTC, datetime
from pathlib import Path

import httpx

from common.utils.checks import CheckResult

# Flower rejects a signature that is more than 5 s in the future or 5 minutes in the past. The limits leave a
# margin.
LARGEST_SECONDS_AHEAD = 3
LARGEST_SECONDS_BEHIND = 240
WARNING_SECONDS_BEHIND = 10


def https_client(ca_file: Path) -> httpx.Client:
    """Return a client that trusts only the federation's certificate authority.

    Raises:
        OSError: The authority's file cannot be read.
    """
    return httpx.Client(verify=ssl.create_default_context(cafile=str(ca_file)), timeout=15)


def read_certificate_expiry(response: httpx.Response) -> datetime:
    """Return when the server's certificate expires; the response must still be open."""
    tls = response.extensions["network_stream"].get_extra_info("ssl_object")
    expires_at = ssl.cert_time_to_seconds(tls.getpeercert()["notAfter"])
    return datetime.fromtimestamp(expires_at, UTC)


def check_expiry(subject: str, expires_at: datetime, warning_days: int, remedy: str) -> CheckResult:
    """Check a date of expiry: a warning in the days before it, a fault afterwards."""
    days_left = (expires_at - datetime.now(UTC)).days
    date = f"{expires_at:%Y-%m-%d}"
    if expires_at <= datetime.now(UTC):
        return CheckResult("fault", f"{subject} expired on {date}", remedy)
    if days_left < warning_days:
        return CheckResult("warning", f"{subject} expires in {days_left} days, on {date}", remedy)
    return CheckResult("ok", f"{subject} is valid until {date}, {days_left} days")


def check_clock_skew(seconds_ahead: float) -> CheckResult:
    """Check by how many seconds this machine's clock is ahead of the coordinator's (negative: behind)."""
    direction = "ahead of" if seconds_ahead > 0 else "behind"
    message = f"clock: {abs(seconds_ahead):.0f} s {direction} the coordinator's"
    if not -LARGEST_SECONDS_BEHIND < seconds_ahead < LARGEST_SECONDS_AHEAD:
        return CheckResult(
            "fault", f"{message}, which will reject this centre's signatures", "synchronise it by NTP"
        )
    if seconds_ahead > -WARNING_SECONDS_BEHIND:
        return CheckResult("ok", message)
    return CheckResult("warning", message)
