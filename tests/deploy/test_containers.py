"""Four hospitals and a coordinator as containers, built from the images to their end.

A run through the proxy gives the simulation's weights. A hospital's container is confined and reaches nothing
but the proxy. Health checks, stopping, and the return of a killed container work.
"""

from __future__ import annotations

import json
import ssl
import time
from pathlib import Path

import httpx
import pytest

from tests.deploy.container_federation import (
    CENTRES,
    OWN_SERVICES,
    SERVICES,
    find_hospital,
    list_stack_containers,
)
from tests.deploy.container_federation import data as data
from tests.deploy.container_federation import federation as federation
from tests.deploy.container_federation import images as images
from tests.deploy.containers import (
    CENTRE_IMAGE,
    COORDINATOR_HOST,
    SERVER_IMAGE,
    STACK,
    find_container,
    inspect,
    list_networks,
    read_env,
    read_log,
    read_output,
    run_compose,
    run_engine,
    run_python,
)
from tests.deploy.process_group import wait_until
from tests.deploy.processes import assert_same_as_simulated

pytestmark = [pytest.mark.slow, pytest.mark.deploy, pytest.mark.containers]
SERVICE_PORTS = {"superlink": (8000, 8081), "superexec": (8081,), "dashboard": (8080,), "postgres": (5432,)}
RUN = [
    "federation=folder",
    f"federation.centres=[{','.join(CENTRES)}]",
    "federation.join_timeout=300",
    "stage.rounds=2",
    "stage.local_epochs=1",
    "stage.batch_size=4",
    "preprocess.image_size=32",
    "evaluation.checkpoint_selection=last",
]
DESCRIBE_PROCESS = """
import json, os
status = dict(line.split(":", 1) for line in open("/proc/self/status"))

def write_error(path):
    try:
        open(path + "/x", "w").close()
        os.unlink(path + "/x")
    except OSError as error:
        return error.strerror

print(json.dumps({
    "uid": os.getuid(),
    "gid": os.getgid(),
    "capabilities": int(status["CapBnd"], 16),
    "no_new_privileges": int(status["NoNewPrivs"]),
    "write_errors": {path: write_error(path) for path in ("/", "/opt/venv", "/opt/consilium", "/tmp")},
}))
"""
CONNECT_TO_ADDRESSES = """
import json, socket

def connection_error(address):
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), 3).close()
        return ""
    except OSError as error:
        return type(error).__name__ + " " + str(error)

print(json.dumps({address: connection_error(address) for address in %r}))
"""
LIST_PACKAGES = """
import json, importlib.metadata as metadata
folder = "/opt/venv/lib/python3.11/site-packages"
installed = {package.name.lower(): package.version for package in metadata.distributions(path=[folder])}
print(json.dumps([json.load(open("/opt/venv/sbom.json")), installed]))
"""
POST_TO_CLOSED_PATHS = f"""
import httpx, ssl
client = httpx.Client(verify=ssl.create_default_context(cafile="/etc/consilium/ca.crt"))
paths = ("/v1/control/list-runs", "/v1/runtime/acquire-task", "/openapi.json")
print([client.post("https://{COORDINATOR_HOST}:8443" + path).status_code for path in paths])
"""
KILL_SUPERNODE = """
import os
for pid in filter(str.isdigit, os.listdir("/proc")):
    if int(pid) not in (1, os.getpid()) and b"flower-supernode" in open(f"/proc/{pid}/cmdline", "rb").read():
        os.kill(int(pid), 9)
"""


@pytest.mark.parametrize("image", [CENTRE_IMAGE, SERVER_IMAGE])
def test_bill_of_materials_lists_every_package(images: dict[str, str], image: str) -> None:
    """It is CycloneDX and has every Python package that is installed in the image, PyTorch included."""
    output = run_engine(
        "run", "--rm", "--network", "none", "--entrypoint", "python", image, "-c", LIST_PACKAGES
    )
    bill, installed = json.loads(output)
    listed = {component["name"].lower(): component["version"] for component in bill["components"]}
    assert bill["bomFormat"] == "CycloneDX"
    assert listed["torch"].startswith("2.")
    assert installed.items() <= listed.items()


def test_containers_are_confined(federation: Path) -> None:
    """Not root, no capabilities and no way to get any, only the tmpfs is writable, no port is published."""
    north = find_hospital("north")
    for name in [north, *list_stack_containers(OWN_SERVICES)]:
        process = json.loads(run_python(name, DESCRIBE_PROCESS))
        assert (process["uid"], process["gid"]) != (0, 0)
        assert process["capabilities"] == 0
        assert process["no_new_privileges"] == 1
        assert process["write_errors"] == {
            "/": "Read-only file system",
            "/opt/venv": "Read-only file system",
            "/opt/consilium": "Read-only file system",
            "/tmp": None,
        }
    for name in [north, *list_stack_containers(["proxy", *SERVICES])]:
        settings = inspect(name)
        assert settings["HostConfig"]["ReadonlyRootfs"] is True
        assert settings["Config"]["User"].split(":")[0] not in ("", "0", "root")
    assert not inspect(north)["HostConfig"]["PortBindings"]


def test_hospital_reaches_only_the_proxy(federation: Path) -> None:
    """Not the other services by any of their addresses or by the host, no other hospital, no internet.

    Of the proxy's paths it reaches only those of the Fleet API.
    """
    north = find_hospital("north")
    closed_addresses = []
    num_networks = []
    for service in SERVICES:
        networks = list_networks(find_container(STACK, service))
        num_networks.append(len(networks))
        for network in networks.values():
            closed_addresses += [f"{network['IPAddress']}:{port}" for port in SERVICE_PORTS[service]]
    assert num_networks == [2, 1, 2, 1]
    east_address = list_networks(find_hospital("east"))[f"{STACK}-east"]["IPAddress"]
    closed_addresses += [
        f"{east_address}:8081",
        f"{COORDINATOR_HOST}:8000",
        f"{COORDINATOR_HOST}:5432",
        "192.0.2.1:443",
        "1.1.1.1:443",
    ]
    gateway = list_networks(north)[f"{STACK}-north"]["Gateway"]
    if gateway:
        operator_port = read_env(federation / "made/coordinator/.env")["CONSILIUM_OPERATOR_PORT"]
        closed_addresses.append(f"{gateway}:{operator_port}")

    proxy = f"{COORDINATOR_HOST}:8443"
    errors = connect_from(north, [proxy, *closed_addresses])
    assert errors.pop(proxy) == ""
    assert all(errors.values()), errors
    # The SuperLink does listen, and there is no route to the internet, rather than an internet that is down.
    assert connect_from(find_container(STACK, "superexec"), ["superlink:8000"]) == {"superlink:8000": ""}
    assert "unreachable" in errors["1.1.1.1:443"]
    assert run_python(north, POST_TO_CLOSED_PATHS).strip() == "[404, 404, 404]"


def connect_from(container: str, addresses: list[str]) -> dict[str, str]:
    """Return {address: why a container cannot connect to it}; empty where it can."""
    errors: dict[str, str] = json.loads(run_python(container, CONNECT_TO_ADDRESSES % addresses))
    return errors


def test_run_gives_the_simulations_weights(federation: Path, data: Path, tmp_path: Path) -> None:
    """The paper's recipe; a hospital's self-check finds no fault, and every egress log names the run."""
    coordinator = federation / "made" / "coordinator"
    north = federation / "hospitals" / "north"
    report = read_output(["./start", "doctor"], folder=north)  # fails where there is a fault
    assert f"coordinator: {COORDINATOR_HOST}:8443 answers" in report
    start = time.monotonic()
    command = ("consilium-server", "run", "--recipe", "multisource", *RUN)
    run_compose(coordinator, "exec", "-T", "superexec", *command, timeout=2400)
    print(f"the run took {time.monotonic() - start:.0f} s")
    superexec = find_container(STACK, "superexec")
    run_dir = run_engine("exec", superexec, "readlink", "-f", "/runs/latest").strip()
    run_engine("cp", f"{superexec}:{run_dir}/.", str(tmp_path / "run"))
    assert json.loads((tmp_path / "run/metrics.json").read_text())["status"] == "finished"
    policies = [federation / "hospitals" / name / "policy.yaml" for name in CENTRES]
    assert_same_as_simulated(tmp_path / "run/model.safetensors", RUN, data, policies, tmp_path)
    for name in CENTRES:
        log = federation / "hospitals" / name / "state" / "egress.jsonl"
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        entries = [line for line in lines if line["run"]]  # the others are no messages
        assert {entry["run"] for entry in entries} == {Path(run_dir).name}
        assert "TrainReply" in {entry["kind"] for entry in entries}
        if name == "north":
            report = read_output(["./start", "egress"], folder=north)
            assert f"{len(entries)} messages left; the chain is intact" in report


def test_console_shows_the_hospitals_and_the_run(federation: Path) -> None:
    """At the operator's loopback, over TLS and after a log-in; who is online is known from the SuperLink."""
    coordinator = federation / "made/coordinator"
    command = ("consilium-server", "account", "add", "anna", "--role", "operator")
    output = run_compose(coordinator, "exec", "-T", "dashboard", *command)
    login = {"name": "anna", "password": output.split("password ")[1].split()[0]}
    port = read_env(coordinator / ".env")["CONSILIUM_CONSOLE_PORT"]
    tls = ssl.create_default_context(cafile=coordinator / "ca.crt")
    with httpx.Client(base_url=f"https://localhost:{port}", verify=tls, timeout=60) as browser:
        assert browser.get("/").headers["location"] == "/login"
        assert browser.post("/login", data=login).status_code == 303
        first_page = " ".join(browser.get("/").text.split())
        assert "4<i> of 4</i>" in first_page
        assert "certificate expires" in first_page
        for name in CENTRES:
            assert f"<span>{name}</span>" in first_page
        assert "finished" in browser.get("/runs").text


def test_killed_supernode_is_restarted_and_admitted_again(federation: Path) -> None:
    """The restart policy starts it; the SuperLink admits it once it has given up the old connection."""
    east = find_hospital("east")
    first_start = inspect(east)["State"]["StartedAt"]

    def is_restarted() -> bool:
        state = inspect(east)["State"]
        return state["StartedAt"] != first_start and state["Running"]

    def count_admissions() -> int:
        return read_log(east).count("SuperNode ID:")  # logged when the SuperLink has admitted it

    num_admissions = count_admissions()
    assert num_admissions >= 1
    start = time.monotonic()
    run_python(east, KILL_SUPERNODE, check=False)
    wait_until("it is restarted", 120, is_restarted)
    print(f"restarted after {time.monotonic() - start:.0f} s")
    wait_until("it is admitted again", 400, lambda: count_admissions() > num_admissions)
    print(f"admitted again after {time.monotonic() - start:.0f} s")


def test_containers_stop_on_sigterm_within_their_time(federation: Path) -> None:
    for name, grace_seconds in (
        (find_hospital("west"), 30),
        (find_container(STACK, "superexec"), 60),
        (find_container(STACK, "superlink"), 30),
    ):
        start = time.monotonic()
        run_engine("stop", "-t", str(grace_seconds), name)
        seconds = time.monotonic() - start
        print(f"{name[:12]} stopped in {seconds:.1f} s")
        assert seconds < grace_seconds
        assert inspect(name)["State"]["ExitCode"] != 137  # killed
