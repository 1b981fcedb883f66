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

from common.config.compose import CONFIG_DIR
from common.utils.errors import ConsiliumError
from server.operations.simulation import resolve_run_settings
from server.rounds.run_lifecycle import find_run_dir, generate_run_id


class Launcher:
    """Starts and resumes runs: in simulation, or at the SuperLink that `reach` names (`--superlink ... --ca ...`)."""

    def __init__(self, runs: Path, ledger_address: str, superlink_options: Sequence[str] = ()) -> None:
        self.runs, self.ledger_address, self.superlink_options = runs, ledger_address, list(superlink_options)
        self.processes: dict[str, tuple[subprocess.Popen[bytes], datetime]] = {}
        self.compose_lock = threading.Lock()  # Hydra keeps its state in the process

    def list_recipes(self) -> list[str]:
        return sorted(path.stem for path in (CONFIG_DIR / "recipe").glob("*.yaml"))

    def start_run(self, recipe: str, overrides: str) -> str:
        """A new run; returns its id. Raises ConsiliumError for settings that do not fit."""
        try:
            given = shlex.split(overrides)
        except ValueError as error:
            raise ConsiliumError(f"overrides: {error}; quote a value that has spaces") from None
        with self.compose_lock:
            config, _ = resolve_run_settings(recipe, given, self.runs)
        run = generate_run_id(config)
        what = ["run" if self.superlink_options else "simulate", "--recipe", recipe, "--id", run]
        self._spawn_process(
            run, [*what, "--runs", str(self.runs), *self.superlink_options, "--", *map(shlex.quote, given)]
        )
        return run

    def resume_run(self, run_id: str, since: datetime) -> None:
        """Go on with a run whose status is what it is `since` then: a process of ours from before may still be on its way out. Raises
        ConsiliumError where there is no such run, or it is being taken up already."""
        known = self.processes.get(run_id)
        if known and known[0].poll() is None and known[1] > since:
            raise ConsiliumError(f"run '{run_id}' is being taken up; that takes a minute")
        find_run_dir(self.runs, run_id)
        what = (
            ["run", "--resume", run_id, *self.superlink_options]
            if self.superlink_options
            else ["resume", run_id]
        )
        self._spawn_process(run_id, [*what, "--runs", str(self.runs)])

    def exit_message(self, run_id: str, since: datetime | None = None) -> str:
        """How a process of ours ended whose run never began, or was not taken up (its status is what it is `since` before): its last words; "" while
        it goes on, or of one that is not ours."""
        process, began = self.processes.get(run_id, (None, None))
        if process is None or process.poll() in (None, 0) or (since and began and began < since):
            return ""
        lines = self._log_path(run_id).read_text(errors="replace").strip().splitlines()
        return lines[-1].removeprefix("error: ") if lines else f"exit status {process.returncode}"

    def _spawn_process(self, run_id: str, arguments: list[str]) -> None:
        self.runs.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-c", "from server.cli import main; main()", *arguments]
        with self._log_path(run_id).open("ab") as log:
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env=os.environ | {"CONSILIUM_LEDGER": self.ledger_address},
            )
        self.processes[run_id] = process, datetime.now(UTC)

    def _log_path(self, run_id: str) -> Path:
        return self.runs / f"{run_id}.console.log"
