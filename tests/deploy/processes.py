"""A deployed federation as processes of this machine, over TLS and with what `provision` wrote.

SuperLink, SuperExec, nginx where it is installed, and SuperNodes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import yaml
from safetensors.numpy import load_file

from client.site.config import Site
from common.config.compose import compose_config
from server.rounds.run_lifecycle import open_ledger, start_run
from tests.deploy.commands import admit_centres, as_settings, run_centre_command, run_server_command
from tests.deploy.process_group import ProcessGroup, find_free_port, wait_until_healthy
from tests.in_process_federation import InProcess

# Docker's restart policy: again after a wait that doubles, up to a minute.
RESTART_LOOP = 'wait=1; while :; do "$@"; sleep $wait; wait=$((wait < 32 ? 2 * wait : 60)); done'


def start_federation(
    processes: ProcessGroup, centres: list[str], phantom_overrides: list[str], **variables: str
) -> tuple[str, int]:
    """Start a coordinator, and prepare each centre's folder in `hospitals/`, admitted and with phantom scans.

    Returns:
        The operator's address, and the port for the hospitals.
    """
    folder = processes.folder
    port = find_free_port()
    settings = as_settings([*phantom_overrides, f"federation.centres=[{','.join(centres)}]"])
    federation = {"address": f"localhost:{port}", "centres": {name: {"device": "cpu"} for name in centres}}
    (folder / "federation.yaml").write_text(yaml.safe_dump(federation))
    made = folder / "made"
    drawn = run_centre_command("phantom", str(folder / "data"), *settings, "--no-prepare")
    assert drawn.returncode == 0, drawn.stderr
    provisioned = run_server_command("provision", str(folder / "federation.yaml"), "--out", str(made))
    assert provisioned.returncode == 0, provisioned.stderr
    operator = start_coordinator(processes, made, folder / "runs", port, **variables)
    admitted = admit_centres(made, operator)
    assert admitted.returncode == 0, admitted.stderr
    for name in centres:
        unpack_kit(made / "kits" / f"{name}.tar.gz", folder / "hospitals", folder / "data" / name)
    return operator, port


def start_coordinator(processes: ProcessGroup, made: Path, runs: Path, port: int, **variables: str) -> str:
    """Start SuperLink, SuperExec and, where it is installed, nginx on `port`.

    Returns the SuperLink's own address, which is the operator's.
    """
    coordinator = made / "coordinator"
    has_nginx = bool(shutil.which("nginx"))
    superlink_port = find_free_port() if has_nginx else port
    start_superlink(processes, made, superlink_port)
    operator = f"localhost:{superlink_port}"
    start_superexec(processes, made, coordinator / "superexec.secret", operator, runs, **variables)
    if has_nginx:
        scratch = processes.folder / "nginx"
        scratch.mkdir()
        text = (coordinator / "nginx.conf").read_text()
        text = text.replace("superlink:8000", f"127.0.0.1:{superlink_port}")
        text = text.replace("8443", f"127.0.0.1:{port}").replace("/tmp/", f"{scratch}/")
        (coordinator / "nginx.here").write_text(text)
        start_nginx(processes, made, port)
    return operator


def start_superlink(processes: ProcessGroup, made: Path, port: int) -> None:
    """Start the SuperLink with its database in the group's folder, and wait until it answers."""
    coordinator = made / "coordinator"
    processes.start(
        "superlink",
        "flower-superlink",
        f"--ssl-certfile={coordinator / 'server.crt'}",
        f"--ssl-keyfile={coordinator / 'server.key'}",
        f"--ssl-ca-certfile={coordinator / 'ca.crt'}",
        "--enable-supernode-auth",
        f"--database={processes.folder / 'state.db'}",
        "--host=127.0.0.1",
        f"--port={port}",
        "--disable-runtime-dependency-installation",
        "--isolation=process",
        f"--superexec-auth-secret-file={coordinator / 'superexec.secret'}",
    )
    wait_until_healthy(f"https://localhost:{port}/health", made, processes, "superlink")


def start_nginx(processes: ProcessGroup, made: Path, port: int, waits: bool = True) -> None:
    """Start nginx, and wait until it answers unless told otherwise."""
    # As root, nginx would give its workers the user nobody, who may not read this folder.
    user = "user root; " if os.getuid() == 0 else ""
    configuration = made / "coordinator" / "nginx.here"
    processes.start("nginx", "nginx", "-c", str(configuration), "-g", f"{user}daemon off;")
    if waits:
        wait_until_healthy(f"https://localhost:{port}/health", made, processes, "nginx")


def start_superexec(
    processes: ProcessGroup,
    made: Path,
    secret: Path,
    address: str,
    runs: Path,
    name: str = "superexec",
    **variables: str,
) -> None:
    """Start a SuperExec that identifies itself by a file with a secret."""
    processes.start(
        name,
        "flower-superexec",
        f"--runtime-api-address={address}",
        f"--root-certificates={made / 'ca.crt'}",
        f"--superexec-auth-secret-file={secret}",
        CONSILIUM_RUNS=str(runs),
        **variables,
    )


def unpack_kit(kit: Path, hospitals: Path, data: Path) -> Path:
    """Unpack a kit as a hospital's folder, and set its paths to where this hospital has its data."""
    with tarfile.open(kit) as bundle:
        bundle.extractall(hospitals, filter="data")
    folder = hospitals / kit.name.removesuffix(".tar.gz")
    site = yaml.safe_load((folder / "site.yaml").read_text())
    local_settings = {
        "data": str(data),
        "state": str(folder / "state"),
        "anchor": str(folder / "anchor"),
        "device": "cpu",
        "policy": str(folder / "policy.yaml"),
        "threads": 1,
    }
    (folder / "anchor").mkdir(exist_ok=True)
    (folder / "site.yaml").write_text(yaml.safe_dump(site | local_settings))
    policy = yaml.safe_load((folder / "policy.yaml").read_text())
    allows_any_recipe = {"require_approval": False}  # approvals: tests/client/site/test_approvals.py
    (folder / "policy.yaml").write_text(yaml.safe_dump(policy | allows_any_recipe))
    return folder


def start_centre(
    processes: ProcessGroup,
    folder: Path,
    address: str,
    key: Path | None = None,
    name: str = "",
    restarts: bool = False,
    **variables: str,
) -> subprocess.Popen[bytes]:
    """Start a SuperNode from an unpacked kit, as deploy/compose.centre.yaml does.

    Args:
        processes: to which it is added, under `name` or the folder's name.
        folder: of the hospital.
        address: where the coordinator is, host:port.
        key: private key; None: the kit's.
        name: of the process.
        restarts: whether it is started again when it ends, as Docker's restart policy does.
        variables: added to its environment.
    """
    wrapper: list[str] = []
    if restarts:
        warm_script = Path(__file__).with_name("warm.py")
        warm_start = f"test -e bin/image.py && rm -f warm.sock && python {warm_script} & "
        wrapper = ["sh", "-c", warm_start + RESTART_LOOP, "restart"]
    return processes.start(
        name or folder.name,
        *wrapper,
        "flower-supernode",
        f"--superlink={address}",
        f"--root-certificates={folder / 'ca.crt'}",
        f"--auth-supernode-private-key={key or folder / 'key'}",
        f'--node-config=site="{folder / "site.yaml"}"',
        f"--port={find_free_port()}",
        **variables,
    )


def assert_same_as_simulated(
    model: Path, overrides: list[str], data: Path, policies: list[Path], folder: Path
) -> None:
    """Compare a deployed run's weights with those of the same run in this process.

    The hospitals' policies count, because they coarsen small counts.
    """
    sites = []
    for index, policy in enumerate(policies):
        sites.append(Site(index=index, threads=1, device="cpu", policy=str(policy)))
    config = compose_config(["recipe=multisource", *overrides, f"federation.data_root={data}"])
    start_run(config, InProcess(sites), folder, open_ledger(folder), "simulated")
    simulated = load_file(folder / "simulated" / "model.safetensors")
    for name, tensor in load_file(model).items():
        np.testing.assert_allclose(tensor, simulated[name], rtol=1e-5, atol=1e-6, err_msg=name)
