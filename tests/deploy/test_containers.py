"""Four hospitals and a coordinator as containers: the images to their end, a run through the proxy to the simulation's weights, what a hospital's
container cannot do and cannot reach, health, stop, and the return of one that was killed."""

from __future__ import annotations

import json
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from tests.deploy import containers as c
from tests.deploy.processes import ROOT, as_simulated, centre, free_port, server, wait_until

pytestmark = [pytest.mark.slow, pytest.mark.deploy, pytest.mark.containers]
CENTRES = ["north", "east", "south", "west"]
PARTS = ["superlink", "superexec", "dashboard", "postgres"]  # that have a HEALTHCHECK
PHANTOM = [
    "federation.phantom.scale=0.03",
    "federation.phantom.num_slices=12",
    "federation.phantom.image_size=64",
    "preprocess.image_size=32",
]
RUN = [
    *("federation=folder", f"federation.centres=[{','.join(CENTRES)}]", "federation.join_timeout=300"),
    *(
        "stage.rounds=2",
        "stage.local_epochs=1",
        "stage.batch_size=4",
        "preprocess.image_size=32",
        "evaluation.checkpoint_selection=last",
    ),
]
INSIDE = """
import json, os
status = dict(line.split(":", 1) for line in open("/proc/self/status"))
def writes(path):
    try:
        open(path + "/x", "w").close(); os.unlink(path + "/x")
    except OSError as error:
        return error.strerror
print(json.dumps({"uid": os.getuid(), "gid": os.getgid(), "capabilities": int(status["CapBnd"], 16), "confined": int(status["NoNewPrivs"]),
    "writes": {path: writes(path) for path in ("/", "/opt/venv", "/opt/consilium", "/tmp")}}))
"""
REACHED = """
import json, socket, sys
def reach(address):
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), 3).close()
        return ""
    except OSError as error:
        return type(error).__name__ + " " + str(error)
print(json.dumps({address: reach(address) for address in %r}))
"""


@pytest.fixture(scope="module")
def images() -> dict[str, str]:
    """Both of ours built as they stand; the proxy's and the database's found or made."""
    if c.tools()[2]:
        pytest.skip(c.tools()[2])
    for name, image in (("client", c.CENTRE_IMAGE), ("server", c.SERVER_IMAGE)):
        seconds = c.build(image, ROOT / "deploy" / f"{name}.Dockerfile")
        print(f"{image}: {int(c.inspect(image)['Size']) / 1e9:.2f} GB, built in {seconds:.0f} s")
    named = dict(
        line.split("=", 1)
        for line in (ROOT / "deploy/coordinator.env").read_text().splitlines()
        if line.startswith("CONSILIUM_P")
    )
    return {part: c.bought(named[f"CONSILIUM_{part.upper()}_IMAGE"], part) for part in ("proxy", "postgres")}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four hospitals' scans as DICOM, each with its cohort.csv."""
    folder = tmp_path_factory.mktemp("data")
    made = centre("phantom", str(folder), *(part for o in PHANTOM for part in ("-s", o)), "--no-prepare")
    assert made.returncode == 0, made.stderr
    return folder


@pytest.fixture(scope="module")
def hospitals(tmp_path_factory: pytest.TempPathFactory, images: dict[str, str], data: Path) -> Iterator[Path]:
    """A running federation: the folder with `coordinator` in `made`, and the four unpacked kits in `hospitals`."""
    folder = tmp_path_factory.mktemp("containers")
    own = {
        name: {"device": "cpu", "data": str(data / name), "state": str(folder / "hospitals" / name / "state")}
        for name in CENTRES
    }
    (folder / "federation.yaml").write_text(
        yaml.safe_dump({"address": f"{c.HOST}:8443", "image": c.CENTRE_IMAGE, "centres": own})
    )
    made = server("provision", str(folder / "federation.yaml"), "--out", str(folder / "made"))
    assert made.returncode == 0, made.stderr
    coordinator = folder / "made" / "coordinator"
    c.remove([])
    try:
        c.start_coordinator(coordinator, free_port(), **images)
        wait_until(
            "the stack is healthy", 300, lambda: all(c.healthy(c.container(c.STACK, part)) for part in PARTS)
        )
        admitted = c.compose(coordinator, "exec", "-T", "superexec", "consilium-server", "admit")
        assert admitted.count("let in, as node") == 4, admitted
        for name in CENTRES:
            c.start_centre(folder / "made" / "kits" / f"{name}.tar.gz", folder / "hospitals")
        wait_until(
            "the hospitals are healthy", 300, lambda: all(c.healthy(hospital(name)) for name in CENTRES)
        )
        yield folder
    except AssertionError as error:
        raise AssertionError(f"{error}\n{c.logs()}") from error
    finally:
        c.remove([coordinator, *(folder / "hospitals" / name for name in CENTRES)])


def hospital(name: str) -> str:
    """A hospital's container."""
    return c.container(f"{c.STACK}-{name}", "centre")


@pytest.mark.parametrize("image", [c.CENTRE_IMAGE, c.SERVER_IMAGE])
def test_the_bill_of_materials_is_whole(images: dict[str, str], image: str) -> None:
    """CycloneDX, with every Python package that the image has, PyTorch too."""
    code = """import json, importlib.metadata as metadata
installed = {d.name.lower(): d.version for d in metadata.distributions(path=["/opt/venv/lib/python3.11/site-packages"])}
print(json.dumps([json.load(open("/opt/venv/sbom.json")), installed]))"""
    bill, installed = json.loads(
        c.engine("run", "--rm", "--network", "none", "--entrypoint", "python", image, "-c", code)
    )
    listed = {part["name"].lower(): part["version"] for part in bill["components"]}
    assert bill["bomFormat"] == "CycloneDX"
    assert listed["torch"].startswith("2.")
    assert installed.items() <= listed.items()


def test_a_hospital_is_confined(hospitals: Path) -> None:
    """Not root, no capabilities and none to be had, nothing writable but the tmpfs; no port; the same for the coordinator's."""
    for name in [
        hospital("north"),
        *(c.container(c.STACK, s) for s in ("superlink", "superexec", "dashboard")),
    ]:
        found = json.loads(c.python(name, INSIDE))
        assert (found["uid"], found["gid"]) != (0, 0)
        assert (found["capabilities"], found["confined"]) == (0, 1)
        assert found["writes"] == {
            "/": "Read-only file system",
            "/opt/venv": "Read-only file system",
            "/opt/consilium": "Read-only file system",
            "/tmp": None,
        }
    for name in [hospital("north"), *(c.container(c.STACK, s) for s in ("proxy", *PARTS))]:
        assert c.inspect(name)["HostConfig"]["ReadonlyRootfs"] is True
        assert c.inspect(name)["Config"]["User"].split(":")[0] not in ("", "0", "root")
    assert not c.inspect(hospital("north"))["HostConfig"]["PortBindings"]


def test_a_hospital_reaches_the_proxy_and_nothing_else(hospitals: Path) -> None:
    """Not the SuperLink's own ports, on any of its addresses or by way of the machine itself; no other hospital; no internet. And of the
    proxy's paths only Fleet's."""
    north = hospital("north")
    near = c.inspect(north)["NetworkSettings"]["Networks"][f"{c.STACK}-north"]
    inner = {
        part: [
            n["IPAddress"]
            for n in c.inspect(c.container(c.STACK, part))["NetworkSettings"]["Networks"].values()
        ]
        for part in PARTS
    }
    operator = next(
        line.partition("=")[2]
        for line in (hospitals / "made/coordinator/.env").read_text().splitlines()
        if "OPERATOR_PORT" in line
    )
    east = c.inspect(hospital("east"))["NetworkSettings"]["Networks"][f"{c.STACK}-east"]["IPAddress"]
    ports = {"superlink": (8000, 8081), "superexec": (8081,), "dashboard": (8080,), "postgres": (5432,)}
    shut = [
        *(f"{a}:{p}" for part in PARTS for a in inner[part] for p in ports[part]),
        f"{east}:8081",
        f"{c.HOST}:8000",
        f"{c.HOST}:5432",
        "192.0.2.1:443",
        "1.1.1.1:443",
    ]
    shut += [f"{near['Gateway']}:{operator}"] if near["Gateway"] else []
    assert [len(inner[part]) for part in PARTS] == [2, 1, 2, 1]
    reached = json.loads(c.python(north, REACHED % [f"{c.HOST}:8443", *shut]))
    assert reached.pop(f"{c.HOST}:8443") == ""
    assert all(reached.values()), reached
    assert json.loads(c.python(c.container(c.STACK, "superexec"), REACHED % ["superlink:8000"])) == {
        "superlink:8000": ""
    }  # it is there
    assert (
        "unreachable" in reached["1.1.1.1:443"]
    )  # no way out, rather than an internet that happens to be down
    code = f"""import httpx, ssl
client = httpx.Client(verify=ssl.create_default_context(cafile="/etc/consilium/ca.crt"))
print([client.post("https://{c.HOST}:8443" + path).status_code for path in ("/v1/control/list-runs", "/v1/runtime/acquire-task", "/openapi.json")])"""
    assert c.python(north, code).strip() == "[404, 404, 404]"


def test_a_run(hospitals: Path, data: Path, tmp_path: Path) -> None:
    """The paper's recipe to the simulation's weights; a hospital's doctor finds nothing wrong, and each egress log is whole and knows the run."""
    coordinator = hospitals / "made" / "coordinator"
    examined = c.said(
        ["./start", "doctor"], folder=hospitals / "hospitals" / "north"
    )  # exit status 1 for a fault
    assert f"coordinator: {c.HOST}:8443 answers" in examined
    began = time.monotonic()
    c.compose(
        coordinator,
        "exec",
        "-T",
        "superexec",
        "consilium-server",
        "run",
        "--recipe",
        "multisource",
        *RUN,
        timeout=2400,
    )
    print(f"the run took {time.monotonic() - began:.0f} s")
    superexec = c.container(c.STACK, "superexec")
    run = c.engine("exec", superexec, "readlink", "-f", "/runs/latest").strip()
    c.engine("cp", f"{superexec}:{run}/.", str(tmp_path / "run"))
    assert json.loads((tmp_path / "run/metrics.json").read_text())["status"] == "finished"
    policies = [hospitals / "hospitals" / name / "policy.yaml" for name in CENTRES]
    as_simulated(tmp_path / "run/model.safetensors", RUN, data, policies, tmp_path)
    for name in CENTRES:
        state = hospitals / "hospitals" / name / "state"
        sent = [json.loads(line) for line in (state / "egress.jsonl").read_text().splitlines()]
        assert {entry["run"] for entry in sent} == {Path(run).name}
        assert "TrainReply" in {entry["kind"] for entry in sent}
        if name == "north":
            assert f"{len(sent)} messages left; the chain is intact" in c.said(
                ["./start", "egress"], folder=state.parent
            )


def test_the_console_shows_the_hospitals(hospitals: Path) -> None:
    """At the operator's loopback, over TLS, to whom has logged in: four hospitals online by the SuperLink's account, and the run."""
    coordinator = hospitals / "made/coordinator"
    said = c.compose(
        coordinator,
        "exec",
        "-T",
        "dashboard",
        "consilium-server",
        "account",
        "add",
        "anna",
        "--role",
        "operator",
    )
    settings = dict(
        line.split("=", 1) for line in (coordinator / ".env").read_text().splitlines() if "=" in line
    )
    trusted = ssl.create_default_context(cafile=coordinator / "ca.crt")
    with httpx.Client(
        base_url=f"https://localhost:{settings['CONSILIUM_CONSOLE_PORT']}", verify=trusted, timeout=60
    ) as browser:
        assert browser.get("/").headers["location"] == "/login"
        assert (
            browser.post(
                "/login", data={"name": "anna", "password": said.split("password ")[1].split()[0]}
            ).status_code
            == 303
        )
        first = " ".join(browser.get("/").text.split())
        assert "4<i> of 4</i>" in first
        assert "certificate expires" in first
        assert all(f"<span>{name}</span>" in first for name in CENTRES)
        assert "finished" in browser.get("/runs").text


def test_one_that_is_killed_comes_back(hospitals: Path) -> None:
    """kill -9 of a SuperNode: its container is started again by the restart policy, and let in once the SuperLink has given the old one up."""
    east = hospital("east")
    before = c.inspect(east)["State"]["StartedAt"]
    let_in = lambda: c.said([c.tools()[0], "logs", east], both=True).count("SuperNode ID:")  # noqa: E731  # said when the SuperLink has taken it
    once = let_in()
    assert once >= 1
    kill = """import os
for pid in filter(str.isdigit, os.listdir("/proc")):
    if int(pid) not in (1, os.getpid()) and b"flower-supernode" in open(f"/proc/{pid}/cmdline", "rb").read():
        os.kill(int(pid), 9)"""
    began = time.monotonic()
    c.python(east, kill, check=False)
    wait_until(
        "it is started again",
        120,
        lambda: c.inspect(east)["State"]["StartedAt"] != before and c.inspect(east)["State"]["Running"],
    )
    print(f"started again after {time.monotonic() - began:.0f} s")
    wait_until("it is let in again", 400, lambda: let_in() > once)
    print(f"let in again after {time.monotonic() - began:.0f} s")


def test_they_stop_when_asked(hospitals: Path) -> None:
    """SIGTERM ends every part of ours within its time, without a kill."""
    for name, grace in (
        (hospital("west"), 30),
        (c.container(c.STACK, "superexec"), 60),
        (c.container(c.STACK, "superlink"), 30),
    ):
        began = time.monotonic()
        c.engine("stop", "-t", str(grace), name)
        print(f"{name[:12]} stopped in {time.monotonic() - began:.1f} s")
        assert time.monotonic() - began < grace
        assert c.inspect(name)["State"]["ExitCode"] != 137
