"""`consilium-centre doctor`: whatever would stop this hospital's part in a run, found before it. For the centre's eyes: it may name files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from importlib.metadata import version
from pathlib import Path

import httpx
import torch

from client.data.cohort import load_cohort
from client.site import egress_log
from client.site.config import Site, cohort_state_dir, parse_site
from client.site.policy import describe_policy, load_policy
from common.protocol.code_fingerprint import fingerprint_code
from common.utils.checks import CheckLevel, CheckResult
from common.utils.errors import ConsiliumError
from common.utils.node_keys import extract_public_key, key_fingerprint
from common.utils.tls_checks import check_clock_skew, check_expiry, https_client, read_certificate_expiry

MIN_FREE_BYTES = 20e9  # bytes of disk: slices of some ten thousand scans


def run_checks(site_file: Path, coordinator: str, ca_file: Path, key_file: Path) -> Iterator[CheckResult]:
    """All checks, each a finding or a few; one that fails does not keep the next from being made."""
    yield CheckResult(
        "ok",
        f"versions: Flower {version('flwr')}, PyTorch {torch.__version__}, our code {fingerprint_code()}",
    )
    yield from _check_key(key_file)
    yield from _check_coordinator(coordinator, ca_file)
    try:
        site = parse_site({"site": str(site_file)})
    except ConsiliumError as error:
        yield CheckResult("fault", str(error))
        return
    yield from _check_device(site)
    yield from _check_policy(site)
    yield from _check_data(site)
    yield from _check_state(site)


def _check_key(path: Path) -> Iterator[CheckResult]:
    try:
        public = extract_public_key(path)
    except (ConsiliumError, OSError) as error:
        yield CheckResult(
            "fault",
            f"key: {error}",
            "it comes with the kit, or from `consilium-centre key`, and is this user's to read",
        )
        return
    yield CheckResult("ok", f"key: {key_fingerprint(public)}; the coordinator's list must show the same")
    if path.stat().st_mode & 0o077:
        yield CheckResult("warning", f"key: {path} can be read by others", f"chmod 600 {path}")


def _check_coordinator(address: str, ca_file: Path) -> Iterator[CheckResult]:
    """One request by the way that Flower takes, proxy and all: certificate, reachability, clock."""
    if not address:
        yield CheckResult(
            "fault", "coordinator: no address", "give --coordinator host:port, or set CONSILIUM_COORDINATOR"
        )
        return
    proxy = f" through the proxy {os.environ['HTTPS_PROXY']}" if os.environ.get("HTTPS_PROXY") else ""
    try:
        with https_client(ca_file) as client, client.stream("GET", f"https://{address}/health") as answer:
            until, date, status = (
                read_certificate_expiry(answer),
                answer.headers.get("date", ""),
                answer.status_code,
            )
    except (httpx.HTTPError, OSError) as error:
        remedy = "firewall, proxy (HTTPS_PROXY), name, port?"
        if "certificate" in str(error):
            remedy = "the certificate is not from ca.crt, or not for this name: ask the coordinator"
        yield CheckResult("fault", f"coordinator: {address} cannot be reached{proxy} ({error})", remedy)
        return
    yield CheckResult(
        "ok" if status == 200 else "warning", f"coordinator: {address} answers{proxy} ({status})"
    )
    yield check_expiry("coordinator's certificate", until, 30, "ask the coordinator for a new one")
    if date:
        yield check_clock_skew((datetime.now(UTC) - parsedate_to_datetime(date)).total_seconds())


def _check_device(site: Site) -> Iterator[CheckResult]:
    try:
        device = site.resolve_device()
    except ConsiliumError as error:
        yield CheckResult(
            "fault",
            f"device: {error}",
            "does the container see the GPU (NVIDIA container toolkit, compose.gpu.yaml)?",
        )
        return
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        room = f"{free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
        yield CheckResult(
            "ok" if free > 4e9 else "warning", f"device: {torch.cuda.get_device_name(device)}, {room}"
        )
    else:
        yield CheckResult("ok", f"device: CPU, {len(os.sched_getaffinity(0))} cores")


def _check_policy(site: Site) -> Iterator[CheckResult]:
    try:
        policy = load_policy(site.policy)
    except ConsiliumError as error:
        yield CheckResult("fault", f"policy: {error}")
        return
    rules = ", ".join(f"{rule} {value}" for rule, value in describe_policy(policy).items())
    if not rules:
        yield CheckResult(
            "warning",
            "policy: it allows everything",
            "set `policy` in site.yaml, and in that file what may leave",
        )
    elif policy.fingerprints and fingerprint_code() not in policy.fingerprints:
        unknown = f"policy: it does not allow the code installed here, {fingerprint_code()}"
        yield CheckResult("fault", unknown, "approve it, or install what is approved")
    else:
        yield CheckResult("ok", f"policy: {rules}")


def _check_data(site: Site) -> Iterator[CheckResult]:
    if not site.data:
        yield CheckResult(
            "fault",
            "data: site.yaml names none",
            "set `data` to a folder with cohort.csv, or to a cohort table",
        )
        return
    path = Path(site.data)
    try:
        table = load_cohort(path, site.centre)
    except (ConsiliumError, OSError) as error:
        yield CheckResult("fault", f"data: {error}")
        return
    base = path if path.is_dir() else path.parent
    gone = [scan for scan in table["path"] if not os.access(base / str(scan), os.R_OK)]
    splits = ", ".join(f"{n} {split}" for split, n in table["split"].value_counts().items())
    yield CheckResult("ok", f"data: {len(table)} scans of {table['patient'].nunique()} patients ({splits})")
    if gone:
        level: CheckLevel = "fault" if len(gone) == len(table) else "warning"
        first = f"data: {len(gone)} of them cannot be read, the first at {base / str(gone[0])}"
        yield CheckResult(level, first, "is the folder mounted, and this user's to read?")


def _check_state(site: Site) -> Iterator[CheckResult]:
    folder = cohort_state_dir(site, Path(site.data))
    probe = folder / ".doctor"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"1")
        probe.unlink()
    except OSError as error:
        yield CheckResult(
            "fault",
            f"state: {folder} cannot be written ({error.strerror})",
            "it must belong to the user of the container",
        )
        return
    free = shutil.disk_usage(folder).free
    level: CheckLevel = (
        "ok" if free > MIN_FREE_BYTES else "warning" if free > MIN_FREE_BYTES / 20 else "fault"
    )
    remedy = "" if level == "ok" else "make room: a full disk ends this centre's part in a run"
    yield CheckResult(level, f"state: {folder}, {free / 1e9:.0f} GB free", remedy)
    if not (folder / egress_log.LOG_FILENAME).exists():
        yield CheckResult("ok", "egress log: none yet; if anything ever left from here, it was removed")
        return
    try:
        yield CheckResult(
            "ok",
            f"egress log: {sum(1 for _ in egress_log.read_entries(folder))} messages, the chain is whole",
        )
    except ConsiliumError as error:
        yield CheckResult("fault", f"egress log: {error}", "compare it with a back-up")
