"""The operator's hand on a deployed SuperLink: which centres it knows, and a run on real hospitals. Everything goes over TLS to its Control API."""

from __future__ import annotations

import contextlib
import os
import sys
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
from server.operations.simulation import QUIET_ENVIRONMENT, resolve_run_settings, submit_run
from server.rounds.run_lifecycle import resolve_runs_dir


def sync_nodes(centres: Path, address: str, authority: Path) -> Iterator[str]:
    """Make the SuperLink's list of nodes equal to the public keys in the folder `centres`; yields what was changed. Raises ConsiliumError."""
    wanted = {to_pem(read_public_key(path)): path.stem for path in sorted(centres.glob("*.pub"))}
    if not wanted:
        raise ConsiliumError(
            f"{centres} holds no public key of a centre; `consilium-server provision` writes them to coordinator/centres"
        )
    with connect_control_api(address, authority) as client:
        known = {node.public_key: node for node in list_node_infos(client)}
        for public, centre in wanted.items():
            if public not in known:
                node = client.RegisterNode(RegisterNodeRequest(public_key=public, name=centre)).node_id
                yield f"{centre}: let in, as node {node}"
        for public, node in known.items():
            if public not in wanted:
                client.UnregisterNode(UnregisterNodeRequest(node_id=node.node_id))
                yield f"{node.name or node.node_id}: let in no more"


@contextlib.contextmanager
def connect_control_api(address: str, authority: Path) -> Iterator[ControlHttpClient]:
    """The SuperLink's Control API. Raises ConsiliumError where it cannot be reached, or refuses what is asked."""
    try:
        client = ControlHttpClient.from_server_address(address, False, authority.read_bytes(), [])
        yield client
        client.close()
    except httpx.HTTPStatusError as error:
        raise ConsiliumError(
            f"the SuperLink at {address} refused ({error.response.status_code} {error.response.text[:200]})"
        ) from error
    except (httpx.HTTPError, OSError) as error:
        raise ConsiliumError(
            f"the SuperLink at {address} cannot be reached with {authority} ({error}); is it running?"
        ) from error


def list_node_infos(client: ControlHttpClient) -> list[NodeInfo]:
    """The nodes that it lets in."""
    return [node for node in client.ListNodes(ListNodesRequest()).nodes_info if node.status != "unregistered"]


def list_nodes(address: str, authority: Path) -> list[SuperLinkNode]:
    """The centres that the SuperLink knows. Raises ConsiliumError."""
    with connect_control_api(address, authority) as client:
        return [to_node(node) for node in list_node_infos(client)]


def read_certificate_expiries(address: str, authority: Path) -> dict[str, datetime]:
    """{"authority", "coordinator": when it expires}: what every centre trusts, and what the server at `address` shows them."""
    found: dict[str, datetime] = {}
    with contextlib.suppress(
        httpx.HTTPError, OSError, ValueError
    ):  # that it cannot be read or reached is told by `nodes`
        found["authority"] = x509.load_pem_x509_certificate(authority.read_bytes()).not_valid_after_utc
        with https_client(authority) as client, client.stream("GET", f"https://{address}/health") as answer:
            found["coordinator"] = read_certificate_expiry(answer)
    return found


def to_node(node: NodeInfo) -> SuperLinkNode:
    """What the SuperLink says of a node."""
    online = node.status == "online"
    since = node.last_activated_at if online else node.last_deactivated_at
    now = datetime.now(UTC)
    # A heartbeat is good until some later time: one that has come to an end says when it did.
    seen = min(now, datetime.fromtimestamp(node.online_until, UTC)) if node.online_until else None
    return SuperLinkNode(
        node.name or str(node.node_id),
        online,
        datetime.fromisoformat(since).astimezone(UTC) if since else None,
        seen,
    )


def run_on_superlink(
    recipe: str,
    overrides: list[str],
    address: str,
    authority: Path,
    runs: str = "",
    resume_id: str = "",
    run_id: str = "",
) -> Path:
    """Start or resume a run on the centres and follow it to its end; an interrupted command leaves the run going. Raises ConsiliumError."""
    folder = resolve_runs_dir(runs)
    config, settings = resolve_run_settings(recipe, overrides, folder, resume_id, run_id)
    with superlink_environment(address, authority) as (home, environment):
        return submit_run(config, settings, folder, home, environment, [], superlink_timeout=900)


@contextlib.contextmanager
def superlink_environment(address: str, authority: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """A home for Flower's command that reaches the SuperLink; yields the folder and the environment."""
    with tempfile.TemporaryDirectory(prefix="consilium-") as home:
        connection = f'address = "{address}"\nroot-certificates = "{authority.resolve()}"\n'
        (Path(home) / "config.toml").write_text(
            f'[superlink]\ndefault = "local"\n\n[superlink.local]\n{connection}'
        )
        yield (
            Path(home),
            os.environ
            | QUIET_ENVIRONMENT
            | {"FLWR_HOME": home, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        )
