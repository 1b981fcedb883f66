"""A deployed federation as containers: images, the coordinator's Compose stack, hospitals by their kits.

Each hospital is started by its kit's `./start`, on a network of its own. Uses Docker with its Compose
plugin or podman with podman-compose, whichever a kit's `./start` would use too. $CONSILIUM_BUILD holds
further options that `build` needs on this machine, for instance where TLS is inspected.
"""

from __future__ import annotations

import functools
import json
import os
import shlex
import shutil
import subprocess
import tarfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from tests.deploy.process_group import ROOT, find_free_port

CENTRE_IMAGE = "consilium-centre:deploy-test"
SERVER_IMAGE = "consilium-coordinator:deploy-test"
COORDINATOR_HOST = "coordinator.test"  # the name by which hospitals reach the proxy
STACK = "consilium-test"  # prefix of everything that is created here; a hospital's is STACK-CENTRE
NONROOT_USER = (10001, 10001)  # uid and gid in the images


class ContainerTools(NamedTuple):
    """The programs that work on this machine."""

    engine: str
    compose: list[str]
    missing_reason: str = ""  # empty: both work


@functools.cache
def find_tools() -> ContainerTools:
    """Return the container programs, or why there are none."""
    if succeeds("docker", "compose", "version") and succeeds("docker", "info"):
        return ContainerTools("docker", ["docker", "compose"])
    if succeeds("podman", "info") and succeeds("podman-compose", "version"):
        return ContainerTools("podman", ["podman-compose"])
    return ContainerTools("", [], "neither Docker with Compose nor podman with podman-compose works here")


def succeeds(*command: str) -> bool:
    """Return whether a command exists and ends with status 0."""
    if not shutil.which(command[0]):
        return False
    return subprocess.run(command, capture_output=True).returncode == 0


def run_engine(*arguments: str, check: bool = True, timeout: float = 600) -> str:
    """Run Docker or podman and return its output. Raises AssertionError when it fails."""
    return read_output([find_tools().engine, *arguments], check, timeout)


def run_compose(folder: Path, *arguments: str, check: bool = True, timeout: float = 600) -> str:
    """Run Compose on the project in a folder and return its output. Raises AssertionError when it fails."""
    return read_output([*find_tools().compose, *arguments], check, timeout, folder)


def read_output(
    command: list[str],
    check: bool = True,
    timeout: float = 600,
    folder: Path = ROOT,
    with_stderr: bool = False,
) -> str:
    """Run a command in a folder and return what it printed. Raises AssertionError when it fails."""
    result = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, cwd=folder
    )
    if check and result.returncode != 0:
        ends = f"{result.stdout[-3000:]}\n{result.stderr[-5000:]}"
        raise AssertionError(f"{shlex.join(command)}: exit status {result.returncode}\n{ends}")
    return result.stdout + result.stderr if with_stderr else result.stdout


def build_image(name: str, dockerfile: Path, context: Path = ROOT, *options: str) -> float:
    """Build an image and return the seconds it took. Raises AssertionError when it fails."""
    start = time.monotonic()
    machine_options = shlex.split(os.environ.get("CONSILIUM_BUILD", ""))
    files = ("-f", str(dockerfile), "-t", name, str(context))
    run_engine("build", *machine_options, *options, *files, timeout=3600)
    return time.monotonic() - start


def find_or_build_image(name: str, service: str) -> str:
    """Return the image `name` if it is here or can be pulled, or else one of Debian's packages."""
    engine = find_tools().engine
    if succeeds(engine, "image", "inspect", name) or succeeds("timeout", "120", engine, "pull", name):
        return name
    standin = f"{STACK}-{service}"
    folder = ROOT / "tests/deploy/standins"
    build_image(standin, folder / "Dockerfile", folder, "--target", service)
    return standin


def find_container(project: str, service: str) -> str:
    """Return the id of a service's only container."""
    filters = [
        f"--filter=label=com.docker.compose.project={project}",
        f"--filter=label=com.docker.compose.service={service}",
    ]
    ids = run_engine("ps", "-aq", "--no-trunc", *filters).split()
    assert len(ids) == 1, f"{project}/{service}: {ids}\n{run_engine('ps', '-a')}"
    return ids[0]


def inspect(name: str) -> dict[str, Any]:
    """Return what the engine knows about a container or an image."""
    return json.loads(run_engine("inspect", name))[0]  # type: ignore[no-any-return]


def list_networks(name: str) -> dict[str, dict[str, Any]]:
    """Return {network: a container's settings in it}."""
    networks: dict[str, dict[str, Any]] = inspect(name)["NetworkSettings"]["Networks"]
    return networks


def run_python(name: str, code: str, check: bool = True) -> str:
    """Run Python code inside a running container and return its output."""
    return run_engine("exec", name, "python", "-c", code, check=check, timeout=120)


def is_healthy(name: str) -> bool:
    """Return whether the image's HEALTHCHECK passes.

    Docker runs it by itself. podman does so only where there is systemd, so there it is run now.
    """
    if find_tools().engine == "podman":
        return succeeds("podman", "healthcheck", "run", name)
    return inspect(name)["State"]["Health"]["Status"] == "healthy"  # type: ignore[no-any-return]


def read_env(path: Path) -> dict[str, str]:
    """Return the settings of an .env file."""
    return dict(line.split("=", 1) for line in path.read_text().splitlines() if "=" in line)


def edit_env(path: Path, **values: object) -> None:
    """Set variables in an .env file."""
    lines = []
    for line in path.read_text().splitlines():
        if line.partition("=")[0] not in values:
            lines.append(line)
    lines += [f"{name}={value}" for name, value in values.items()]
    path.write_text("\n".join([*lines, ""]))


def start_coordinator(coordinator: Path, port: int, proxy: str, postgres: str) -> None:
    """Start the stack that `provision` wrote, with the settings that an operator would change."""
    uid, gid = (os.getuid(), os.getgid()) if os.getuid() else NONROOT_USER
    edit_env(
        coordinator / ".env",
        CONSILIUM_SERVER_IMAGE=SERVER_IMAGE,
        CONSILIUM_PROXY_IMAGE=proxy,
        CONSILIUM_POSTGRES_IMAGE=postgres,
        CONSILIUM_PORT=port,
        CONSILIUM_OPERATOR_PORT=find_free_port(),
        CONSILIUM_CONSOLE_PORT=find_free_port(),
        CONSILIUM_USER=f"{uid}:{gid}",
        COMPOSE_PROJECT_NAME=STACK,
    )
    for path in [coordinator, *coordinator.rglob("*")]:
        os.chown(path, uid, gid)
    run_compose(coordinator, "up", "-d")


def start_centre(kit: Path, hospitals: Path) -> Path:
    """Unpack a hospital's kit and start it; returns its folder.

    From its network only the coordinator's proxy can be reached.
    """
    with tarfile.open(kit) as bundle:
        bundle.extractall(hospitals, filter="data")
    folder = hospitals / kit.name.removesuffix(".tar.gz")
    policy = (folder / "policy.yaml").read_text()  # approvals: tests/client/site/test_approvals.py
    (folder / "policy.yaml").write_text(policy.replace("require_approval: true", "require_approval: false"))
    with (folder / "site.yaml").open("a") as site:
        site.write("threads: 1\n")
    name = f"{STACK}-{folder.name}"
    run_engine("network", "create", "--internal", name)
    proxy = find_container(STACK, "proxy")
    run_engine("network", "connect", "--alias", COORDINATOR_HOST, name, proxy)
    network = {"networks": {"default": {"name": name, "external": True}}}
    (folder / "network.yaml").write_text(yaml.safe_dump(network))
    compose_files = "compose.yaml:network.yaml"
    edit_env(folder / "settings.env", COMPOSE_FILE=compose_files, COMPOSE_PROJECT_NAME=name)
    read_output(["./start"], folder=folder)
    return folder


def read_log(name: str, *options: str) -> str:
    """Return a container's log."""
    return read_output([find_tools().engine, "logs", *options, name], with_stderr=True)


def read_log_ends() -> str:
    """Return the ends of all logs, for a failure's message."""
    names = run_engine("ps", "-a", "--filter", f"name={STACK}", "--format", "{{.Names}}").split()
    return "\n".join(f"== {name}\n{read_log(name, '--tail', '12')}" for name in names)


def remove_all(folders: list[Path]) -> None:
    """Remove all containers, networks and volumes of this test.

    The images stay, as the next build's cache.
    """
    for folder in folders:
        if folder.exists():
            run_compose(folder, "down", "-v", "-t", "5", check=False)
    for kind in ("network", "volume"):
        for name in run_engine(kind, "ls", "--format", "{{.Name}}").split():
            if name.startswith(STACK):
                run_engine(kind, "rm", "-f", name, check=False)
