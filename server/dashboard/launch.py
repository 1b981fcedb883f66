"""Runs begun from the console: `consilium-server` in a process of its own, which outlives the console."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from common.compose import CONFIGS
from common.errors import ConsiliumError
from server.runs import find, new_id
from server.simulate import settings_of


class Launcher:
    """Starts and resumes runs: in simulation, or at the SuperLink that `reach` names (`--superlink ... --ca ...`)."""

    def __init__(self, runs: Path, ledger: str, reach: Sequence[str] = ()) -> None:
        self.runs, self.ledger, self.reach = runs, ledger, list(reach)
        self.begun: dict[str, subprocess.Popen[bytes]] = {}
        self.composing = threading.Lock()  # Hydra keeps its state in the process

    def recipes(self) -> list[str]:
        return sorted(path.stem for path in (CONFIGS / "recipe").glob("*.yaml"))

    def start(self, recipe: str, overrides: str) -> str:
        """A new run; returns its id. Raises ConsiliumError for settings that do not fit."""
        try:
            given = shlex.split(overrides)
        except ValueError as error:
            raise ConsiliumError(f"overrides: {error}; quote a value that has spaces") from None
        with self.composing:
            config, _ = settings_of(recipe, given, self.runs)
        run = new_id(config)
        what = ["run" if self.reach else "simulate", "--recipe", recipe, "--id", run]
        self._go(run, [*what, "--runs", str(self.runs), *self.reach, "--", *map(shlex.quote, given)])
        return run

    def resume(self, run: str) -> None:
        """Go on with a run. Raises ConsiliumError where there is none, or it is going on."""
        known = self.begun.get(run)
        if known and known.poll() is None:
            raise ConsiliumError(f"run '{run}' is going on")
        find(self.runs, run)
        what = ["run", "--resume", run, *self.reach] if self.reach else ["resume", run]
        self._go(run, [*what, "--runs", str(self.runs)])

    def fate(self, run: str) -> str:
        """How a process of ours ended whose run never began: its last words; "" while it goes on, or of one that is not ours."""
        process = self.begun.get(run)
        if process is None or process.poll() in (None, 0):
            return ""
        lines = self._log(run).read_text(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit status {process.returncode}"

    def _go(self, run: str, arguments: list[str]) -> None:
        self.runs.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-c", "from server.cli import main; main()", *arguments]
        with self._log(run).open("wb") as log:
            self.begun[run] = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=os.environ | {"CONSILIUM_LEDGER": self.ledger},
            )

    def _log(self, run: str) -> Path:
        return self.runs / f"{run}.console.log"
