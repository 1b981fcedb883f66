"""The federation of containers that tests/deploy/test_containers.py examines."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.deploy.commands import as_settings, run_centre_command, run_server_command
from tests.deploy.containers import (
    CENTRE_IMAGE,
    COORDINATOR_HOST,
    SERVER_IMAGE,
    STACK,
    build_image,
    find_container,
    find_or_build_image,
    find_tools,
    inspect,
    is_healthy,
    read_env,
    read_log_ends,
    remove_all,
    run_compose,
    start_centre,
    start_coordinator,
)
from tests.deploy.process_group import ROOT, find_free_port, wait_until

CENTRES = ["north", "east", "south", "west"]
SERVICES = ["superlink", "superexec", "dashboard", "postgres"]  # those with a HEALTHCHECK
OWN_SERVICES = ("superlink", "superexec", "dashboard")  # those of our images
PHANTOM = [
    "federation.phantom.scale=0.03",
    "federation.phantom.num_slices=12",
    "federation.phantom.image_size=64",
    "preprocess.image_size=32",
]


@pytest.fixture(scope="module")
def images() -> dict[str, str]:
    """Build our images; return {service: image} of the proxy and the database, found or built."""
    if find_tools().missing_reason:
        pytest.skip(find_tools().missing_reason)
    for name, image in (("client", CENTRE_IMAGE), ("server", SERVER_IMAGE)):
        seconds = build_image(image, ROOT / "deploy" / f"{name}.Dockerfile")
        print(f"{image}: {int(inspect(image)['Size']) / 1e9:.2f} GB, built in {seconds:.0f} s")
    settings = read_env(ROOT / "deploy/coordinator.env")
    found = {}
    for service in ("proxy", "postgres"):
        found[service] = find_or_build_image(settings[f"CONSILIUM_{service.upper()}_IMAGE"], service)
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four hospitals' scans as DICOM, each with its cohort.csv."""
    folder = tmp_path_factory.mktemp("data")
    drawn = run_centre_command("phantom", str(folder), *as_settings(PHANTOM), "--no-prepare")
    assert drawn.returncode == 0, drawn.stderr
    return folder


@pytest.fixture(scope="module")
def federation(
    tmp_path_factory: pytest.TempPathFactory, images: dict[str, str], data: Path
) -> Iterator[Path]:
    """A running federation: a folder with `made` from provisioning, and the unpacked kits in `hospitals`."""
    folder = tmp_path_factory.mktemp("containers")
    centres = {}
    for name in CENTRES:
        state = folder / "hospitals" / name / "state"
        centres[name] = {"device": "cpu", "data": str(data / name), "state": str(state)}
    content = {"address": f"{COORDINATOR_HOST}:8443", "image": CENTRE_IMAGE, "centres": centres}
    (folder / "federation.yaml").write_text(yaml.safe_dump(content))
    provisioned = run_server_command(
        "provision", str(folder / "federation.yaml"), "--out", str(folder / "made")
    )
    assert provisioned.returncode == 0, provisioned.stderr
    coordinator = folder / "made" / "coordinator"
    remove_all([])
    try:
        start_coordinator(coordinator, find_free_port(), **images)
        wait_until("the stack is healthy", 300, lambda: all(map(is_healthy, list_stack_containers(SERVICES))))
        admitted = run_compose(coordinator, "exec", "-T", "superexec", "consilium-server", "admit")
        assert admitted.count("admitted, as node") == 4, admitted
        for name in CENTRES:
            start_centre(folder / "made" / "kits" / f"{name}.tar.gz", folder / "hospitals")
        hospitals = [find_hospital(name) for name in CENTRES]
        wait_until("the hospitals are healthy", 300, lambda: all(map(is_healthy, hospitals)))
        yield folder
    except AssertionError as error:
        raise AssertionError(f"{error}\n{read_log_ends()}") from error
    finally:
        remove_all([coordinator, *(folder / "hospitals" / name for name in CENTRES)])


def find_hospital(name: str) -> str:
    """Return a hospital's container."""
    return find_container(f"{STACK}-{name}", "centre")


def list_stack_containers(services: list[str] | tuple[str, ...]) -> list[str]:
    """Return the containers of the coordinator's services."""
    return [find_container(STACK, service) for service in services]
