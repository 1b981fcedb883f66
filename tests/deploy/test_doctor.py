"""The hospital's self-check, against a real TLS server with the coordinator's certificate.

A healthy centre has no fault, and what is broken is named.
"""

from __future__ import annotations

import http.server
import json
import shutil
import ssl
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
import yaml

from client.site.config import outer_anchor, parse_site
from client.site.egress_log import record_reply
from client.tools.doctor import run_checks
from common.protocol.messages import JoinRequest, Refusal
from server.operations.provision import provision_federation
from tests.deploy.process_group import find_free_port
from tests.deploy.processes import unpack_kit

LEVELS = ["ok", "warning", "fault"]


@dataclass
class Coordinator:
    """A server that answers health requests, and what `provision` wrote for it."""

    folder: Path  # with `made`
    address: str
    clock_skew: timedelta = field(default_factory=timedelta)  # how far its clock is ahead


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coordinator]:
    folder = tmp_path_factory.mktemp("coordinator")
    port = find_free_port()
    coordinator = Coordinator(folder, f"localhost:{port}")
    (folder / "federation.yaml").write_text(
        f"address: {coordinator.address}\ncentres: {{north: {{device: cpu}}}}\n"
    )
    list(provision_federation(folder / "federation.yaml", folder / "made"))

    class HealthHandler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            date = datetime.now(UTC) + coordinator.clock_skew
            self.send_response_only(200)
            self.send_header("Date", format_datetime(date, usegmt=True))
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(folder / "made/coordinator/server.crt", folder / "made/coordinator/server.key")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), HealthHandler)
    server.socket = tls.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield coordinator
    server.shutdown()


@pytest.fixture
def hospital(coordinator: Coordinator, tmp_path: Path) -> Path:
    """The unpacked kit, with two scans."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.png").touch()
    (data / "b.png").touch()
    (data / "cohort.csv").write_text(
        "scan,path,patient,source,split,covid\na,a.png,1,north,train,1\nb,b.png,2,north,val,0\n"
    )
    return unpack_kit(coordinator.folder / "made" / "kits" / "north.tar.gz", tmp_path, data)


def worst_levels(hospital: Path, address: str) -> dict[str, str]:
    """Return {subject of a check: its worst level}."""
    levels: dict[str, str] = {}
    for result in run_checks(hospital / "site.yaml", address, hospital / "ca.crt", hospital / "key"):
        subject = result.message.partition(":")[0].partition(" ")[0]
        levels[subject] = max(levels.get(subject, "ok"), result.level, key=LEVELS.index)
        assert result.level != "fault" or result.remedy or len(result.message) > 40
    return levels


def test_healthy_centre_has_no_fault(coordinator: Coordinator, hospital: Path) -> None:
    levels = worst_levels(hospital, coordinator.address)
    assert set(levels) == {
        "versions",
        "key",
        "coordinator",
        "coordinator's",
        "clock",
        "device",
        "policy",
        "data",
        "state",
        "egress",
    }
    del levels["state"]  # depends on how full this machine's disk is
    assert "fault" not in levels.values()


def edit_yaml(name: str, **values: object) -> Callable[[Path], None]:
    """Return a function that sets values in a YAML file of a hospital's folder."""

    def edit(hospital: Path) -> None:
        path = hospital / name
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | values))

    return edit


def write_broken_egress_log(hospital: Path) -> None:
    (hospital / "state").mkdir()
    (hospital / "state" / "egress.jsonl").write_text('{"hash": "0"}\n')


def record_messages(hospital: Path) -> None:
    """Write two lines into the egress log, besides the one that says that it has anchors."""
    site = parse_site({"site": str(hospital / "site.yaml")})
    anchor = outer_anchor(site, Path(site.data))
    for _ in range(2):
        record_reply(Path(site.state), JoinRequest("run", {}), Refusal("north", "no"), anchor)


def cut_egress_log(hospital: Path) -> None:
    record_messages(hospital)
    log = hospital / "state" / "egress.jsonl"
    log.write_bytes(b"".join(log.read_bytes().splitlines(keepends=True)[:-1]))


def delete_state_folder(hospital: Path) -> None:
    record_messages(hospital)
    shutil.rmtree(hospital / "state")


def test_end_of_the_egress_log_is_shown(coordinator: Coordinator, hospital: Path) -> None:
    record_messages(hospital)
    last_line = (hospital / "state" / "egress.jsonl").read_text().splitlines()[-1]
    results = run_checks(hospital / "site.yaml", coordinator.address, hospital / "ca.crt", hospital / "key")
    (result,) = [result for result in results if result.message.startswith("egress log")]
    last_hash = json.loads(last_line)["hash"]
    assert result.message == f"egress log: 3 lines, the chain is intact and ends with {last_hash}"
    assert result.level == "ok"


@pytest.mark.parametrize(
    ("break_hospital", "subject", "level"),
    [
        (lambda hospital: (hospital / "key").write_text("no key"), "key", "fault"),
        (lambda hospital: (hospital / "key").chmod(0o644), "key", "warning"),
        (edit_yaml("site.yaml", device="cuda:7"), "device", "fault"),
        (edit_yaml("site.yaml", data="/nowhere"), "data", "fault"),
        (edit_yaml("site.yaml", state="/proc/nowhere"), "state", "fault"),
        (edit_yaml("site.yaml", divice="cpu"), "site", "fault"),
        (edit_yaml("policy.yaml", fingerprints=["0000000000000000"]), "policy", "fault"),
        (edit_yaml("policy.yaml", min_cell_cuont=5), "policy", "fault"),
        (lambda hospital: (hospital.parent / "data" / "b.png").unlink(), "data", "warning"),
        (write_broken_egress_log, "egress", "fault"),
        (cut_egress_log, "egress", "fault"),
        (delete_state_folder, "egress", "fault"),
    ],
    ids=[
        "key",
        "key mode",
        "device",
        "data",
        "state",
        "site",
        "code",
        "policy",
        "a scan",
        "egress",
        "tail",
        "state folder",
    ],
)
def test_broken_part_is_named(
    break_hospital: Callable[[Path], None],
    subject: str,
    level: str,
    coordinator: Coordinator,
    hospital: Path,
) -> None:
    break_hospital(hospital)
    assert worst_levels(hospital, coordinator.address)[subject] == level


@pytest.mark.parametrize(("seconds", "level"), [(0, "ok"), (60, "warning"), (400, "fault"), (-20, "fault")])
def test_clock_skew_is_reported(seconds: int, level: str, coordinator: Coordinator, hospital: Path) -> None:
    """The coordinator's clock is `seconds` ahead; Flower refuses what was signed in its future or past."""
    coordinator.clock_skew = timedelta(seconds=seconds)
    try:
        assert worst_levels(hospital, coordinator.address)["clock"] == level
    finally:
        coordinator.clock_skew = timedelta()


def test_absent_or_foreign_coordinator_is_a_fault(coordinator: Coordinator, hospital: Path) -> None:
    assert worst_levels(hospital, f"localhost:{find_free_port()}")["coordinator"] == "fault"
    foreign = hospital.parent / "foreign"
    (hospital.parent / "foreign.yaml").write_text("address: localhost:1\ncentres: {north: {}}\n")
    list(provision_federation(hospital.parent / "foreign.yaml", foreign))
    (hospital / "ca.crt").write_bytes((foreign / "ca.crt").read_bytes())
    assert worst_levels(hospital, coordinator.address)["coordinator"] == "fault"
