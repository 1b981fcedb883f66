"""A PostgreSQL server for a test."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path


@contextlib.contextmanager
def run_postgresql() -> Iterator[tuple[str, Callable[[str], None]]]:
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
