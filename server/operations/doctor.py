"""`consilium-server doctor`: at the coordinator, whatever would stop a run, found before it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import httpx

from common.protocol.code_fingerprint import fingerprint_code
from common.utils.checks import CheckLevel, CheckResult
from common.utils.errors import ConsiliumError
from common.utils.node_keys import key_fingerprint, read_public_key, to_pem
from common.utils.tls_checks import check_expiry, https_client, read_certificate_expiry
from server.operations.superlink import connect_control_api, list_node_infos
from server.rounds.run_lifecycle import open_ledger

INTERNAL_PATHS = (
    "/v1/control/list-runs",
    "/v1/runtime/acquire-task",
    "/openapi.json",
)  # what hospitals must not reach


def check_coordinator(
    superlink: str, authority: Path, centres: Path, runs: Path, public_address: str
) -> Iterator[CheckResult]:
    """All checks. `public`: the address that hospitals reach, host:port; empty: not checked."""
    yield CheckResult(
        "ok", f"versions: Flower {version('flwr')}, the code that centres must approve: {fingerprint_code()}"
    )
    yield from _check_endpoint("SuperLink", superlink, authority)
    yield from _check_centres(superlink, authority, centres)
    if public_address:
        yield from _check_endpoint("proxy", public_address, authority)
        yield from _check_proxy(public_address, authority)
    yield from _check_storage(runs)


def _check_endpoint(endpoint: str, address: str, authority: Path) -> Iterator[CheckResult]:
    try:
        with https_client(authority) as client, client.stream("GET", f"https://{address}/health") as answer:
            until, status = read_certificate_expiry(answer), answer.status_code
    except (httpx.HTTPError, OSError) as error:
        remedy = "is it running, and its certificate for this name and by this ca.crt?"
        yield CheckResult("fault", f"{endpoint}: {address} cannot be reached ({error})", remedy)
        return
    yield CheckResult("ok" if status == 200 else "fault", f"{endpoint}: {address} answers ({status})")
    yield check_expiry(
        f"{endpoint}'s certificate", until, 45, "consilium-server provision ... --reissue coordinator"
    )


def _check_centres(superlink: str, authority: Path, centres: Path) -> Iterator[CheckResult]:
    """Each enrolled centre: known to the SuperLink, online?"""
    try:
        with connect_control_api(superlink, authority) as client:
            known = {node.public_key: node for node in list_node_infos(client)}
    except ConsiliumError:
        return  # said already
    for path in sorted(centres.glob("*.pub")):
        try:
            line = read_public_key(path)
        except ConsiliumError as error:
            yield CheckResult("fault", str(error))
            continue
        node = known.pop(to_pem(line), None)
        if node is None:
            yield CheckResult(
                "fault",
                f"{path.stem}: key {key_fingerprint(line)} is not known to the SuperLink",
                "consilium-server admit",
            )
        elif node.status != "online":
            since = f", last seen {node.online_until}" if node.online_until else ", never seen"
            yield CheckResult(
                "warning", f"{path.stem}: {node.status}{since}", "ask the hospital for `./start doctor`"
            )
        else:
            yield CheckResult("ok", f"{path.stem}: online, key {key_fingerprint(line)}")
    for node in known.values():
        yield CheckResult(
            "fault",
            f"node {node.name or node.node_id} is let in, but no public key here is its own",
            "consilium-server admit",
        )


def _check_proxy(public_address: str, authority: Path) -> Iterator[CheckResult]:
    """The Control API knows no passwords: it must not be seen from outside."""
    with https_client(authority) as client:
        try:
            seen = [
                path
                for path in INTERNAL_PATHS
                if client.post(f"https://{public_address}{path}").status_code != 404
            ]
        except (httpx.HTTPError, OSError):
            return  # said already
    if seen:
        remedy = "let hospitals reach nginx with deploy/nginx.conf, never the SuperLink"
        yield CheckResult("fault", f"proxy: {', '.join(seen)} can be reached from outside", remedy)
    else:
        yield CheckResult("ok", "proxy: only the Fleet paths and health can be reached from outside")


def _check_storage(runs: Path) -> Iterator[CheckResult]:
    try:
        runs.mkdir(parents=True, exist_ok=True)
        ledger = open_ledger(runs)
        yield CheckResult("ok", f"ledger: {ledger.address}, {len(list(ledger.read_runs()))} runs")
    except OSError as error:
        yield CheckResult(
            "fault",
            f"results: {runs} cannot be written ({error.strerror})",
            "it must belong to the user of the container",
        )
        return
    except ConsiliumError as error:
        yield CheckResult("fault", f"ledger: {error}")
    free = shutil.disk_usage(runs).free / 1e9
    level: CheckLevel = "ok" if free > 20 else "warning" if free > 2 else "fault"
    yield CheckResult(level, f"results: {runs}, {free:.0f} GB free", "" if level == "ok" else "make room")
