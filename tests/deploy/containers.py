"""A deployed federation as containers: the images, the coordinator's Compose stack, hospitals by their kits' own `./start`, one network each.

Docker with its Compose plugin or podman with podman-compose, whichever `./start` of a kit would take too. What `build` needs on this machine besides
(an inspected TLS, a network, no pulling) stands in $CONSILIUM_BUILD.
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
from typing import Any

import yaml

from tests.deploy.processes import ROOT, free_port

CENTRE_IMAGE, SERVER_IMAGE = "consilium-centre:deploy-test", "consilium-coordinator:deploy-test"
HOST = "coordinator.test"  # the name by which hospitals reach the proxy
STACK = "consilium-test"  # all that is made here is called so, and the hospitals' parts STACK-CENTRE


@functools.cache
def tools() -> tuple[str, list[str], str]:
    """(engine, compose command, why there is none)."""
    if works("docker", "compose", "version") and works("docker", "info"):
        return "docker", ["docker", "compose"], ""
    if works("podman", "info") and works("podman-compose", "version"):
        return "podman", ["podman-compose"], ""
    return "", [], "neither Docker with Compose nor podman with podman-compose works here"


def works(*command: str) -> bool:
    return bool(shutil.which(command[0])) and subprocess.run(command, capture_output=True).returncode == 0


def engine(*arguments: str, check: bool = True, timeout: float = 600) -> str:
    """Docker or podman to its end; returns what it printed. Raises AssertionError with what it said."""
    return said([tools()[0], *arguments], check, timeout)


def compose(folder: Path, *arguments: str, check: bool = True, timeout: float = 600) -> str:
    """The Compose project in a folder, called as its .env says."""
    return said([*tools()[1], *arguments], check, timeout, folder)


def said(
    command: list[str], check: bool = True, timeout: float = 600, folder: Path = ROOT, both: bool = False
) -> str:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=timeout, cwd=folder
    )
    assert done.returncode == 0 or not check, (
        f"{shlex.join(command)}: exit status {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-5000:]}"
    )
    return done.stdout + (done.stderr if both else "")


def build(image: str, dockerfile: Path, context: Path = ROOT, *options: str) -> float:
    """Returns the seconds it took. Raises AssertionError."""
    began = time.monotonic()
    engine(
        "build",
        *shlex.split(os.environ.get("CONSILIUM_BUILD", "")),
        *options,
        "-f",
        str(dockerfile),
        "-t",
        image,
        str(context),
        timeout=3600,
    )
    return time.monotonic() - began


def bought(name: str, part: str) -> str:
    """An image of others: `name`, where it is here or can be pulled; else the same program from Debian's packages."""
    if works(tools()[0], "image", "inspect", name) or works("timeout", "120", tools()[0], "pull", name):
        return name
    build(
        f"{STACK}-{part}",
        ROOT / "tests/deploy/standins/Dockerfile",
        ROOT / "tests/deploy/standins",
        "--target",
        part,
    )
    return f"{STACK}-{part}"


def container(project: str, service: str) -> str:
    """The one container of a service: its id."""
    labels = [
        f"--filter=label=com.docker.compose.{k}={v}" for k, v in (("project", project), ("service", service))
    ]
    found = engine("ps", "-aq", "--no-trunc", *labels).split()
    assert len(found) == 1, f"{project}/{service}: {found}\n{engine('ps', '-a')}"
    return found[0]


def inspect(name: str) -> dict[str, Any]:
    return json.loads(engine("inspect", name))[0]  # type: ignore[no-any-return]


def python(name: str, code: str, check: bool = True) -> str:
    """Python's output inside a running container."""
    return engine("exec", name, "python", "-c", code, check=check, timeout=120)


def healthy(name: str) -> bool:
    """The image's HEALTHCHECK: Docker runs it by itself, podman only where there is systemd, so there it is run now."""
    if tools()[0] == "podman":
        return works("podman", "healthcheck", "run", name)
    return inspect(name)["State"]["Health"]["Status"] == "healthy"  # type: ignore[no-any-return]


def settle(file: Path, **values: object) -> None:
    """Lines NAME=value of an .env file, as a person would edit them."""
    kept = [line for line in file.read_text().splitlines() if line.partition("=")[0] not in values]
    file.write_text("\n".join([*kept, *(f"{name}={value}" for name, value in values.items()), ""]))


def start_coordinator(coordinator: Path, port: int, proxy: str, postgres: str) -> None:
    """The stack from what `provision` made, with what an operator would change: images, ports, owner."""
    owner = (os.getuid(), os.getgid()) if os.getuid() else (10001, 10001)
    settle(
        coordinator / ".env",
        CONSILIUM_SERVER_IMAGE=SERVER_IMAGE,
        CONSILIUM_PROXY_IMAGE=proxy,
        CONSILIUM_POSTGRES_IMAGE=postgres,
        CONSILIUM_PORT=port,
        CONSILIUM_OPERATOR_PORT=free_port(),
        CONSILIUM_CONSOLE_PORT=free_port(),
        CONSILIUM_USER=f"{owner[0]}:{owner[1]}",
        COMPOSE_PROJECT_NAME=STACK,
    )
    for path in [coordinator, *coordinator.rglob("*")]:
        os.chown(path, *owner)
    compose(coordinator, "up", "-d")


def start_centre(kit: Path, hospitals: Path) -> Path:
    """A hospital: the kit unpacked and started, on a network of its own from which only the coordinator's proxy can be reached."""
    with tarfile.open(kit) as bundle:
        bundle.extractall(hospitals, filter="data")
    folder = hospitals / kit.name.removesuffix(".tar.gz")
    with (folder / "site.yaml").open("a") as site:
        site.write("threads: 1\n")
    name = f"{STACK}-{folder.name}"
    engine("network", "create", "--internal", name)
    engine("network", "connect", "--alias", HOST, name, container(STACK, "proxy"))
    (folder / "network.yaml").write_text(
        yaml.safe_dump({"networks": {"default": {"name": name, "external": True}}})
    )
    settle(folder / "settings.env", COMPOSE_FILE="compose.yaml:network.yaml", COMPOSE_PROJECT_NAME=name)
    said(["./start"], folder=folder)
    return folder


def logs() -> str:
    """The ends of all logs, for a failure's message."""
    names = engine("ps", "-a", "--filter", f"name={STACK}", "--format", "{{.Names}}").split()
    return "\n".join(
        f"== {name}\n{said([tools()[0], 'logs', '--tail', '12', name], both=True)}" for name in names
    )


def remove(folders: list[Path]) -> None:
    """All containers, networks and volumes of this test; the images stay, as the next build's cache."""
    for folder in filter(Path.exists, folders):
        compose(folder, "down", "-v", "-t", "5", check=False)
    for kind in ("network", "volume"):
        for name in engine(kind, "ls", "--format", "{{.Name}}").split():
            if name.startswith(STACK):
                engine(kind, "rm", "-f", name, check=False)
