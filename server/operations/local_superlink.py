"""A SuperLink of one's own for a simulation.

Started in an empty folder, and stopped with every process it started.

A SuperLink that `flwr run` starts by itself stays behind, and simulated clients import from the SuperLink's
working directory. So this starts one in an empty folder, with a home and a port of its own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx

from common.utils.errors import ConsiliumError

QUIET_ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
MAX_TEMPORARY_PATH = 40  # characters: Ray's sockets lie in it, and a socket's path has at most 107
START_TIMEOUT = 60  # seconds
TERMINATE_TIMEOUT = 8  # seconds
KILL_TIMEOUT = 3  # seconds


class SuperLinkAccess(NamedTuple):
    """How Flower's commands reach a SuperLink."""

    home: Path  # their working directory
    environment: dict[str, str]


@contextlib.contextmanager
def start_superlink() -> Iterator[SuperLinkAccess]:
    """Start a SuperLink in an empty folder; its whole process group ends with the block.

    Raises:
        ConsiliumError: it did not start.
    """
    parent = None
    if len(tempfile.gettempdir()) >= MAX_TEMPORARY_PATH:
        parent = "/tmp"
    with tempfile.TemporaryDirectory(
        prefix="consilium-", dir=parent, ignore_cleanup_errors=True
    ) as temporary:
        work = Path(temporary)
        port = _find_free_port()
        access = _prepare_access(work, port)
        log_path = work / "superlink.log"
        process = _spawn_superlink(access, port, log_path)
        try:
            _wait_until_healthy(f"http://127.0.0.1:{port}/health", process, log_path)
            yield access
        finally:
            _stop_processes(process, temporary)


def find_tool(name: str) -> str:
    """Return the path of a command in this Python's environment."""
    return str(Path(sys.executable).parent / name)


def tool_search_path() -> str:
    """Return a PATH that finds this Python's commands first."""
    return f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def _prepare_access(work: Path, port: int) -> SuperLinkAccess:
    home = work / "flwr"
    empty = work / "empty"
    home.mkdir()
    empty.mkdir()
    connection = f'address = "127.0.0.1:{port}"\ninsecure = true\n'
    (home / "config.toml").write_text(f'[superlink]\ndefault = "local"\n\n[superlink.local]\n{connection}')
    own_settings = {"FLWR_HOME": str(home), "RAY_TMPDIR": str(work), "PATH": tool_search_path()}
    return SuperLinkAccess(empty, os.environ | QUIET_ENVIRONMENT | own_settings)


def _spawn_superlink(access: SuperLinkAccess, port: int, log_path: Path) -> subprocess.Popen[bytes]:
    options = ["--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port)]
    with log_path.open("w") as log:
        return subprocess.Popen(
            [find_tool("flower-superlink"), *options],
            cwd=access.home,
            env=access.environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def _find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes], log_path: Path) -> None:
    give_up_at = time.monotonic() + START_TIMEOUT
    while time.monotonic() < give_up_at and process.poll() is None:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url, timeout=1).is_success:
                return
        time.sleep(0.2)
    last_words = log_path.read_text()[-400:].strip()
    raise ConsiliumError(f"Flower's SuperLink did not start: {last_words}")


def _stop_processes(process: subprocess.Popen[bytes], marker: str) -> None:
    """End the SuperLink's session, and what Ray put into sessions of its own."""
    for stop_signal, timeout in ((signal.SIGTERM, TERMINATE_TIMEOUT), (signal.SIGKILL, KILL_TIMEOUT)):
        for pid in _find_processes(marker, process.pid):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, stop_signal)
        give_up_at = time.monotonic() + timeout
        while time.monotonic() < give_up_at and _find_processes(marker, process.pid):
            process.poll()
            time.sleep(0.1)
    process.wait()


def _find_processes(marker: str, session: int) -> list[int]:
    """Return the processes of a session, or with our temporary folder in their environment."""
    pids = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        with contextlib.suppress(OSError):
            if _belongs_to(entry, marker, session):
                pids.append(int(entry.name))
    return pids


def _belongs_to(entry: Path, marker: str, session: int) -> bool:
    """Return whether a living process belongs to us. Raises OSError where it is gone or another user's."""
    status = (entry / "stat").read_text().rpartition(")")[2].split()
    if status[0] == "Z":
        return False
    if int(status[3]) == session:
        return True
    return f"RAY_TMPDIR={marker}".encode() in (entry / "environ").read_bytes()
