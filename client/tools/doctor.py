"""`consilium-centre doctor`: find whatever would stop this hospital's part in a run before the run does.

The results are for the centre's own staff and may name files.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from datetime import UTC, date, datetime
from email.utils import parsedate_to_datetime
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import httpx
import torch

from client.data.cohort import load_cohort
from client.site import egress_log
from client.site.anchored_files import list_losses
from client.site.approvals import read_approvals
from client.site.config import Site, cohort_state_dir, outer_anchor, parse_site
from client.site.egress_anchor import has_records
from client.site.policy import describe_policy, list_open_rules, load_policy
from common.protocol.code_fingerprint import fingerprint_code
from common.utils.checks import CheckLevel, CheckResult
from common.utils.errors import ConsiliumError
from common.utils.hash_chain import GENESIS_HASH
from common.utils.node_keys import extract_public_key, key_fingerprint
from common.utils.tls_checks import check_clock_skew, check_expiry, https_client, read_certificate_expiry

MIN_FREE_BYTES = 20e9  # bytes of disk: slices of some ten thousand scans
CRITICAL_FREE_BYTES = MIN_FREE_BYTES / 20
MIN_FREE_GPU_BYTES = 4e9
CERTIFICATE_WARNING_DAYS = 30


class HealthResponse(NamedTuple):
    """What the coordinator's health page says."""

    status_code: int
    certificate_expires_at: datetime
    date: str  # the `date` header; empty without one


def run_checks(site_file: Path, coordinator: str, ca_file: Path, key_file: Path) -> Iterator[CheckResult]:
    """Yield the results of all checks; one that fails does not prevent the next."""
    versions = f"Flower {version('flwr')}, PyTorch {torch.__version__}, our code {fingerprint_code()}"
    yield CheckResult("ok", f"versions: {versions}")
    yield from _check_key(key_file)
    yield from _check_coordinator(coordinator, ca_file)
    try:
        site = parse_site({"site": str(site_file)})
    except ConsiliumError as error:
        yield CheckResult("fault", str(error))
        return
    yield _check_device(site)
    yield from _check_policy(site)
    yield from _check_data(site)
    yield from _check_state(site)


def _check_key(path: Path) -> Iterator[CheckResult]:
    try:
        public_key = extract_public_key(path)
    except (ConsiliumError, OSError) as error:
        remedy = "take it from the kit or make it with `consilium-centre key`, readable for this user"
        yield CheckResult("fault", f"key: {error}", remedy)
        return
    fingerprint = key_fingerprint(public_key)
    yield CheckResult("ok", f"key: {fingerprint}; the coordinator's list must show the same")
    if path.stat().st_mode & 0o077:
        yield CheckResult("warning", f"key: {path} can be read by others", f"chmod 600 {path}")


def _check_coordinator(address: str, ca_file: Path) -> Iterator[CheckResult]:
    """Check certificate, reachability and clock by one request that takes Flower's way, proxy included."""
    if not address:
        remedy = "give --coordinator host:port, or set CONSILIUM_COORDINATOR"
        yield CheckResult("fault", "coordinator: no address", remedy)
        return
    proxy = os.environ.get("HTTPS_PROXY", "")
    route = f" through the proxy {proxy}" if proxy else ""
    try:
        response = _request_health(address, ca_file)
    except (httpx.HTTPError, OSError) as error:
        remedy = "check firewall, proxy (HTTPS_PROXY), name and port"
        if "certificate" in str(error):
            remedy = "the certificate is not from ca.crt, or not for this name: ask the coordinator"
        yield CheckResult("fault", f"coordinator: {address} cannot be reached{route} ({error})", remedy)
        return
    level: CheckLevel = "ok" if response.status_code == 200 else "warning"
    yield CheckResult(level, f"coordinator: {address} answers{route} ({response.status_code})")
    yield check_expiry(
        "coordinator's certificate",
        response.certificate_expires_at,
        CERTIFICATE_WARNING_DAYS,
        "ask the coordinator for a new one",
    )
    if response.date:
        clock_skew = datetime.now(UTC) - parsedate_to_datetime(response.date)
        yield check_clock_skew(clock_skew.total_seconds())


def _request_health(address: str, ca_file: Path) -> HealthResponse:
    with https_client(ca_file) as client, client.stream("GET", f"https://{address}/health") as response:
        expires_at = read_certificate_expiry(response)
        return HealthResponse(response.status_code, expires_at, response.headers.get("date", ""))


def _check_device(site: Site) -> CheckResult:
    try:
        device = site.resolve_device()
    except ConsiliumError as error:
        remedy = "check that the container sees the GPU (NVIDIA container toolkit, compose.gpu.yaml)"
        return CheckResult("fault", f"device: {error}", remedy)
    if device.type != "cuda":
        return CheckResult("ok", f"device: CPU, {len(os.sched_getaffinity(0))} cores")
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    level: CheckLevel = "ok" if free_bytes > MIN_FREE_GPU_BYTES else "warning"
    memory = f"{free_bytes / 2**30:.0f} of {total_bytes / 2**30:.0f} GiB free"
    return CheckResult(level, f"device: {torch.cuda.get_device_name(device)}, {memory}")


def _check_policy(site: Site) -> Iterator[CheckResult]:
    try:
        policy = load_policy(site.policy)
    except ConsiliumError as error:
        yield CheckResult("fault", f"policy: {error}")
        return
    rules = ", ".join(f"{rule} {value}" for rule, value in describe_policy(policy).items())
    fingerprint = fingerprint_code()
    if not site.policy:
        yield CheckResult(
            "warning", "policy: there is none", "set `policy` in site.yaml, and write what may leave"
        )
    elif policy.fingerprints and fingerprint not in policy.fingerprints:
        message = f"policy: it does not allow the code installed here, {fingerprint}"
        yield CheckResult("fault", message, "approve it, or install what is approved")
    else:
        yield CheckResult("ok", f"policy: {rules}")
    for sentence in list_open_rules(policy):
        yield CheckResult("warning", f"policy: {sentence}")
    if policy.require_approval:
        yield _check_approvals(site)


def _check_approvals(site: Site) -> CheckResult:
    today = date.today()
    try:
        approvals = read_approvals(cohort_state_dir(site, Path(site.data)))
    except ConsiliumError as error:
        return CheckResult("fault", f"approvals: {error}")
    states = []
    for approval in approvals.values():
        states.append(f"{approval.recipe} ({approval.digest[:12]}) {approval.describe_state(today)}")
    if not any(approval.is_valid(today) for approval in approvals.values()):
        message = f"approvals: none holds, so no run is taken part in {'; '.join(states)}".rstrip()
        return CheckResult(
            "warning", message, "look at the recipe and approve it: `consilium-centre approve`"
        )
    return CheckResult("ok", f"approvals: {'; '.join(states)}")


def _check_data(site: Site) -> Iterator[CheckResult]:
    if not site.data:
        remedy = "set `data` to a folder with cohort.csv, or to a cohort table"
        yield CheckResult("fault", "data: site.yaml names none", remedy)
        return
    path = Path(site.data)
    try:
        cohort = load_cohort(path, site.centre)
    except (ConsiliumError, OSError) as error:
        yield CheckResult("fault", f"data: {error}")
        return
    splits = ", ".join(f"{count} {split}" for split, count in cohort["split"].value_counts().items())
    num_patients = cohort["patient"].nunique()
    yield CheckResult("ok", f"data: {len(cohort)} scans of {num_patients} patients ({splits})")
    base = path if path.is_dir() else path.parent
    scan_paths = cohort["path"].map(lambda scan_path: base / str(scan_path))
    is_readable = scan_paths.map(lambda scan_path: os.access(scan_path, os.R_OK)).astype(bool)
    unreadable = scan_paths[~is_readable].tolist()
    if unreadable:
        level: CheckLevel = "fault" if len(unreadable) == len(cohort) else "warning"
        message = f"data: {len(unreadable)} of them cannot be read, the first at {unreadable[0]}"
        yield CheckResult(level, message, "mount the folder, readable for this user")


def _check_state(site: Site) -> Iterator[CheckResult]:
    folder = cohort_state_dir(site, Path(site.data))
    probe = folder / ".doctor"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"1")
        probe.unlink()
    except OSError as error:
        remedy = "it must belong to the user of the container"
        yield CheckResult("fault", f"state: {folder} cannot be written ({error.strerror})", remedy)
        return
    yield _check_free_space(folder)
    yield _check_egress_log(folder, outer_anchor(site, Path(site.data)))


def _check_free_space(folder: Path) -> CheckResult:
    free_bytes = shutil.disk_usage(folder).free
    message = f"state: {folder}, {free_bytes / 1e9:.0f} GB free"
    if free_bytes > MIN_FREE_BYTES:
        return CheckResult("ok", message)
    level: CheckLevel = "warning" if free_bytes > CRITICAL_FREE_BYTES else "fault"
    return CheckResult(level, message, "make room: a full disk ends this centre's part in a run")


def _check_egress_log(folder: Path, anchor: Path | None) -> CheckResult:
    if not has_records(folder, anchor):
        return CheckResult(
            "ok", "egress log: none yet; if a message ever left this centre, the log was removed"
        )
    remedy = "compare it with a backup, or accept the loss with `consilium-centre accept-loss`"
    num_lines = 0
    last_hash = GENESIS_HASH
    try:
        for entry in egress_log.read_lines(folder, anchor):
            num_lines += 1
            last_hash = entry.hash
        losses = list_losses(folder, anchor)
    except ConsiliumError as error:
        return CheckResult("fault", f"egress log: {error}", remedy)
    if losses:
        return CheckResult("fault", f"egress log: {'; '.join(losses)}", remedy)
    message = f"egress log: {num_lines} lines, the chain is intact and ends with {last_hash}"
    if anchor is None:
        remedy = "set `anchor` in site.yaml to a folder on another disk than the state folder"
        return CheckResult("warning", f"{message}; nothing outside the state folder remembers it", remedy)
    return CheckResult("ok", message)
