"""A run in Flower's simulation, by `flwr run`, as one command that tells the truth about how it ended and leaves nothing running.

`flwr run` exits 0 for failed runs, a SuperLink that it starts stays behind, and simulated clients import from the SuperLink's working directory:
so this starts a SuperLink of its own in an empty folder with a home and a port of its own, submits the app, follows its log, reads the run's
status and stops every process it started.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx
from rich.console import Console

from common.config.compose import compose_config
from common.config.schema import Config
from common.modeling.model import check_backbone
from common.utils.cli_main import print_plain
from common.utils.errors import ConsiliumError
from common.utils.log_setup import parse_log_message
from server.reporting.report import build_result_table
from server.rounds.cross_validation import SUMMARY_FILE, expand_folds
from server.rounds.run_lifecycle import find_run_dir, generate_run_id, load_run_config, resolve_runs_dir

APP_FOLDER = Path(__file__).resolve().parent.parent
QUIET_ENVIRONMENT = {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
rich_console = Console(width=max(Console().width, 110))  # a table per centre needs the room, also in a CI log


def run_simulation(
    recipe: str,
    overrides: list[str],
    runs: str = "",
    resume_id: str = "",
    gpus: float = 0.0,
    run_id: str = "",
) -> Path:
    """Run to the end and print the table per centre; returns the run's folder. Raises ConsiliumError when the run did not finish."""
    folder = resolve_runs_dir(runs)
    config, settings = resolve_run_settings(recipe, overrides, folder, resume_id, run_id)
    nodes = 1 if config.federation.mode == "central" else len(config.federation.centres)
    federation = f"num-supernodes={nodes} client-resources-num-cpus=1 client-resources-num-gpus={gpus}"
    with start_superlink() as (home, environment):
        return submit_run(config, settings, folder, home, environment, ["--federation-config", federation])


def resolve_run_settings(
    recipe: str, overrides: list[str], runs: Path, resume_id: str = "", run_id: str = ""
) -> tuple[Config, dict[str, str]]:
    """The configuration of a run to be started or resumed, and the run's settings for `flwr run -c`. Raises ConsiliumError."""
    if resume_id:
        kept = find_run_dir(runs, resume_id)
        return load_run_config(kept), {"resume": kept.name, "runs": str(runs)}
    config = compose_config([f"recipe={recipe}", *overrides])
    check_backbone(config.backbone)  # refused here, at once, rather than by the server in twenty seconds
    return config, {
        "recipe": recipe,
        "overrides": shlex.join(overrides),
        "run": run_id or generate_run_id(config),
        "runs": str(runs),
    }


def submit_run(
    config: Config,
    settings: Mapping[str, str],
    runs: Path,
    home: Path,
    environment: dict[str, str],
    extra_arguments: list[str],
    superlink_timeout: float = 0,
) -> Path:
    """Start a run at the SuperLink that `environment` reaches, follow it to its end, print its table; returns its folder. A SuperLink that
    is away is waited for, for `patience` seconds. Raises ConsiliumError."""
    run = settings.get("run") or settings["resume"]
    runs.mkdir(parents=True, exist_ok=True)
    given = home / "run.toml"  # as arguments Flower would cut values at their quotes
    given.write_text(
        "".join(f"{key} = {json.dumps(value, ensure_ascii=False)}\n" for key, value in settings.items())
    )
    command = [
        "flwr",
        "run",
        str(APP_FOLDER),
        "local",
        "-c",
        str(given),
        *extra_arguments,
        "--format",
        "json",
    ]
    submitted = subprocess.run(
        [_tool_path(command[0]), *command[1:]], env=environment, cwd=home, capture_output=True, text=True
    )
    try:
        run_id = str(json.loads(submitted.stdout)["run-id"])
    except (ValueError, KeyError) as error:
        raise ConsiliumError(
            f"flwr run refused the app: {(submitted.stdout + submitted.stderr).strip()[-600:]}"
        ) from error
    rich_console.print(
        f"run [bold]{run}[/]  ({', '.join(config.federation.centres)}; Flower run {run_id})", highlight=False
    )
    last, status = follow_run(run_id, home, environment, runs / f"{run}.log", superlink_timeout)
    metrics = runs / run / (SUMMARY_FILE if expand_folds(config) else "metrics.json")
    if last or not metrics.is_file():  # a finished run's results are not those of a resume that was refused
        lost = f"the run ended as '{status}' without results; its log is {runs / f'{run}.log'}"
        raise ConsiliumError(last or f"{lost}; resume {run} goes on from its last round")
    (runs / f"{run}.log").replace(runs / run / "flower.log")
    rich_console.print(build_result_table(json.loads(metrics.read_text())))
    what = (
        f"cross-validation: {metrics}"
        if metrics.name == SUMMARY_FILE
        else f"report: {runs / run / 'report.html'}"
    )
    print_plain(rich_console, what)
    return runs / run


@contextlib.contextmanager
def start_superlink() -> Iterator[tuple[Path, dict[str, str]]]:
    """A SuperLink in an empty folder; yields the folder and the environment that reaches it. Its whole process group ends with it."""
    short = (
        None if len(tempfile.gettempdir()) < 40 else "/tmp"
    )  # Ray's sockets lie in it, and a socket's path has 107 characters at most
    with tempfile.TemporaryDirectory(prefix="consilium-", dir=short, ignore_cleanup_errors=True) as temporary:
        home, empty = Path(temporary) / "flwr", Path(temporary) / "empty"
        home.mkdir()
        empty.mkdir()
        port = _free_port()
        (home / "config.toml").write_text(
            f'[superlink]\ndefault = "local"\n\n[superlink.local]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        )
        own = {
            "FLWR_HOME": str(home),
            "RAY_TMPDIR": temporary,
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        }
        environment = os.environ | QUIET_ENVIRONMENT | own
        command = [
            _tool_path("flower-superlink"),
            "--insecure",
            "--simulation",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
        ]
        with (Path(temporary) / "superlink.log").open("w") as log:
            process = subprocess.Popen(
                command, cwd=empty, env=environment, stdout=log, stderr=log, start_new_session=True
            )
        try:
            _wait_until_healthy(f"http://127.0.0.1:{port}/health", process, Path(temporary) / "superlink.log")
            yield empty, environment
        finally:
            _stop_processes(process, temporary)


def follow_run(
    flower_run_id: str, home: Path, environment: dict[str, str], log_path: Path, superlink_timeout: float = 0
) -> tuple[str, str]:
    """Follow the run until it ends, or its SuperLink is away for `patience` seconds; returns the last error sentence and Flower's status."""
    last, seen, until = "", 0, time.monotonic() + superlink_timeout
    while True:
        sentence, seen = stream_log(flower_run_id, home, environment, log_path, seen)
        last, status = sentence or last, _flower_status(flower_run_id, home, environment)
        if status != "unknown":
            until = time.monotonic() + superlink_timeout
        if status.startswith("finished") or time.monotonic() >= until:
            return last, status
        time.sleep(2)


def stream_log(
    flower_run_id: str, home: Path, environment: dict[str, str], log_path: Path, lines_seen: int
) -> tuple[str, int]:
    """The run's log to a file and our own lines of it to the terminal, but for the first `seen` of ours; returns the last error sentence and
    how many there are by now."""
    last, number = "", 0
    command = [_tool_path("flwr"), "log", flower_run_id, "local", "--stream"]
    with (
        log_path.open("a") as kept,
        subprocess.Popen(
            command, env=environment, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process,
    ):
        for text in process.stdout or []:
            sentence = parse_log_message(text)
            number += sentence is not None
            if (sentence is not None and number <= lines_seen) or text.startswith("Using SuperLink"):
                continue
            kept.write(text)
            kept.flush()
            if sentence is not None:
                if sentence.startswith("error: "):
                    last = sentence.removeprefix("error: ")
                else:
                    print_plain(rich_console, sentence)
    return last, max(number, lines_seen)


def _flower_status(flower_run_id: str, home: Path, environment: dict[str, str]) -> str:
    command = [_tool_path("flwr"), "ls", "local", "--run-id", flower_run_id, "--format", "json"]
    listed = subprocess.run(command, env=environment, cwd=home, capture_output=True, text=True)
    with contextlib.suppress(ValueError, KeyError, IndexError):
        return str(json.loads(listed.stdout)["runs"][0]["status"])
    return "unknown"


def _tool_path(name: str) -> str:
    """A command of the same environment as this Python."""
    return str(Path(sys.executable).parent / name)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if process.poll() is not None:
            break
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url, timeout=1).is_success:
                return
        time.sleep(0.2)
    raise ConsiliumError(f"Flower's SuperLink did not start: {log.read_text()[-400:].strip()}")


def _stop_processes(process: subprocess.Popen[bytes], marker: str) -> None:
    """End the SuperLink's session, and what Ray put into sessions of its own: those carry our temporary folder in their environment."""
    for signal_ in (signal.SIGTERM, signal.SIGKILL):
        for pid in _find_processes(marker, process.pid):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal_)
        until = time.monotonic() + (8 if signal_ is signal.SIGTERM else 3)
        while time.monotonic() < until and _find_processes(marker, process.pid):
            process.poll()
            time.sleep(0.1)
    process.wait()


def _find_processes(marker: str, leader: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                state = (entry / "stat").read_text().rpartition(")")[2].split()
                if state[0] != "Z" and (
                    int(state[3]) == leader
                    or f"RAY_TMPDIR={marker}".encode() in (entry / "environ").read_bytes()
                ):
                    found.append(int(entry.name))
    return found
