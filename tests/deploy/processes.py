"""A deployed federation as processes of this machine, over TLS and with what `provision` wrote.

SuperLink, SuperExec, nginx where it is installed, SuperNodes, and PostgreSQL.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import httpx
import numpy as np
import yaml
from safetensors.numpy import load_file

from client.site.config import Site
from common.config.compose import compose_config
from server.rounds.run_lifecycle import open_ledger, start_run
from tests.in_process_federation import InProcess

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
IMAGE_COMMANDS = ("flwr-clientapp", "flower-supernode", "flower-superlink")  # of deploy/image
QUIET_ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}
WARM_VARIABLE = "WARM"  # set: a SuperNode's processes are forked from one that has PyTorch loaded (warm.py)
STOP_TIMEOUT = 15.0  # seconds until a process is killed
# Docker's restart policy: again after a wait that doubles, up to a minute.
RESTART_LOOP = 'wait=1; while :; do "$@"; sleep $wait; wait=$((wait < 32 ? 2 * wait : 60)); done'


def find_free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def make_environment(home: Path, **variables: str) -> dict[str, str]:
    """Return the environment that the images set: a home of its own, the images' commands first in PATH."""
    commands = home / "bin"
    commands.mkdir(parents=True, exist_ok=True)
    for name in IMAGE_COMMANDS:
        _, _, body = (ROOT / "deploy" / "image" / name).read_text().partition("\n")
        _write_script(commands / name, f"#!{sys.executable}\n{body}")
    if variables.pop(WARM_VARIABLE, ""):
        _replace_by_warm_start(commands)
    environment = {}
    for key, value in os.environ.items():
        if not key.startswith(("FLWR_", "CONSILIUM_")):
            environment[key] = value
    settings = {
        "FLWR_HOME": str(home / "flwr"),
        "PYTHONPATH": str(ROOT),
        "PATH": f"{commands}:{BIN}:{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "131072",
    }
    return environment | QUIET_ENVIRONMENT | settings | variables


def _replace_by_warm_start(commands: Path) -> None:
    """Let `flwr-clientapp` ask warm.py for a process that executes the image's file, here image.py."""
    (commands / "flwr-clientapp").replace(commands / "image.py")
    lines = [
        f"#!{sys.executable} -S",
        "import sys",
        f"sys.path[0] = {str(Path(__file__).parent)!r}",
        "from warm import request_fork",
        f"sys.exit(request_fork([{str(commands / 'image.py')!r}, *sys.argv[1:]]))",
    ]
    _write_script(commands / "flwr-clientapp", "\n".join([*lines, ""]))


def _write_script(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(0o755)


# --- commands that end by themselves


def run_server_command(*arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Run `consilium-server` to its end."""
    return run_command("server.cli", *arguments, timeout=timeout)


def run_centre_command(*arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """Run `consilium-centre` to its end."""
    return run_command("client.cli", *arguments, timeout=timeout)


def run_command(
    module: str, *arguments: str, root: Path = ROOT, timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """Run one of our commands to its end, from the code in the folder `root`."""
    code = f"import sys; sys.path.insert(0, {str(root)!r}); from {module} import main; main()"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
    )


def as_settings(overrides: Sequence[str]) -> list[str]:
    """Return the options by which `consilium-centre phantom` takes overrides."""
    options = []
    for override in overrides:
        options += ["-s", override]
    return options


# --- processes that go on


class ProcessGroup:
    """Processes in sessions of their own, each with a log."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *arguments: str, **variables: str) -> subprocess.Popen[bytes]:
        """Start a process; `variables` are added to its environment."""
        home = self.folder / f"home-{name}"
        home.mkdir(exist_ok=True)
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                list(arguments),
                cwd=home,
                env=make_environment(home, **variables),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.processes[name] = process
        return process

    def pid(self, name: str) -> int:
        """Return a process's id, which is also its session's."""
        return self.processes[name].pid

    def read_log(self, name: str) -> str:
        """Return what a process has printed, in all its starts."""
        return (self.folder / f"{name}.log").read_text()

    def read_log_ends(self, num_characters: int) -> str:
        """Return the ends of all logs, for a failure's message."""
        return "\n".join(f"== {name}\n{self.read_log(name)[-num_characters:]}" for name in self.processes)

    def stop(self, name: str, signal_number: signal.Signals = signal.SIGTERM) -> None:
        """Stop a process with everything that it started."""
        process = self.processes.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal_number)
        try:
            process.wait(STOP_TIMEOUT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def stop_all(self) -> None:
        """Stop all processes at the same time."""
        for process in self.processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for name in list(self.processes):
            self.stop(name)


@contextlib.contextmanager
def open_process_group(folder: Path) -> Iterator[ProcessGroup]:
    """Yield a group whose processes end with the block."""
    processes = ProcessGroup(folder)
    try:
        yield processes
    finally:
        processes.stop_all()


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


def admit_centres(made: Path, operator: str) -> subprocess.CompletedProcess[str]:
    """Admit the centres that `provision` wrote into the folder `made`, and revoke those that it revoked."""
    options = ("--superlink", operator, "--ca", str(made / "ca.crt"))
    return run_server_command("admit", str(made / "coordinator/centres"), *options)


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
        "device": "cpu",
        "policy": str(folder / "policy.yaml"),
        "threads": 1,
    }
    (folder / "site.yaml").write_text(yaml.safe_dump(site | local_settings))
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


@contextlib.contextmanager
def postgresql() -> Iterator[tuple[str, Callable[[str], None]]]:
    """Run a PostgreSQL server on a socket in a temporary folder.

    Yields its address, and a function that does "start" or "kill" (-9) to it.
    """
    programs = max(Path("/usr/lib/postgresql").glob("*/bin/initdb")).parent
    account = "postgres" if os.getuid() == 0 else None  # the server refuses to run as root
    # A short prefix, because a socket's path has at most 107 characters.
    with tempfile.TemporaryDirectory(prefix="pg") as folder:
        if account:
            shutil.chown(folder, account)

        def call(program: str, *arguments: str) -> None:
            subprocess.run(
                [programs / program, "-D", f"{folder}/data", *arguments],
                check=True,
                capture_output=True,
                user=account,
                cwd=folder,
            )

        def control(action: str) -> None:
            if action == "start":
                options = f"-c listen_addresses= -k {folder}"
                call("pg_ctl", "-w", "-l", f"{folder}/log", "-o", options, "start")
            else:
                first_line, *_ = Path(f"{folder}/data/postmaster.pid").read_text().split()
                os.kill(int(first_line), signal.SIGKILL)

        call("initdb", "-A", "trust", "-U", "consilium", "--no-sync")
        control("start")
        try:
            yield f"postgresql://consilium@/postgres?host={folder}", control
        finally:
            call("pg_ctl", "-m", "immediate", "stop")


def list_processes(session: int, name: str) -> list[int]:
    """Return the live processes of a session with `name` in their command line."""
    matches = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            # After the name in parentheses: state, parent, process group, session.
            state, _, _, session_text, *_ = (entry / "stat").read_text().rpartition(")")[2].split()
            command = (entry / "cmdline").read_bytes().decode().replace("\0", " ")
            if int(session_text) == session and state != "Z" and name in command:
                matches.append(int(entry.name))
    return matches


def wait_until_healthy(
    url: str, made: Path, processes: ProcessGroup, name: str, seconds: float = 240
) -> None:
    """Wait until a process answers at its URL. Raises AssertionError once it has ended, or too late."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and processes.processes[name].poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url, verify=str(made / "ca.crt"), timeout=2, trust_env=False).is_success:
                return
        time.sleep(0.2)
    raise AssertionError(f"{name} did not start: {processes.read_log(name)[-1500:]}")


def wait_until(event: str, seconds: float, has_happened: Callable[[], object]) -> None:
    """Wait for an event. Raises AssertionError when it has not happened in time."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if has_happened():
            return
        time.sleep(0.3)
    raise AssertionError(f"not within {seconds:.0f} s: {event}")


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
