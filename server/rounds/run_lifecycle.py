"""A run from its folder's point of view: made or taken up again, carried out, its results written, its end noted whatever it was."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from safetensors.numpy import save_file

from common.config.compose import config_to_dict, parse_config
from common.config.schema import Config
from common.protocol.code_fingerprint import fingerprint_code
from common.utils.atomic_files import atomic_write
from common.utils.errors import ConsiliumError, suggest
from common.utils.log_setup import log_context
from server.ledger.ledger import Ledger
from server.reporting import tensorboard
from server.reporting.report import write_report
from server.rounds.coordinator import run_training
from server.run.run_state import Run, RunPaused, RunStopped
from server.run.transport import Transport

log = logging.getLogger("consilium.server")


def resolve_runs_dir(path: str = "") -> Path:
    """Where runs are kept: as given, else `$CONSILIUM_RUNS`, else `runs` in the working directory."""
    return Path(path or os.environ.get("CONSILIUM_RUNS") or "runs").expanduser().resolve()


def open_ledger(runs_dir: Path, address: str = "") -> Ledger:
    """The ledger: as given, else `$CONSILIUM_LEDGER`, else SQLite in the runs folder."""
    return Ledger(address or os.environ.get("CONSILIUM_LEDGER") or f"sqlite:///{runs_dir / 'ledger.db'}")


def generate_run_id(config: Config) -> str:
    """A name for a run that sorts by time."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{config.recipe or 'run'}-{config.federation.mode}-{secrets.token_hex(2)}"


def find_run_dir(runs_dir: Path, run_id: str) -> Path:
    """The folder of a run by id or `latest`. Raises ConsiliumError."""
    folder = (runs_dir / run_id).resolve()
    if not (folder / "config.yaml").is_file():
        known = [p.parent.name for p in runs_dir.glob("*/config.yaml")]
        raise ConsiliumError(f"no run '{run_id}' in {runs_dir}{suggest(run_id, known)}")
    return folder


def load_run_config(run_dir: Path) -> Config:
    """The configuration that a run was started with."""
    return parse_config(yaml.safe_load((run_dir / "config.yaml").read_text()))


class CommandScope(NamedTuple):
    """The cross-validation that a run is a part of, and the last order that was given before its process began."""

    root_run_id: str
    stale_command_id: int


def make_command_scope(ledger: Ledger, root_run_id: str) -> CommandScope:
    """As its process begins."""
    return CommandScope(
        root_run_id, max((order["id"] for order in ledger.read_audit(root_run_id)), default=0)
    )


def start_run(
    config: Config,
    transport: Transport,
    runs_dir: Path,
    ledger: Ledger,
    run_id: str = "",
    scope: CommandScope | None = None,
) -> dict[str, Any]:
    """Carry out a new run. Returns its result; raises ConsiliumError."""
    run_id = run_id or generate_run_id(config)
    folder = runs_dir / run_id
    if folder.exists():
        raise ConsiliumError(f"{folder} exists already; give the new run another id, or resume this one")
    ledger.add_run(
        run_id,
        recipe=config.recipe,
        mode=config.federation.mode,
        config=config_to_dict(config),
        code=fingerprint_code(),
    )
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config_to_dict(config), sort_keys=False))
    link = runs_dir / f".latest-{os.getpid()}"
    link.symlink_to(run_id)
    link.replace(runs_dir / "latest")
    return _execute_run(Run(run_id, config, folder, transport, ledger), scope)


def resume_run(
    run_id: str, transport: Transport, runs_dir: Path, ledger: Ledger, scope: CommandScope | None = None
) -> dict[str, Any]:
    """Go on with an interrupted or paused run, with the configuration it was started with. Raises ConsiliumError."""
    folder = find_run_dir(runs_dir, run_id)
    if (folder / "metrics.json").exists():
        raise ConsiliumError(f"run '{folder.name}' is finished; there is nothing to resume")
    config = load_run_config(folder)
    said = (
        []
        if ledger.read_status(folder.name) in ("paused", "stopped", "failed")
        else ["the coordinator's process had ended without a word"]
    )
    begun = next((row["code"] for row in ledger.read_runs() if row["id"] == folder.name), fingerprint_code())
    said += [f"by code {fingerprint_code()}, begun by {begun}"] if begun != fingerprint_code() else []
    ledger.log_event(folder.name, "resumed", "; ".join(said))
    return _execute_run(Run(folder.name, config, folder, transport, ledger), scope)


def _execute_run(run: Run, scope: CommandScope | None) -> dict[str, Any]:
    run.root_run_id, run.stale_command_id = scope or make_command_scope(run.ledger, run.run_id)
    curves = os.environ.get("CONSILIUM_TENSORBOARD", "")
    try:
        with (
            log_context(run=run.run_id),
            tensorboard.live_writer(
                run.ledger, run.run_id, run.run_dir.parent / curves if curves else None
            ) as run.on_round_end,
        ):
            result = run_training(run)
        _write_results(run, result)
    except RunPaused as pause:
        status = "stopped" if isinstance(pause, RunStopped) else "paused"
        run.ledger.log_event(run.run_id, status, str(pause))
        raise ConsiliumError(
            f"run '{run.run_id}' is {status}: {pause}; go on with `consilium-server resume {run.root_run_id}` (deployed: `run --resume {run.root_run_id}`)"
        ) from None
    except Exception as error:
        with contextlib.suppress(
            ConsiliumError
        ):  # it may be the ledger that cannot be used: that is the error to tell
            run.ledger.log_event(
                run.run_id,
                "failed",
                str(error) if isinstance(error, ConsiliumError) else f"{type(error).__name__}: {error}",
            )
        raise
    run.ledger.log_event(run.run_id, "finished")
    log.info("results in %s", run.run_dir)
    return result


def _write_results(run: Run, result: dict[str, Any]) -> None:
    if all(stage["personal"] for stage in result["stages"]):
        result["notes"].append(
            "nothing was exchanged: every centre kept its own model, and there is no common one to save"
        )
    else:
        about_it = {"config": json.dumps(config_to_dict(run.config))}
        save_file(
            dict(run.layout.to_state_dict(run.weights)), run.run_dir / "model.safetensors", metadata=about_it
        )
    write_report(run.run_dir / "report.html", result)
    atomic_write(
        run.run_dir / "metrics.json", json.dumps(result, indent=1).encode()
    )  # last: its presence says that the run is finished
