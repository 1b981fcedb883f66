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

from client import egress
from client.cohort import load_cohort
from client.policy import describe, load_policy
from client.site import Site, site_from, state_folder
from common.errors import ConsiliumError
from common.findings import Finding, Level
from common.fingerprint import fingerprint
from common.keys import public_part, short
from common.reach import certificate_until, clock, expires, trusting

FREE = 20e9  # bytes of disk: slices of some ten thousand scans


def examine(site_file: Path, coordinator: str, authority: Path, key: Path) -> Iterator[Finding]:
    """All checks, each a finding or a few; one that fails does not keep the next from being made."""
    yield Finding("ok", f"versions: Flower {version('flwr')}, PyTorch {torch.__version__}, our code {fingerprint()}")
    yield from _key(key)
    yield from _coordinator(coordinator, authority)
    try:
        site = site_from({"site": str(site_file)})
    except ConsiliumError as error:
        yield Finding("fault", str(error))
        return
    yield from _device(site)
    yield from _policy(site)
    yield from _data(site)
    yield from _state(site)


def _key(path: Path) -> Iterator[Finding]:
    try:
        public = public_part(path)
    except (ConsiliumError, OSError) as error:
        yield Finding("fault", f"key: {error}", "it comes with the kit, or from `consilium-centre key`, and is this user's to read")
        return
    yield Finding("ok", f"key: {short(public)}; the coordinator's list must show the same")
    if path.stat().st_mode & 0o077:
        yield Finding("warning", f"key: {path} can be read by others", f"chmod 600 {path}")


def _coordinator(address: str, authority: Path) -> Iterator[Finding]:
    """One request by the way that Flower takes, proxy and all: certificate, reachability, clock."""
    if not address:
        yield Finding("fault", "coordinator: no address", "give --coordinator host:port, or set CONSILIUM_COORDINATOR")
        return
    proxy = f" through the proxy {os.environ['HTTPS_PROXY']}" if os.environ.get("HTTPS_PROXY") else ""
    try:
        with trusting(authority) as client, client.stream("GET", f"https://{address}/health") as answer:
            until, date, status = certificate_until(answer), answer.headers.get("date", ""), answer.status_code
    except (httpx.HTTPError, OSError) as error:
        remedy = "firewall, proxy (HTTPS_PROXY), name, port?"
        if "certificate" in str(error):
            remedy = "the certificate is not from ca.crt, or not for this name: ask the coordinator"
        yield Finding("fault", f"coordinator: {address} cannot be reached{proxy} ({error})", remedy)
        return
    yield Finding("ok" if status == 200 else "warning", f"coordinator: {address} answers{proxy} ({status})")
    yield expires("coordinator's certificate", until, 30, "ask the coordinator for a new one")
    if date:
        yield clock((datetime.now(UTC) - parsedate_to_datetime(date)).total_seconds())


def _device(site: Site) -> Iterator[Finding]:
    try:
        device = site.torch_device()
    except ConsiliumError as error:
        yield Finding("fault", f"device: {error}", "does the container see the GPU (NVIDIA container toolkit, compose.gpu.yaml)?")
        return
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        room = f"{free / 2**30:.0f} of {total / 2**30:.0f} GiB free"
        yield Finding("ok" if free > 4e9 else "warning", f"device: {torch.cuda.get_device_name(device)}, {room}")
    else:
        yield Finding("ok", f"device: CPU, {len(os.sched_getaffinity(0))} cores")


def _policy(site: Site) -> Iterator[Finding]:
    try:
        policy = load_policy(site.policy)
    except ConsiliumError as error:
        yield Finding("fault", f"policy: {error}")
        return
    rules = ", ".join(f"{rule} {value}" for rule, value in describe(policy).items())
    if not rules:
        yield Finding("warning", "policy: it allows everything", "set `policy` in site.yaml, and in that file what may leave")
    elif policy.fingerprints and fingerprint() not in policy.fingerprints:
        unknown = f"policy: it does not allow the code installed here, {fingerprint()}"
        yield Finding("fault", unknown, "approve it, or install what is approved")
    else:
        yield Finding("ok", f"policy: {rules}")


def _data(site: Site) -> Iterator[Finding]:
    if not site.data:
        yield Finding("fault", "data: site.yaml names none", "set `data` to a folder with cohort.csv, or to a cohort table")
        return
    path = Path(site.data)
    try:
        table = load_cohort(path, site.centre)
    except (ConsiliumError, OSError) as error:
        yield Finding("fault", f"data: {error}")
        return
    base = path if path.is_dir() else path.parent
    gone = [scan for scan in table["path"] if not os.access(base / str(scan), os.R_OK)]
    splits = ", ".join(f"{n} {split}" for split, n in table["split"].value_counts().items())
    yield Finding("ok", f"data: {len(table)} scans of {table['patient'].nunique()} patients ({splits})")
    if gone:
        level: Level = "fault" if len(gone) == len(table) else "warning"
        first = f"data: {len(gone)} of them cannot be read, the first at {base / str(gone[0])}"
        yield Finding(level, first, "is the folder mounted, and this user's to read?")


def _state(site: Site) -> Iterator[Finding]:
    folder = state_folder(site, Path(site.data))
    probe = folder / ".doctor"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"1")
        probe.unlink()
    except OSError as error:
        yield Finding("fault", f"state: {folder} cannot be written ({error.strerror})", "it must belong to the user of the container")
        return
    free = shutil.disk_usage(folder).free
    level: Level = "ok" if free > FREE else "warning" if free > FREE / 20 else "fault"
    remedy = "" if level == "ok" else "make room: a full disk ends this centre's part in a run"
    yield Finding(level, f"state: {folder}, {free / 1e9:.0f} GB free", remedy)
    if not (folder / egress.NAME).exists():
        yield Finding("ok", "egress log: none yet; if anything ever left from here, it was removed")
        return
    try:
        yield Finding("ok", f"egress log: {sum(1 for _ in egress.read(folder))} messages, the chain is whole")
    except ConsiliumError as error:
        yield Finding("fault", f"egress log: {error}", "compare it with a back-up")
