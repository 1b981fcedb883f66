"""Submit a run to a SuperLink, follow it to its end, and tell how it ended.

`flwr run` exits 0 for failed runs; how a run ended is read from the outcome that the coordinator's process
leaves (server/run/outcome.py).
"""

from __future__ import annotations

import contextlib
import json
import shlex
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from common.config.compose import compose_config
from common.config.schema import Config
from common.modeling.encoder import check_backbone
from common.utils.cli_main import print_plain
from common.utils.errors import ConsiliumError
from common.utils.log_setup import parse_log_message
from server.operations.local_superlink import SuperLinkAccess, find_tool
from server.reporting.terminal_tables import build_result_table
from server.rounds.cross_validation import is_cross_validation
from server.rounds.run_lifecycle import SUMMARY_FILE, find_run_dir, generate_run_id, load_run_config
from server.run.outcome import clear_outcome, read_outcome
from server.run.records import parse_result, parse_summary

APP_FOLDER = Path(__file__).resolve().parents[2]
POLL_INTERVAL = 2  # seconds
# A table per centre needs the width, also in a CI log.
rich_console = Console(width=max(Console().width, 110))


@dataclass(frozen=True)
class Submission:
    """A run that is to be submitted: new, or resumed."""

    config: Config
    settings: Mapping[str, str]  # for `flwr run -c`
    runs_dir: Path
    run_id: str

    @property
    def log_path(self) -> Path:
        """Return where the run's log is written until it has a folder."""
        return self.runs_dir / f"{self.run_id}.log"

    @property
    def result_path(self) -> Path:
        """Return the file that a finished run leaves."""
        name = SUMMARY_FILE if is_cross_validation(self.config) else "metrics.json"
        return self.runs_dir / self.run_id / name


def plan_submission(
    recipe: str, overrides: list[str], runs_dir: Path, resume_id: str = "", run_id: str = ""
) -> Submission:
    """Check the settings of a run to be started, or of one to be resumed, before anything is started.

    Raises:
        ConsiliumError: the settings are invalid, or there is no such run.
    """
    if resume_id:
        run_dir = find_run_dir(runs_dir, resume_id)
        settings = {"resume": run_dir.name, "runs": str(runs_dir)}
        return Submission(load_run_config(run_dir), settings, runs_dir, run_dir.name)
    config = compose_config([f"recipe={recipe}", *overrides])
    check_backbone(config.backbone)  # refused here at once, rather than by the server in twenty seconds
    run_id = run_id or generate_run_id(config)
    settings = {"recipe": recipe, "overrides": shlex.join(overrides), "run": run_id, "runs": str(runs_dir)}
    return Submission(config, settings, runs_dir, run_id)


def submit_run(
    submission: Submission,
    access: SuperLinkAccess,
    extra_arguments: list[str],
    superlink_timeout: float = 0,
) -> Path:
    """Start a run, follow it to its end and print its table; returns the run's folder.

    `superlink_timeout`: for how many seconds to wait for a SuperLink that is away.

    Raises:
        ConsiliumError: the run was refused, failed or did not finish.
    """
    runs_dir, run_id = submission.runs_dir, submission.run_id
    runs_dir.mkdir(parents=True, exist_ok=True)
    clear_outcome(runs_dir, run_id)
    flower_run_id = _start_app(submission, access, extra_arguments)
    centres = ", ".join(submission.config.federation.centres)
    rich_console.print(f"run [bold]{run_id}[/]  ({centres}; Flower run {flower_run_id})", highlight=False)
    flower_status = _follow_run(flower_run_id, access, submission.log_path, superlink_timeout)
    _require_success(submission, flower_status)
    submission.log_path.replace(runs_dir / run_id / "flower.log")
    _print_result(submission)
    return runs_dir / run_id


def _start_app(submission: Submission, access: SuperLinkAccess, extra_arguments: list[str]) -> str:
    """Submit the app; returns Flower's id of the run. Raises ConsiliumError."""
    settings_file = access.home / "run.toml"  # as arguments, Flower would cut values at their quotes
    lines = [
        f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in submission.settings.items()
    ]
    settings_file.write_text("".join(lines))
    command = [find_tool("flwr"), "run", str(APP_FOLDER), "local", "-c", str(settings_file)]
    submitted = subprocess.run(
        [*command, *extra_arguments, "--format", "json"],
        env=access.environment,
        cwd=access.home,
        capture_output=True,
        text=True,
    )
    try:
        return str(json.loads(submitted.stdout)["run-id"])
    except (ValueError, KeyError) as error:
        output = (submitted.stdout + submitted.stderr).strip()
        raise ConsiliumError(f"flwr run refused the app: {output[-600:]}") from error


def _follow_run(flower_run_id: str, access: SuperLinkAccess, log_path: Path, superlink_timeout: float) -> str:
    """Follow the run until it ends or its SuperLink is away for too long; returns Flower's status."""
    lines_shown = 0
    give_up_at = time.monotonic() + superlink_timeout
    while True:
        lines_shown = _stream_log(flower_run_id, access, log_path, lines_shown)
        status = _read_flower_status(flower_run_id, access)
        if status != "unknown":
            give_up_at = time.monotonic() + superlink_timeout
        if status.startswith("finished") or time.monotonic() >= give_up_at:
            return status
        time.sleep(POLL_INTERVAL)


def _stream_log(flower_run_id: str, access: SuperLinkAccess, log_path: Path, lines_shown: int) -> int:
    """Copy the run's log to a file, and our own lines of it to the terminal.

    The first `lines_shown` of our lines were shown before a broken connection. Returns how many are shown
    now.
    """
    command = [find_tool("flwr"), "log", flower_run_id, "local", "--stream"]
    num_lines = 0
    with (
        log_path.open("a") as log_file,
        subprocess.Popen(
            command,
            env=access.environment,
            cwd=access.home,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process,
    ):
        for line in process.stdout or []:
            message = parse_log_message(line)
            if message is not None:
                num_lines += 1
            was_shown = message is not None and num_lines <= lines_shown
            if was_shown or line.startswith("Using SuperLink"):
                continue
            log_file.write(line)
            log_file.flush()
            if message is not None:
                print_plain(rich_console, message)
    return max(num_lines, lines_shown)


def _read_flower_status(flower_run_id: str, access: SuperLinkAccess) -> str:
    command = [find_tool("flwr"), "ls", "local", "--run-id", flower_run_id, "--format", "json"]
    listed = subprocess.run(command, env=access.environment, cwd=access.home, capture_output=True, text=True)
    with contextlib.suppress(ValueError, KeyError, IndexError):
        return str(json.loads(listed.stdout)["runs"][0]["status"])
    return "unknown"


def _require_success(submission: Submission, flower_status: str) -> None:
    """Raise ConsiliumError with the reason for which a run did not finish."""
    outcome = read_outcome(submission.runs_dir, submission.run_id)
    if outcome is None:
        raise ConsiliumError(
            f"the run ended as '{flower_status}' without a result; its log is {submission.log_path}. "
            f"Resume {submission.run_id} to continue from its last round"
        )
    if not outcome.succeeded:
        raise ConsiliumError(outcome.reason)
    if not submission.result_path.is_file():
        raise ConsiliumError(
            f"the run finished, but {submission.result_path} is missing; look at {submission.log_path}"
        )


def _print_result(submission: Submission) -> None:
    result_path = submission.result_path
    values = json.loads(result_path.read_text())
    if result_path.name == SUMMARY_FILE:
        rich_console.print(build_result_table(parse_summary(values).total))
        print_plain(rich_console, f"cross-validation: {result_path}")
    else:
        rich_console.print(build_result_table(parse_result(values)))
        print_plain(rich_console, f"report: {result_path.with_name('report.html')}")
