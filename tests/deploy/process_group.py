"""Processes that are started for a test and end with it, in the environment that the images set."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx

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
