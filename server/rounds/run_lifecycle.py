"""Run lifecycle: create or resume a run, execute it, write its results, record its final status."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple, NoReturn

import yaml
from safetensors.numpy import save_file

from common.config.parse import config_to_dict, parse_config
from common.config.renamed_keys import upgrade_config
from common.config.schema import Config
from common.protocol.code_fingerprint import fingerprint_code
from common.utils.atomic_files import atomic_write
from common.utils.errors import ConsiliumError, suggest
from common.utils.log_setup import log_context
from server.ledger.ledger import Ledger
from server.reporting import tensorboard
from server.reporting.report import write_report
from server.rounds.coordinator import run_training
from server.run.records import RunResult, result_to_dict
from server.run.run_state import OperatorCommands, Run, RunPaused, RunStopped
from server.run.transport import Transport

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.json"
SUMMARY_FILE = "crossval.json"  # of a cross-validation
ORDERLY_ENDS = ("paused", "stopped", "failed")  # the status of a run whose process wrote one before it ended
log = logging.getLogger("consilium.server")


# --- where runs are


def resolve_runs_dir(path: str = "") -> Path:
    """Return the folder of the runs: the given one, else `$CONSILIUM_RUNS`, else ``./runs``."""
    return Path(path or os.environ.get("CONSILIUM_RUNS") or "runs").expanduser().resolve()


def open_ledger(runs_dir: Path, address: str = "") -> Ledger:
    """Open the ledger: the given one, else `$CONSILIUM_LEDGER`, else SQLite in the runs folder."""
    return Ledger(resolve_ledger_address(runs_dir, address))


def resolve_ledger_address(runs_dir: Path, address: str = "") -> str:
    """Return the address of the ledger that `open_ledger` opens."""
    return address or os.environ.get("CONSILIUM_LEDGER") or f"sqlite:///{runs_dir / 'ledger.db'}"


def generate_run_id(config: Config) -> str:
    """Return a new id; ids sort by time."""
    recipe = config.recipe or "run"
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{recipe}-{config.federation.mode}-{secrets.token_hex(2)}"


def find_run_dir(runs_dir: Path, run_id: str) -> Path:
    """Return the folder of a run by its id or ``latest``. Raises ConsiliumError where there is none."""
    folder = (runs_dir / run_id).resolve()
    if not (folder / CONFIG_FILE).is_file():
        run_ids = [path.parent.name for path in runs_dir.glob(f"*/{CONFIG_FILE}")]
        raise ConsiliumError(f"there is no run '{run_id}' in {runs_dir}{suggest(run_id, run_ids)}")
    return folder


def load_run_config(run_dir: Path) -> Config:
    """Load the configuration that a run was started with. Raises ConsiliumError for a run of 0.1.0."""
    values = yaml.safe_load((run_dir / CONFIG_FILE).read_text())
    if upgrade_config(values) == values:
        return parse_config(values)
    if is_finished(run_dir):
        remedy = "convert all finished runs with `consilium-server upgrade`"
    else:
        remedy = "finish it with that version, or start a new run"
    raise ConsiliumError(f"run '{run_dir.name}' was started by version 0.1.0; {remedy}")


def is_finished(run_dir: Path) -> bool:
    """Tell whether a run or cross-validation is finished: its results are the last that it writes."""
    return (run_dir / METRICS_FILE).is_file() or (run_dir / SUMMARY_FILE).is_file()


def create_run_dir(folder: Path, config: Config) -> None:
    """Create a run's folder with its configuration."""
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).write_text(yaml.safe_dump(config_to_dict(config), sort_keys=False))


# --- start and resume


class CommandScope(NamedTuple):
    """Which operators' commands a run of a cross-validation obeys."""

    root_run_id: str  # the cross-validation's id, which the commands name
    stale_command_id: int  # commands up to this one were given before the process began


def make_command_scope(ledger: Ledger, root_run_id: str) -> CommandScope:
    """Return the scope as a process begins: the commands so far are stale."""
    command_ids = [row["id"] for row in ledger.read_audit(root_run_id)]
    return CommandScope(root_run_id, max(command_ids, default=0))


def start_run(
    config: Config,
    transport: Transport,
    runs_dir: Path,
    ledger: Ledger,
    run_id: str = "",
    scope: CommandScope | None = None,
) -> RunResult:
    """Execute a new run and return its result. A run of a cross-validation has the `scope` of that.

    Raises ConsiliumError.
    """
    run_id = run_id or generate_run_id(config)
    folder = runs_dir / run_id
    if folder.exists():
        raise ConsiliumError(f"{folder} exists already; give the new run another id, or resume this one")
    ledger.add_run(
        run_id,
        recipe=config.recipe,
        mode=config.federation.mode,
        config=config_to_dict(config),
        code_fingerprint=fingerprint_code(),
        parent_run_id=scope.root_run_id if scope else None,
    )
    create_run_dir(folder, config)
    _point_latest_to(folder)
    return _execute_run(Run(run_id, config, folder, transport, ledger), scope)


def resume_run(
    run_id: str, transport: Transport, runs_dir: Path, ledger: Ledger, scope: CommandScope | None = None
) -> RunResult:
    """Continue an interrupted or paused run, with the configuration that it was started with.

    Raises ConsiliumError.
    """
    folder = find_run_dir(runs_dir, run_id)
    if (folder / METRICS_FILE).exists():
        raise ConsiliumError(f"run '{folder.name}' is finished; there is nothing to resume")
    config = load_run_config(folder)
    ledger.log_event(folder.name, "resumed", _describe_resumption(ledger, folder.name))
    return _execute_run(Run(folder.name, config, folder, transport, ledger), scope)


def _point_latest_to(folder: Path) -> None:
    """Let the link ``latest`` in the runs folder name this run; there is always one."""
    link = folder.parent / f".latest-{os.getpid()}"
    link.symlink_to(folder.name)
    link.replace(folder.parent / "latest")


def _describe_resumption(ledger: Ledger, run_id: str) -> str:
    """Return what is unusual about a resumption: a process that was killed, other code than at the start."""
    remarks = []
    if ledger.read_status(run_id) not in ORDERLY_ENDS:
        remarks.append("the previous coordinator process exited without a status")
    row = ledger.read_run(run_id)
    here = fingerprint_code()
    if row and row["code_fingerprint"] != here:
        remarks.append(f"by code {here}, started by {row['code_fingerprint']}")
    return "; ".join(remarks)


# --- execution


def _execute_run(run: Run, scope: CommandScope | None) -> RunResult:
    scope = scope or make_command_scope(run.ledger, run.run_id)
    run.commands = OperatorCommands(scope.root_run_id, scope.stale_command_id)
    try:
        with log_context(run=run.run_id), _live_curves(run):
            result = run_training(run)
        _write_results(run, result)
    except RunPaused as pause:
        _raise_paused(run, pause)
    except Exception as error:
        _log_failure(run, error)
        raise
    run.ledger.log_event(run.run_id, "finished")
    log.info("results in %s", run.run_dir)
    return result


@contextlib.contextmanager
def _live_curves(run: Run) -> Iterator[None]:
    """Write curves for TensorBoard after every round, if `$CONSILIUM_TENSORBOARD` names a folder for them."""
    folder_name = os.environ.get("CONSILIUM_TENSORBOARD", "")
    folder = run.run_dir.parent / folder_name if folder_name else None
    with tensorboard.live_writer(run.ledger, run.run_id, folder) as write_round:
        run.on_round_end = write_round
        yield


def _raise_paused(run: Run, pause: RunPaused) -> NoReturn:
    """Record that the run is paused or stopped, and raise the sentence that says how to resume it."""
    status = "stopped" if isinstance(pause, RunStopped) else "paused"
    run.ledger.log_event(run.run_id, status, str(pause))
    root_run_id = run.commands.root_run_id
    raise ConsiliumError(
        f"run '{run.run_id}' is {status}: {pause}; continue it with `consilium-server resume {root_run_id}` "
        f"(deployed: `run --resume {root_run_id}`)"
    ) from None


def _log_failure(run: Run, error: Exception) -> None:
    detail = str(error)
    if not isinstance(error, ConsiliumError):
        detail = f"{type(error).__name__}: {error}"
    with contextlib.suppress(
        ConsiliumError
    ):  # the ledger may be what failed: then that is the error to report
        run.ledger.log_event(run.run_id, "failed", detail)


def _write_results(run: Run, result: RunResult) -> None:
    if all(stage.local_only for stage in result.stages):
        result.notes.append(
            "no weights were exchanged: every centre has its own model, and there is no shared one to save"
        )
    else:
        tensors = dict(run.model.layout.to_state_dict(run.model.weights))
        metadata = {"config": json.dumps(run.config_values)}
        save_file(tensors, run.run_dir / "model.safetensors", metadata=metadata)
    write_report(run.run_dir / "report.html", result)
    # Last, because its presence means that the run is finished.
    atomic_write(run.run_dir / METRICS_FILE, json.dumps(result_to_dict(result), indent=1).encode())
