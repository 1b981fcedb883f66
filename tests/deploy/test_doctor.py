"""The hospital's doctor against a real TLS server with the coordinator's certificate: a healthy centre has no fault; what is broken is named."""

from __future__ import annotations

import http.server
import ssl
import threading
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
import yaml

from client.tools.doctor import run_checks
from server.operations.provision import provision_federation
from tests.deploy.processes import free_port, unpack

Healthy = tuple[Path, str, list[timedelta]]


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Healthy]:
    """(folder with `made`, address, [how far its clock is off])."""
    folder, port, off = tmp_path_factory.mktemp("coordinator"), free_port(), [timedelta()]
    (folder / "federation.yaml").write_text(
        f"address: localhost:{port}\ncentres: {{north: {{device: cpu}}}}\n"
    )
    list(provision_federation(folder / "federation.yaml", folder / "made"))

    class Health(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response_only(200)
            self.send_header("Date", format_datetime(datetime.now(UTC) + off[0], usegmt=True))
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(folder / "made/coordinator/server.crt", folder / "made/coordinator/server.key")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), Health)
    server.socket = tls.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"localhost:{port}", off
    server.shutdown()


@pytest.fixture
def hospital(coordinator: Healthy, tmp_path: Path) -> Path:
    """The kit unpacked, with two scans."""
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.png").touch()
    (data / "b.png").touch()
    (data / "cohort.csv").write_text(
        "scan,path,patient,source,split,covid\na,a.png,1,north,train,1\nb,b.png,2,north,val,0\n"
    )
    return unpack(coordinator[0] / "made" / "kits" / "north.tar.gz", tmp_path, data)


def found(hospital: Path, address: str) -> dict[str, str]:
    """{what the check is about: its worst level}."""
    worst: dict[str, str] = {}
    for finding in run_checks(hospital / "site.yaml", address, hospital / "ca.crt", hospital / "key"):
        what, order = finding.message.partition(":")[0].partition(" ")[0], ["ok", "warning", "fault"]
        worst[what] = max(worst.get(what, "ok"), finding.level, key=order.index)
        assert finding.level != "fault" or finding.remedy or len(finding.message) > 40
    return worst


def test_a_healthy_centre(coordinator: Healthy, hospital: Path) -> None:
    levels = found(hospital, coordinator[1])
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
    assert {
        what for what, level in levels.items() if level == "fault" and what != "state"
    } == set()  # state: how full this machine's disk is


def edited(name: str, **values: object) -> Callable[[Path], None]:
    def edit(hospital: Path) -> None:
        path = hospital / name
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | values))

    return edit


@pytest.mark.parametrize(
    ("break_it", "what", "level"),
    [
        (lambda h: (h / "key").write_text("no key"), "key", "fault"),
        (lambda h: (h / "key").chmod(0o644), "key", "warning"),
        (edited("site.yaml", device="cuda:7"), "device", "fault"),
        (edited("site.yaml", data="/nowhere"), "data", "fault"),
        (edited("site.yaml", state="/proc/nowhere"), "state", "fault"),
        (edited("site.yaml", divice="cpu"), "site", "fault"),
        (edited("policy.yaml", fingerprints=["0000000000000000"]), "policy", "fault"),
        (edited("policy.yaml", smallest_sell=5), "policy", "fault"),
        (lambda h: (h.parent / "data" / "b.png").unlink(), "data", "warning"),
        (
            lambda h: (h / "state").mkdir() or (h / "state" / "egress.jsonl").write_text('{"hash": "0"}\n'),
            "egress",
            "fault",
        ),
    ],
    ids=["key", "key mode", "device", "data", "state", "site", "code", "policy", "a scan", "egress"],
)
def test_what_is_broken_is_named(
    break_it: Callable[[Path], None], what: str, level: str, coordinator: Healthy, hospital: Path
) -> None:
    break_it(hospital)
    assert found(hospital, coordinator[1])[what] == level


@pytest.mark.parametrize(("seconds", "level"), [(0, "ok"), (60, "warning"), (400, "fault"), (-20, "fault")])
def test_the_clock(seconds: int, level: str, coordinator: Healthy, hospital: Path) -> None:
    """The coordinator's is `seconds` ahead of this machine's. Flower refuses what was signed in its future, or long ago."""
    coordinator[2][0] = timedelta(seconds=seconds)
    try:
        assert found(hospital, coordinator[1])["clock"] == level
    finally:
        coordinator[2][0] = timedelta()


def test_a_coordinator_that_is_not_there_or_not_ours(coordinator: Healthy, hospital: Path) -> None:
    assert found(hospital, f"localhost:{free_port()}")["coordinator"] == "fault"
    other = hospital.parent / "other"
    (hospital.parent / "f.yaml").write_text("address: localhost:1\ncentres: {north: {}}\n")
    list(provision_federation(hospital.parent / "f.yaml", other))
    (hospital / "ca.crt").write_bytes((other / "ca.crt").read_bytes())
    assert found(hospital, coordinator[1])["coordinator"] == "fault"
