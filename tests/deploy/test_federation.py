"""Two provisioned centres as processes, over TLS and with node authentication.

A run through the proxy, and everybody who must be refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml

from tests.deploy.commands import (
    admit_centres,
    as_settings,
    run_centre_command,
    run_command,
    run_server_command,
)
from tests.deploy.process_group import ROOT, ProcessGroup, find_free_port, open_process_group, wait_until
from tests.deploy.processes import (
    assert_same_as_simulated,
    start_centre,
    start_coordinator,
    start_superexec,
    unpack_kit,
)

pytestmark = [pytest.mark.slow, pytest.mark.deploy]
CENTRES = ["north", "south"]
PHANTOM = [
    "federation.phantom.scale=0.03",
    "federation.phantom.num_slices=12",
    "federation.phantom.image_size=64",
    "preprocess.image_size=32",
    f"federation.centres=[{','.join(CENTRES)}]",
]
RUN = [
    "federation=folder",
    f"federation.centres=[{','.join(CENTRES)}]",
    "stage.rounds=2",
    "stage.local_epochs=1",
    "stage.batch_size=4",
    "preprocess.image_size=32",
    "evaluation.checkpoint_selection=last",
]
CLOSED_PATHS = (
    "/v1/control/list-runs",
    "/v1/runtime/acquire-task",
    "/openapi.json",
    "/docs",
    "/",
    "/v1/fleet/../control/list-runs",
)


@dataclass
class Federation:
    """A running coordinator and two hospitals."""

    processes: ProcessGroup
    folder: Path
    address: str  # for the hospitals
    operator: str  # address for the operator

    @property
    def made(self) -> Path:
        """The folder that `provision` wrote."""
        return self.folder / "made"

    @property
    def runs(self) -> Path:
        """The folder of the runs."""
        return self.folder / "runs"

    @property
    def operator_options(self) -> tuple[str, ...]:
        """The options by which a command of the operator reaches the SuperLink."""
        return ("--superlink", self.operator, "--ca", str(self.made / "ca.crt"))

    def hospital_folder(self, name: str) -> Path:
        """Return a hospital's folder."""
        return self.folder / "hospitals" / name


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both hospitals' phantom scans."""
    folder = tmp_path_factory.mktemp("data")
    drawn = run_centre_command("phantom", str(folder), *as_settings(PHANTOM), "--no-prepare")
    assert drawn.returncode == 0, drawn.stderr
    return folder


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Iterator[Federation]:
    """North uses the key of its kit; south has made its own."""
    folder = tmp_path_factory.mktemp("federation")
    port = find_free_port()
    assert run_centre_command("key", str(folder / "south.key")).returncode == 0
    centres = {"north": {"device": "cpu"}, "south": {"device": "cpu", "public_key": "south.key.pub"}}
    content = {"address": f"localhost:{port}", "centres": centres}
    (folder / "federation.yaml").write_text(yaml.safe_dump(content))
    made = folder / "made"
    provisioned = run_server_command("provision", str(folder / "federation.yaml"), "--out", str(made))
    assert provisioned.returncode == 0, provisioned.stderr
    with open_process_group(folder) as processes:
        operator = start_coordinator(processes, made, folder / "runs", port)
        admitted = admit_centres(made, operator)
        assert admitted.returncode == 0, admitted.stderr
        assert admitted.stdout.count("admitted, as node") == 2
        for name in CENTRES:
            hospital = unpack_kit(made / "kits" / f"{name}.tar.gz", folder / "hospitals", data / name)
            if name == "south":
                assert not (hospital / "key").exists()
                shutil.copy(folder / "south.key", hospital / "key")
            start_centre(processes, hospital, f"localhost:{port}")
        yield Federation(processes, folder, f"localhost:{port}", operator)


def test_run_through_the_proxy_gives_the_simulations_weights(
    federation: Federation, data: Path, tmp_path: Path
) -> None:
    """Two rounds of the paper's recipe; the operator's self-check finds no fault.

    Every centre's egress log is intact and names the run; no private key is in any log or in the ledger.
    """
    processes, folder, runs = federation.processes, federation.folder, federation.runs
    result = run_server_command("run", *federation.operator_options, "--runs", str(runs), *RUN, timeout=1200)
    logs = processes.read_log_ends(3000)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:] + logs
    run_dir = (runs / "latest").resolve()
    assert json.loads((run_dir / "metrics.json").read_text())["status"] == "finished"
    policies = [federation.hospital_folder(name) / "policy.yaml" for name in CENTRES]
    assert_same_as_simulated(run_dir / "model.safetensors", RUN, data, policies, tmp_path)

    public_option: tuple[str, ...] = ()
    if "nginx" in processes.processes:  # without it, the SuperLink's closed paths can be reached
        public_option = ("--public", federation.address)
    doctor = run_server_command(
        "doctor",
        *federation.operator_options,
        *public_option,
        "--centres",
        str(federation.made / "coordinator/centres"),
        "--runs",
        str(runs),
    )
    faults = [line for line in doctor.stdout.splitlines() if line.startswith("fault")]
    assert [line for line in faults if "GB free" not in line] == [], doctor.stdout
    assert doctor.stdout.count(": online, key ") == 2

    for name in CENTRES:
        state = federation.hospital_folder(name) / "state"
        verified = run_centre_command("egress", str(state), "--verify")
        assert verified.returncode == 0, verified.stderr
        entries = [json.loads(line) for line in (state / "egress.jsonl").read_text().splitlines()]
        assert {entry["run"] for entry in entries} == {"", run_dir.name}  # "": lines that are no message
        assert "TrainReply" in {entry["kind"] for entry in entries}

    written_files = [path for path in [*folder.glob("*.log"), *runs.rglob("*")] if path.is_file()]
    written = b"".join(path.read_bytes() for path in written_files)
    coordinator = federation.made / "coordinator"
    superexec_secret = (coordinator / "superexec.secret").read_bytes().strip().splitlines()[0]
    assert superexec_secret not in written
    for key in (federation.made / "keys/north", coordinator / "server.key"):
        last_line_of_key = key.read_bytes().strip().splitlines()[-2]
        assert last_line_of_key not in written


def test_centre_runs_only_its_own_code(federation: Federation, tmp_path: Path) -> None:
    """A hospital does not execute the client code that a coordinator sends.

    Its own code replies, and the run ends because the two differ.
    """
    other_app = tmp_path / "app"
    for name in ("client", "common", "server", "configs"):
        shutil.copytree(ROOT / name, other_app / name)
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, other_app / name)
    evidence = federation.folder / "the-coordinators-code-ran-here"
    with (other_app / "client" / "federation" / "handlers.py").open("a") as file:
        file.write(f"\nopen({str(evidence)!r}, 'w').close()\n")
    result = run_command(
        "server.cli",
        "run",
        *federation.operator_options,
        "--runs",
        str(federation.runs),
        "federation=folder",
        "federation.centres=[north]",
        "federation.join_timeout=20",
        "stage.rounds=1",
        "preprocess.image_size=32",
        root=other_app,
        timeout=600,
    )
    assert result.returncode == 2
    assert "code" in result.stdout + result.stderr, result.stdout + result.stderr
    assert not evidence.exists()


def test_strangers_revoked_keys_and_closed_paths_are_refused(federation: Federation, tmp_path: Path) -> None:
    """Also a coordinator with another authority's certificate, and a SuperExec that guesses the secret."""
    processes = federation.processes
    authority = str(federation.made / "ca.crt")

    stranger_key = tmp_path / "stranger"
    assert run_centre_command("key", str(stranger_key)).returncode == 0
    north = federation.hospital_folder("north")
    node = start_centre(processes, north, federation.address, stranger_key, name="stranger")
    assert node.wait(180) != 0
    log = processes.read_log("stranger")
    assert "exit code" in log.lower(), log[-1500:]

    _assert_revoked_centre_is_refused(federation)

    foreign = tmp_path / "foreign"
    content = {"address": federation.address, "centres": {"north": {}}}
    (tmp_path / "foreign.yaml").write_text(yaml.safe_dump(content))
    provisioned = run_server_command("provision", str(tmp_path / "foreign.yaml"), "--out", str(foreign))
    assert provisioned.returncode == 0
    with pytest.raises(httpx.ConnectError, match="certificate"):
        httpx.get(f"https://{federation.address}/health", verify=str(foreign / "ca.crt"), trust_env=False)

    if "nginx" in processes.processes:
        proxy = f"https://{federation.address}"
        for path in CLOSED_PATHS:
            assert _post(proxy + path, authority) == 404, path
        assert _post(f"https://{federation.operator}/v1/control/list-runs", authority) != 404
        assert _post(f"{proxy}/v1/fleet/pull-messages", authority) in (400, 401, 415)

    guess = tmp_path / "guess"
    guess.write_text("guess")
    start_superexec(processes, federation.made, guess, federation.operator, tmp_path, name="intruder")
    wait_until(
        "the stranger's SuperExec is refused",
        120,
        lambda: "SuperExec authentication failed" in processes.read_log("superlink"),
    )


def _assert_revoked_centre_is_refused(federation: Federation) -> None:
    federation.processes.stop("south")
    revoked = run_server_command(
        "provision",
        str(federation.folder / "federation.yaml"),
        "--out",
        str(federation.made),
        "--revoke",
        "south",
    )
    assert revoked.returncode == 0, revoked.stderr
    admitted = admit_centres(federation.made, federation.operator)
    assert "south: access revoked" in admitted.stdout, admitted.stdout + admitted.stderr
    node = start_centre(federation.processes, federation.hospital_folder("south"), federation.address)
    assert node.wait(180) != 0
    doctor = run_server_command(
        "doctor",
        *federation.operator_options,
        "--centres",
        str(federation.made / "coordinator/centres"),
        "--runs",
        str(federation.runs),
    )
    assert "node " not in doctor.stdout, doctor.stdout  # the SuperLink knows neither of the two
    assert "south" not in doctor.stdout


def _post(url: str, authority: str) -> int:
    return httpx.post(url, verify=authority, trust_env=False).status_code
