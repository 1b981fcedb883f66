"""Check at the coordinator whatever would stop a run, before it starts (`consilium-server doctor`)."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import httpx

from common.protocol.code_fingerprint import fingerprint_code
from common.utils.checks import CheckResult
from common.utils.errors import ConsiliumError
from common.utils.node_keys import key_fingerprint, read_public_key, to_pem
from common.utils.tls_checks import check_expiry, https_client, read_certificate_expiry
from server.operations.superlink import connect_control_api, list_node_infos
from server.rounds.run_lifecycle import open_ledger

# What hospitals must not reach.
INTERNAL_PATHS = ("/v1/control/list-runs", "/v1/runtime/acquire-task", "/openapi.json")
CERTIFICATE_WARNING_DAYS = 45
ENOUGH_DISK = 20e9  # bytes
LITTLE_DISK = 2e9  # bytes


def check_coordinator(
    superlink: str, authority: Path, centres: Path, runs: Path, public_address: str
) -> Iterator[CheckResult]:
    """Run all checks.

    `centres` is the folder with the enrolled public keys; `public_address` is what hospitals reach,
    host:port, and is not checked where it is empty.
    """
    yield CheckResult(
        "ok", f"versions: Flower {version('flwr')}, the code that centres must approve: {fingerprint_code()}"
    )
    yield from _check_endpoint("SuperLink", superlink, authority)
    yield from _check_centres(superlink, authority, centres)
    if public_address:
        yield from _check_endpoint("proxy", public_address, authority)
        yield from _check_proxy(public_address, authority)
    yield from _check_ledger(runs)
    yield from _check_disk(runs)


def _check_endpoint(endpoint: str, address: str, authority: Path) -> Iterator[CheckResult]:
    try:
        with https_client(authority) as client, client.stream("GET", f"https://{address}/health") as response:
            expires_at = read_certificate_expiry(response)
            status = response.status_code
    except (httpx.HTTPError, OSError) as error:
        remedy = (
            "check that it is running, and that its certificate is for this name and signed by this ca.crt"
        )
        yield CheckResult("fault", f"{endpoint}: {address} cannot be reached ({error})", remedy)
        return
    if status == 200:
        yield CheckResult("ok", f"{endpoint}: {address} answers")
    else:
        yield CheckResult("fault", f"{endpoint}: {address} answers with status {status}", "look at its log")
    yield check_expiry(
        f"{endpoint}'s certificate",
        expires_at,
        CERTIFICATE_WARNING_DAYS,
        "consilium-server provision ... --reissue coordinator",
    )


def _check_centres(superlink: str, authority: Path, centres: Path) -> Iterator[CheckResult]:
    """Check whether each enrolled centre is registered with the SuperLink and online."""
    try:
        with connect_control_api(superlink, authority) as client:
            nodes = {node.public_key: node for node in list_node_infos(client)}
    except ConsiliumError:
        return  # the endpoint's check has reported it
    for path in sorted(centres.glob("*.pub")):
        try:
            public_key = read_public_key(path)
        except ConsiliumError as error:
            yield CheckResult("fault", str(error))
            continue
        node = nodes.pop(to_pem(public_key), None)
        fingerprint = key_fingerprint(public_key)
        if node is None:
            message = f"{path.stem}: key {fingerprint} is not registered with the SuperLink"
            yield CheckResult("fault", message, "consilium-server admit")
        elif node.status == "online":
            yield CheckResult("ok", f"{path.stem}: online, key {fingerprint}")
        else:
            last_seen = f"last seen {node.online_until}" if node.online_until else "never seen"
            message = f"{path.stem}: {node.status}, {last_seen}"
            yield CheckResult("warning", message, "ask the hospital to run `./start doctor`")
    for node in nodes.values():
        message = f"node {node.name or node.node_id} is admitted, but no public key here is its own"
        yield CheckResult("fault", message, "consilium-server admit")


def _check_proxy(public_address: str, authority: Path) -> Iterator[CheckResult]:
    """Check that the Control API, which asks for no password, cannot be reached from outside."""
    reachable = []
    with https_client(authority) as client:
        try:
            for path in INTERNAL_PATHS:
                if client.post(f"https://{public_address}{path}").status_code != 404:
                    reachable.append(path)
        except (httpx.HTTPError, OSError):
            return  # the endpoint's check has reported it
    if reachable:
        message = f"proxy: {', '.join(reachable)} can be reached from outside"
        yield CheckResult(
            "fault", message, "let hospitals reach nginx with deploy/nginx.conf, not the SuperLink"
        )
    else:
        yield CheckResult("ok", "proxy: only the Fleet paths and health can be reached from outside")


def _check_ledger(runs: Path) -> Iterator[CheckResult]:
    try:
        runs.mkdir(parents=True, exist_ok=True)
        ledger = open_ledger(runs)
        yield CheckResult("ok", f"ledger: {ledger.address}, {len(list(ledger.read_runs()))} runs")
    except OSError as error:
        message = f"results: {runs} cannot be written ({error.strerror})"
        yield CheckResult("fault", message, "it must belong to the user of the container")
    except ConsiliumError as error:
        yield CheckResult("fault", f"ledger: {error}")


def _check_disk(runs: Path) -> Iterator[CheckResult]:
    if not runs.exists():
        return  # the ledger's check has reported it
    free = shutil.disk_usage(runs).free
    message = f"results: {runs}, {free / 1e9:.0f} GB free"
    if free > ENOUGH_DISK:
        yield CheckResult("ok", message)
    elif free > LITTLE_DISK:
        yield CheckResult("warning", message, "make room")
    else:
        yield CheckResult("fault", message, "make room")
