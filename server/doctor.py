"""`consilium-server doctor`: at the coordinator, whatever would stop a run, found before it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import httpx

from common.errors import ConsiliumError
from common.findings import Finding, Level
from common.fingerprint import fingerprint
from common.keys import read_public, short, wire_form
from common.reach import certificate_until, expires, trusting
from server.deployed import control, listed
from server.runs import open_ledger

HIDDEN = ("/v1/control/list-runs", "/v1/runtime/acquire-task", "/openapi.json")  # what hospitals must not reach


def examine(superlink: str, authority: Path, centres: Path, runs: Path, public: str) -> Iterator[Finding]:
    """All checks. `public`: the address that hospitals reach, host:port; empty: not checked."""
    yield Finding("ok", f"versions: Flower {version('flwr')}, the code that centres must approve: {fingerprint()}")
    yield from _answers("SuperLink", superlink, authority)
    yield from _centres(superlink, authority, centres)
    if public:
        yield from _answers("proxy", public, authority)
        yield from _proxy(public, authority)
    yield from _ledger(runs)


def _answers(what: str, address: str, authority: Path) -> Iterator[Finding]:
    try:
        with trusting(authority) as client, client.stream("GET", f"https://{address}/health") as answer:
            until, status = certificate_until(answer), answer.status_code
    except (httpx.HTTPError, OSError) as error:
        remedy = "is it running, and its certificate for this name and by this ca.crt?"
        yield Finding("fault", f"{what}: {address} cannot be reached ({error})", remedy)
        return
    yield Finding("ok" if status == 200 else "fault", f"{what}: {address} answers ({status})")
    yield expires(f"{what}'s certificate", until, 45, "consilium-server provision ... --reissue coordinator")


def _centres(superlink: str, authority: Path, centres: Path) -> Iterator[Finding]:
    """Each enrolled centre: known to the SuperLink, online?"""
    try:
        with control(superlink, authority) as client:
            known = {node.public_key: node for node in listed(client)}
    except ConsiliumError:
        return  # said already
    for path in sorted(centres.glob("*.pub")):
        try:
            line = read_public(path)
        except ConsiliumError as error:
            yield Finding("fault", str(error))
            continue
        node = known.pop(wire_form(line), None)
        if node is None:
            yield Finding("fault", f"{path.stem}: key {short(line)} is not known to the SuperLink", "consilium-server admit")
        elif node.status != "online":
            since = f", last seen {node.online_until}" if node.online_until else ", never seen"
            yield Finding("warning", f"{path.stem}: {node.status}{since}", "ask the hospital for `./start doctor`")
        else:
            yield Finding("ok", f"{path.stem}: online, key {short(line)}")
    for node in known.values():
        yield Finding("fault", f"node {node.name or node.node_id} is let in, but no public key here is its own", "consilium-server admit")


def _proxy(public: str, authority: Path) -> Iterator[Finding]:
    """The Control API knows no passwords: it must not be seen from outside."""
    with trusting(authority) as client:
        try:
            seen = [path for path in HIDDEN if client.post(f"https://{public}{path}").status_code != 404]
        except (httpx.HTTPError, OSError):
            return  # said already
    if seen:
        remedy = "let hospitals reach nginx with deploy/nginx.conf, never the SuperLink"
        yield Finding("fault", f"proxy: {', '.join(seen)} can be reached from outside", remedy)
    else:
        yield Finding("ok", "proxy: only the Fleet paths and health can be reached from outside")


def _ledger(runs: Path) -> Iterator[Finding]:
    try:
        runs.mkdir(parents=True, exist_ok=True)
        ledger = open_ledger(runs)
        yield Finding("ok", f"ledger: {ledger.address}, {len(list(ledger.runs()))} runs")
    except OSError as error:
        yield Finding("fault", f"results: {runs} cannot be written ({error.strerror})", "it must belong to the user of the container")
        return
    except ConsiliumError as error:
        yield Finding("fault", f"ledger: {error}")
    free = shutil.disk_usage(runs).free / 1e9
    level: Level = "ok" if free > 20 else "warning" if free > 2 else "fault"
    yield Finding(level, f"results: {runs}, {free:.0f} GB free", "" if level == "ok" else "make room")
