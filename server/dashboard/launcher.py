"""Start runs from the console: `consilium-server` in a process of its own, which outlives the console."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from common.config.compose import CONFIG_DIR
from common.utils.errors import ConsiliumError
from server.operations.submission import plan_submission
from server.rounds.run_lifecycle import find_run_dir
from server.run.outcome import clear_outcome, read_outcome


class LaunchedProcess(NamedTuple):
    """A process that this console started."""

    process: subprocess.Popen[bytes]
    started: datetime


class Launcher:
    """Starts and resumes runs, in simulation or at a SuperLink."""

    def __init__(self, runs: Path, ledger_address: str, superlink_options: Sequence[str] = ()) -> None:
        """`superlink_options`: ``--superlink ADDRESS --ca FILE``; empty: runs are simulations."""
        self.runs = runs
        self.ledger_address = ledger_address
        self.superlink_options = list(superlink_options)
        self.launched: dict[str, LaunchedProcess] = {}
        self.compose_lock = threading.Lock()  # Hydra keeps its state in the process

    def list_recipes(self) -> list[str]:
        """Return the names of the recipes."""
        return sorted(path.stem for path in (CONFIG_DIR / "recipe").glob("*.yaml"))

    def start_run(self, recipe: str, overrides: str) -> str:
        """Start a new run; returns its id. Raises ConsiliumError for invalid settings."""
        try:
            override_list = shlex.split(overrides)
        except ValueError as error:
            raise ConsiliumError(f"overrides: {error}; quote a value that has spaces") from None
        with self.compose_lock:
            run_id = plan_submission(recipe, override_list, self.runs).run_id
        command = "run" if self.superlink_options else "simulate"
        quoted_overrides = [shlex.quote(override) for override in override_list]
        options = ["--recipe", recipe, "--id", run_id, "--runs", str(self.runs), *self.superlink_options]
        self._spawn_process(run_id, [command, *options, "--", *quoted_overrides])
        return run_id

    def resume_run(self, run_id: str, since: datetime) -> None:
        """Resume a run that has had its status since the given time.

        A process that we started earlier may still be ending.

        Raises:
            ConsiliumError: there is no such run, or it is being resumed already.
        """
        launched = self.launched.get(run_id)
        if launched and launched.process.poll() is None and launched.started > since:
            raise ConsiliumError(f"run '{run_id}' is already being resumed; this takes about a minute")
        find_run_dir(self.runs, run_id)
        command = ["resume", run_id]
        if self.superlink_options:
            command = ["run", "--resume", run_id, *self.superlink_options]
        self._spawn_process(run_id, [*command, "--runs", str(self.runs)])

    def exit_message(self, run_id: str, since: datetime | None = None) -> str:
        """Return why a process that we started could not start or resume its run.

        `since` is when the run got its present status: a process that we started before it has nothing to
        add. Returns nothing while the process goes on, after a success, or for a run that another process
        started.
        """
        launched = self.launched.get(run_id)
        if launched is None or launched.process.poll() in (None, 0):
            return ""
        if since and launched.started < since:
            return ""
        outcome = read_outcome(self.runs, run_id)
        if outcome and outcome.reason:
            return outcome.reason
        return f"exit status {launched.process.returncode}; see {self._log_path(run_id).name}"

    def _spawn_process(self, run_id: str, arguments: list[str]) -> None:
        self.runs.mkdir(parents=True, exist_ok=True)
        clear_outcome(self.runs, run_id)
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
        self.launched[run_id] = LaunchedProcess(process, datetime.now(UTC))

    def _log_path(self, run_id: str) -> Path:
        return self.runs / f"{run_id}.console.log"
