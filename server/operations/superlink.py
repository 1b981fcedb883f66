"""Operate a deployed SuperLink over TLS: which centres it admits, and runs on real hospitals."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import httpx
from cryptography import x509
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, UnregisterNodeRequest
from flwr.proto.node_pb2 import NodeInfo
from flwr.supercore.control.control_http_client import ControlHttpClient

from common.utils.errors import ConsiliumError
from common.utils.node_keys import read_public_key, to_pem
from common.utils.tls_checks import https_client, read_certificate_expiry
from server.monitoring.health import SuperLinkNode
from server.operations.local_superlink import QUIET_ENVIRONMENT, SuperLinkAccess, tool_search_path
from server.operations.provision import REVOKED_SUFFIX
from server.operations.submission import Submission, submit_run
from server.run.outcome import record_failure

SUPERLINK_TIMEOUT = 900  # seconds that a followed run's SuperLink may be away


def sync_nodes(centres: Path, address: str, authority: Path) -> Iterator[str]:
    """Make the SuperLink admit exactly the public keys in the folder `centres`; yields what was changed.

    Raises:
        ConsiliumError: there is no key, two centres have one, or the SuperLink cannot be reached.
    """
    enrolled = read_enrolled_keys(centres)
    with connect_control_api(address, authority) as client:
        registered = {node.public_key: node for node in list_node_infos(client)}
        for public_key, centre in enrolled.items():
            if public_key not in registered:
                request = RegisterNodeRequest(public_key=public_key, name=centre)
                yield f"{centre}: admitted, as node {client.RegisterNode(request).node_id}"
        for public_key, node in registered.items():
            if public_key not in enrolled:
                client.UnregisterNode(UnregisterNodeRequest(node_id=node.node_id))
                yield f"{node.name or node.node_id}: access revoked"


def read_enrolled_keys(centres: Path) -> dict[bytes, str]:
    """Return {public key: centre} of a folder; {} where all its keys were revoked.

    Raises:
        ConsiliumError: two centres have one key, or the folder holds no key and none was ever revoked in it:
        it is the wrong one, and all centres would lose their access.
    """
    enrolled: dict[bytes, str] = {}
    for path in sorted(centres.glob("*.pub")):
        public_key = to_pem(read_public_key(path))
        if public_key in enrolled:
            raise ConsiliumError(
                f"{enrolled[public_key]} and {path.stem} have one key; revoke both, and give each a new one"
            )
        enrolled[public_key] = path.stem
    if not enrolled and not any(centres.glob(f"*{REVOKED_SUFFIX}")):
        raise ConsiliumError(
            f"{centres} holds no centre's public key; `consilium-server provision` writes them to "
            "coordinator/centres"
        )
    return enrolled


@contextlib.contextmanager
def connect_control_api(address: str, authority: Path) -> Iterator[ControlHttpClient]:
    """Connect to the SuperLink's Control API.

    Raises:
        ConsiliumError: it cannot be reached, or refuses a request.
    """
    try:
        client = ControlHttpClient.from_server_address(address, False, authority.read_bytes(), [])
        yield client
        client.close()
    except httpx.HTTPStatusError as error:
        response = f"{error.response.status_code} {error.response.text[:200]}"
        raise ConsiliumError(f"the SuperLink at {address} refused the request ({response})") from error
    except (httpx.HTTPError, OSError) as error:
        raise ConsiliumError(
            f"the SuperLink at {address} cannot be reached with {authority} ({error}); check that it is "
            "running"
        ) from error


def list_node_infos(client: ControlHttpClient) -> list[NodeInfo]:
    """Return the nodes that the SuperLink admits."""
    nodes = client.ListNodes(ListNodesRequest()).nodes_info
    return [node for node in nodes if node.status != "unregistered"]


def list_nodes(address: str, authority: Path) -> list[SuperLinkNode]:
    """Return the centres that the SuperLink knows. Raises ConsiliumError."""
    with connect_control_api(address, authority) as client:
        return [to_node(node) for node in list_node_infos(client)]


def read_certificate_expiries(address: str, authority: Path) -> dict[str, datetime]:
    """Return when the certificates expire: `authority`, which every centre trusts, and `coordinator`.

    One that cannot be read or reached is left out; `list_nodes` reports why.
    """
    expiries: dict[str, datetime] = {}
    with contextlib.suppress(httpx.HTTPError, OSError, ValueError):
        expiries["authority"] = x509.load_pem_x509_certificate(authority.read_bytes()).not_valid_after_utc
        with https_client(authority) as client, client.stream("GET", f"https://{address}/health") as response:
            expiries["coordinator"] = read_certificate_expiry(response)
    return expiries


def to_node(node: NodeInfo) -> SuperLinkNode:
    """Return what the SuperLink says of a node."""
    is_online = node.status == "online"
    changed_at = node.last_activated_at if is_online else node.last_deactivated_at
    status_since = datetime.fromisoformat(changed_at).astimezone(UTC) if changed_at else None
    last_seen = None
    if node.online_until:
        # A heartbeat is valid until a later time; one that has expired says when it did.
        last_seen = min(datetime.now(UTC), datetime.fromtimestamp(node.online_until, UTC))
    return SuperLinkNode(node.name or str(node.node_id), is_online, status_since, last_seen)


def run_on_superlink(submission: Submission, address: str, authority: Path) -> Path:
    """Start or resume a run on the centres and follow it to its end.

    An interrupted command leaves it running.

    Raises:
        ConsiliumError: the run did not finish.
    """
    with (
        record_failure(submission.runs_dir, submission.run_id),
        superlink_environment(address, authority) as access,
    ):
        return submit_run(submission, access, [], SUPERLINK_TIMEOUT)


@contextlib.contextmanager
def superlink_environment(address: str, authority: Path) -> Iterator[SuperLinkAccess]:
    """Prepare a folder and environment from which Flower's commands reach the SuperLink."""
    with tempfile.TemporaryDirectory(prefix="consilium-") as home:
        connection = f'address = "{address}"\nroot-certificates = "{authority.resolve()}"\n'
        config = f'[superlink]\ndefault = "local"\n\n[superlink.local]\n{connection}'
        (Path(home) / "config.toml").write_text(config)
        own_settings = {"FLWR_HOME": home, "PATH": tool_search_path()}
        yield SuperLinkAccess(Path(home), os.environ | QUIET_ENVIRONMENT | own_settings)
