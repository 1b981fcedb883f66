"""Our own commands, run to their end."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.deploy.process_group import ROOT


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


def admit_centres(made: Path, operator: str) -> subprocess.CompletedProcess[str]:
    """Admit the centres that `provision` wrote into the folder `made`, and revoke those that it revoked."""
    options = ("--superlink", operator, "--ca", str(made / "ca.crt"))
    return run_server_command("admit", str(made / "coordinator/centres"), *options)
