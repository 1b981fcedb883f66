"""A deployed federation as processes of this machine: SuperLink, SuperExec, nginx and SuperNodes with what `provision` made, over TLS."""

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
from collections.abc import Callable, Iterator
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
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def environment(home: Path, **more: str) -> dict[str, str]:
    """As the images set it: a home of its own, the images' commands first in PATH, an empty working directory."""
    commands = home / "bin"
    commands.mkdir(parents=True, exist_ok=True)
    for name in ("flwr-clientapp", "flower-supernode", "flower-superlink"):
        body = (ROOT / "deploy" / "image" / name).read_text().partition("\n")[2]
        (commands / name).write_text(f"#!{sys.executable}\n{body}")
        (commands / name).chmod(0o755)
    if more.pop("WARM", ""):  # its processes are forked from a loaded one
        (commands / "flwr-clientapp").replace(commands / "image.py")
        warm = f"#!{sys.executable} -S\nimport sys\nsys.path[0] = {str(Path(__file__).parent)!r}\nfrom warm import ask\n"
        (commands / "flwr-clientapp").write_text(
            warm + f"sys.exit(ask([{str(commands / 'image.py')!r}, *sys.argv[1:]]))\n"
        )
        (commands / "flwr-clientapp").chmod(0o755)
    return (
        {k: v for k, v in os.environ.items() if not k.startswith(("FLWR_", "CONSILIUM_"))}
        | QUIET
        | {
            "FLWR_HOME": str(home / "flwr"),
            "PYTHONPATH": str(ROOT),
            "PATH": f"{commands}:{BIN}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "MALLOC_MMAP_THRESHOLD_": "131072",
        }
        | more
    )


def server(*arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """`consilium-server` to its end."""
    return command("server.cli", *arguments, timeout=timeout)


def centre(*arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    """`consilium-centre` to its end."""
    return command("client.cli", *arguments, timeout=timeout)


def command(
    module: str, *arguments: str, root: Path = ROOT, timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """A command of ours to its end, from the code at `root`."""
    code = f"import sys; sys.path.insert(0, {str(root)!r}); from {module} import main; main()"
    started = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=timeout, env=started
    )


class Started:
    """Processes in sessions of their own, each with a log; all end with the block."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, *arguments: str, **more: str) -> subprocess.Popen[bytes]:
        home = self.folder / f"home-{name}"
        home.mkdir(exist_ok=True)
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                list(arguments),
                cwd=home,
                env=environment(home, **more),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self.processes[name] = process
        return process

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def stop(self, name: str, how: signal.Signals = signal.SIGTERM) -> None:
        process = self.processes.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def started(folder: Path) -> Iterator[Started]:
    processes = Started(folder)
    try:
        yield processes
    finally:
        for process in processes.processes.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
        for name in list(processes.processes):
            processes.stop(name)


def federation(processes: Started, centres: list[str], drawn: list[str], **more: str) -> tuple[str, int]:
    """A running coordinator, and in `hospitals/` each centre's folder, let in and with phantom scans, not started yet. Returns the operator's address
    and the hospitals' port."""
    folder, port = processes.folder, free_port()
    settings = [part for o in [*drawn, f"federation.centres=[{','.join(centres)}]"] for part in ("-s", o)]
    wanted = {"address": f"localhost:{port}", "centres": {name: {"device": "cpu"} for name in centres}}
    (folder / "federation.yaml").write_text(yaml.safe_dump(wanted))
    made = folder / "made"
    for done in (
        centre("phantom", str(folder / "data"), *settings, "--no-prepare"),
        server("provision", str(folder / "federation.yaml"), "--out", str(made)),
    ):
        assert done.returncode == 0, done.stderr
    operator = start_coordinator(processes, made, folder / "runs", port, **more)
    admitted = server(
        "admit", str(made / "coordinator/centres"), "--superlink", operator, "--ca", str(made / "ca.crt")
    )
    assert admitted.returncode == 0, admitted.stderr
    for name in centres:
        unpack(made / "kits" / f"{name}.tar.gz", folder / "hospitals", folder / "data" / name)
    return operator, port


def start_coordinator(processes: Started, made: Path, runs: Path, port: int, **more: str) -> str:
    """SuperLink, SuperExec and, where there is one, nginx on `port`. Returns the SuperLink's own address, for the operator alone."""
    coordinator = made / "coordinator"
    own = free_port() if shutil.which("nginx") else port
    start_superlink(processes, made, own)
    start_superexec(processes, made, coordinator / "superexec.secret", f"localhost:{own}", runs, **more)
    if own != port:
        conf = (
            (coordinator / "nginx.conf")
            .read_text()
            .replace("superlink:8000", f"127.0.0.1:{own}")
            .replace("8443", f"127.0.0.1:{port}")
        )
        scratch = processes.folder / "nginx"
        scratch.mkdir()
        (coordinator / "nginx.here").write_text(conf.replace("/tmp/", f"{scratch}/"))
        start_nginx(processes, made, port)
    return f"localhost:{own}"


def start_superlink(processes: Started, made: Path, own: int) -> None:
    coordinator = made / "coordinator"
    processes.start(
        "superlink",
        *(
            "flower-superlink",
            "--ssl-certfile",
            str(coordinator / "server.crt"),
            "--ssl-keyfile",
            str(coordinator / "server.key"),
        ),
        *(
            "--ssl-ca-certfile",
            str(coordinator / "ca.crt"),
            "--enable-supernode-auth",
            "--database",
            str(processes.folder / "state.db"),
        ),
        *("--host", "127.0.0.1", "--port", str(own), "--disable-runtime-dependency-installation"),
        *("--isolation", "process", "--superexec-auth-secret-file", str(coordinator / "superexec.secret")),
    )
    wait_for(f"https://localhost:{own}/health", made, processes, "superlink")


def start_nginx(processes: Started, made: Path, port: int) -> None:
    user = (
        "user root; " if os.getuid() == 0 else ""
    )  # else its workers were nobody, who may not look into this folder
    processes.start(
        "nginx", "nginx", "-c", str(made / "coordinator" / "nginx.here"), "-g", f"{user}daemon off;"
    )
    wait_for(f"https://localhost:{port}/health", made, processes, "nginx")


def start_superexec(
    processes: Started,
    made: Path,
    secret: Path,
    address: str,
    runs: Path,
    name: str = "superexec",
    **more: str,
) -> None:
    processes.start(
        name,
        *("flower-superexec", "--runtime-api-address", address, "--root-certificates", str(made / "ca.crt")),
        *("--superexec-auth-secret-file", str(secret)),
        CONSILIUM_RUNS=str(runs),
        **more,
    )


def unpack(kit: Path, into: Path, data: Path) -> Path:
    """A hospital's folder: the kit unpacked, and its paths set to where this hospital has its data."""
    with tarfile.open(kit) as bundle:
        bundle.extractall(into, filter="data")
    folder = into / kit.name.removesuffix(".tar.gz")
    site = yaml.safe_load((folder / "site.yaml").read_text())
    own = {
        "data": str(data),
        "state": str(folder / "state"),
        "device": "cpu",
        "policy": str(folder / "policy.yaml"),
        "threads": 1,
    }
    (folder / "site.yaml").write_text(yaml.safe_dump(site | own))
    return folder


def start_centre(
    processes: Started,
    folder: Path,
    address: str,
    key: Path | None = None,
    name: str = "",
    restart: bool = False,
    **more: str,
) -> subprocess.Popen[bytes]:
    """A SuperNode with the kit's material, as deploy/compose.centre.yaml starts it; with its restart policy (Docker's), when asked for."""
    warm = f"test -e bin/image.py && rm -f warm.sock && python {Path(__file__).with_name('warm.py')} & "  # forked from, where that is wanted
    again = (
        "sh",
        "-c",
        warm + 'wait=1; while :; do "$@"; sleep $wait; wait=$((wait < 32 ? 2 * wait : 60)); done',
        "restart",
    )
    return processes.start(
        name or folder.name,
        *(again if restart else ()),
        *("flower-supernode", "--superlink", address, "--root-certificates", str(folder / "ca.crt")),
        *(
            "--auth-supernode-private-key",
            str(key or folder / "key"),
            "--node-config",
            f'site="{folder / "site.yaml"}"',
        ),
        *("--port", str(free_port())),
        **more,
    )


@contextlib.contextmanager
def postgresql() -> Iterator[tuple[str, Callable[[str], None]]]:
    """A PostgreSQL server of our own on a socket in a temporary folder: its address, and a function that does "start" or "kill" (-9) to it."""
    programs = max(Path("/usr/lib/postgresql").glob("*/bin/initdb")).parent
    account = "postgres" if os.getuid() == 0 else None  # the server refuses to run as root
    with tempfile.TemporaryDirectory(
        prefix="pg"
    ) as folder:  # short: a socket's path has at most 107 characters
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

        def do(what: str) -> None:
            if what == "start":
                call(
                    "pg_ctl", "-w", "-l", f"{folder}/log", "-o", f"-c listen_addresses= -k {folder}", "start"
                )
            else:
                os.kill(int(Path(f"{folder}/data/postmaster.pid").read_text().split()[0]), signal.SIGKILL)

        call("initdb", "-A", "trust", "-U", "consilium", "--no-sync")
        do("start")
        try:
            yield f"postgresql://consilium@/postgres?host={folder}", do
        finally:
            call("pg_ctl", "-m", "immediate", "stop")


def children(parent: int, name: str) -> list[int]:
    """Processes of this name in the session that `parent` leads."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                state = (entry / "stat").read_text().rpartition(")")[2].split()
                if (
                    int(state[3]) == parent
                    and state[0] != "Z"
                    and name in (entry / "cmdline").read_bytes().decode().replace("\0", " ")
                ):
                    found.append(int(entry.name))
    return found


def wait_for(url: str, made: Path, processes: Started, name: str, seconds: float = 240) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and processes.processes[name].poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url, verify=str(made / "ca.crt"), timeout=2, trust_env=False).is_success:
                return
        time.sleep(0.2)
    raise AssertionError(f"{name} did not start: {processes.log(name)[-1500:]}")


def wait_until(what: str, seconds: float, true: object) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if true():  # type: ignore[operator]
            return
        time.sleep(0.3)
    raise AssertionError(f"not within {seconds:.0f} s: {what}")


def as_simulated(model: Path, overrides: list[str], data: Path, policies: list[Path], folder: Path) -> None:
    """A deployed run's weights are those of the same run in this process, with the hospitals' policies, which coarsen small counts."""
    sites = [Site(index=k, threads=1, device="cpu", policy=str(policy)) for k, policy in enumerate(policies)]
    config = compose_config(["recipe=multisource", *overrides, f"federation.data_root={data}"])
    start_run(config, InProcess(sites), folder, open_ledger(folder), "simulated")
    simulated = load_file(folder / "simulated" / "model.safetensors")
    for name, tensor in load_file(model).items():
        np.testing.assert_allclose(tensor, simulated[name], rtol=1e-5, atol=1e-6, err_msg=name)
