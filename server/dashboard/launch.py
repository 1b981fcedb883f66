"""Runs begun from the console: `consilium-server` in a process of its own, which outlives the console."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from common.compose import CONFIGS
from common.errors import ConsiliumError
from server.runs import find, new_id
from server.simulate import settings_of


class Launcher:
    """Starts and resumes runs: in simulation, or at the SuperLink that `reach` names (`--superlink ... --ca ...`)."""

    def __init__(self, runs: Path, ledger: str, reach: Sequence[str] = ()) -> None:
        self.runs, self.ledger, self.reach = runs, ledger, list(reach)
        self.begun: dict[str, tuple[subprocess.Popen[bytes], datetime]] = {}
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

    def resume(self, run: str, since: datetime) -> None:
        """Go on with a run whose status is what it is `since` then: a process of ours from before may still be on its way out. Raises
        ConsiliumError where there is no such run, or it is being taken up already."""
        known = self.begun.get(run)
        if known and known[0].poll() is None and known[1] > since:
            raise ConsiliumError(f"run '{run}' is being taken up; that takes a minute")
        find(self.runs, run)
        what = ["run", "--resume", run, *self.reach] if self.reach else ["resume", run]
        self._go(run, [*what, "--runs", str(self.runs)])

    def fate(self, run: str, since: datetime | None = None) -> str:
        """How a process of ours ended whose run never began, or was not taken up (its status is what it is `since` before): its last words; "" while
        it goes on, or of one that is not ours."""
        process, began = self.begun.get(run, (None, None))
        if process is None or process.poll() in (None, 0) or (since and began and began < since):
            return ""
        lines = self._log(run).read_text(errors="replace").strip().splitlines()
        return lines[-1].removeprefix("error: ") if lines else f"exit status {process.returncode}"

    def _go(self, run: str, arguments: list[str]) -> None:
        self.runs.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-c", "from server.cli import main; main()", *arguments]
        with self._log(run).open("ab") as log:
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=os.environ | {"CONSILIUM_LEDGER": self.ledger},
            )
        self.begun[run] = process, datetime.now(UTC)

    def _log(self, run: str) -> Path:
        return self.runs / f"{run}.console.log"
