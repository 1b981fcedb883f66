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

from common.compose import config_from, to_dict
from common.errors import ConsiliumError, nearest
from common.files import write_whole
from common.fingerprint import fingerprint
from common.logs import about
from common.schema import Config
from server import tracking
from server.coordinator import conduct
from server.ledger import Ledger
from server.report import write_report
from server.state import Paused, Run, Stopped
from server.transport import Transport

log = logging.getLogger("consilium.server")


def runs_folder(given: str = "") -> Path:
    """Where runs are kept: as given, else `$CONSILIUM_RUNS`, else `runs` in the working directory."""
    return Path(given or os.environ.get("CONSILIUM_RUNS") or "runs").expanduser().resolve()


def open_ledger(runs: Path, given: str = "") -> Ledger:
    """The ledger: as given, else `$CONSILIUM_LEDGER`, else SQLite in the runs folder."""
    return Ledger(given or os.environ.get("CONSILIUM_LEDGER") or f"sqlite:///{runs / 'ledger.db'}")


def new_id(config: Config) -> str:
    """A name for a run that sorts by time."""
    return f"{datetime.now(UTC):%Y%m%d-%H%M%S}-{config.recipe or 'run'}-{config.federation.mode}-{secrets.token_hex(2)}"


def find(runs: Path, run: str) -> Path:
    """The folder of a run by id or `latest`. Raises ConsiliumError."""
    folder = (runs / run).resolve()
    if not (folder / "config.yaml").is_file():
        known = [p.parent.name for p in runs.glob("*/config.yaml")]
        raise ConsiliumError(f"no run '{run}' in {runs}{nearest(run, known)}")
    return folder


def config_of(folder: Path) -> Config:
    """The configuration that a run was started with."""
    return config_from(yaml.safe_load((folder / "config.yaml").read_text()))


class Study(NamedTuple):
    """The cross-validation that a run is a part of, and the last order that was given before its process began."""

    whole: str
    before: int


def study(ledger: Ledger, whole: str) -> Study:
    """As its process begins."""
    return Study(whole, max((order["id"] for order in ledger.audit(whole)), default=0))


def begin(config: Config, transport: Transport, runs: Path, ledger: Ledger, run: str = "", of: Study | None = None) -> dict[str, Any]:
    """Carry out a new run. Returns its result; raises ConsiliumError."""
    run = run or new_id(config)
    folder = runs / run
    if folder.exists():
        raise ConsiliumError(f"{folder} exists already; give the new run another id, or resume this one")
    ledger.start_run(run, recipe=config.recipe, mode=config.federation.mode, config=to_dict(config), code=fingerprint())
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(to_dict(config), sort_keys=False))
    link = runs / f".latest-{os.getpid()}"
    link.symlink_to(run)
    link.replace(runs / "latest")
    return _carry_out(Run(run, config, folder, transport, ledger), of)


def resume(run: str, transport: Transport, runs: Path, ledger: Ledger, of: Study | None = None) -> dict[str, Any]:
    """Go on with an interrupted or paused run, with the configuration it was started with. Raises ConsiliumError."""
    folder = find(runs, run)
    if (folder / "metrics.json").exists():
        raise ConsiliumError(f"run '{folder.name}' is finished; there is nothing to resume")
    config = config_of(folder)
    said = [] if ledger.status(folder.name) in ("paused", "stopped", "failed") else ["the coordinator's process had ended without a word"]
    begun = next((row["code"] for row in ledger.runs() if row["id"] == folder.name), fingerprint())
    said += [f"by code {fingerprint()}, begun by {begun}"] if begun != fingerprint() else []
    ledger.event(folder.name, "resumed", "; ".join(said))
    return _carry_out(Run(folder.name, config, folder, transport, ledger), of)


def _carry_out(run: Run, of: Study | None) -> dict[str, Any]:
    run.whole, run.before = of or study(run.ledger, run.id)
    curves = os.environ.get("CONSILIUM_TENSORBOARD", "")
    try:
        with about(run=run.id), tracking.live(run.ledger, run.id, run.folder.parent / curves if curves else None) as run.track:
            result = conduct(run)
        _write_results(run, result)
    except Paused as pause:
        status = "stopped" if isinstance(pause, Stopped) else "paused"
        run.ledger.event(run.id, status, str(pause))
        raise ConsiliumError(
            f"run '{run.id}' is {status}: {pause}; go on with `consilium-server resume {run.whole}` (deployed: `run --resume {run.whole}`)"
        ) from None
    except Exception as error:
        with contextlib.suppress(ConsiliumError):  # it may be the ledger that cannot be used: that is the error to tell
            run.ledger.event(run.id, "failed", str(error) if isinstance(error, ConsiliumError) else f"{type(error).__name__}: {error}")
        raise
    run.ledger.event(run.id, "finished")
    log.info("results in %s", run.folder)
    return result


def _write_results(run: Run, result: dict[str, Any]) -> None:
    if all(stage["personal"] for stage in result["stages"]):
        result["notes"].append("nothing was exchanged: every centre kept its own model, and there is no common one to save")
    else:
        about_it = {"config": json.dumps(to_dict(run.config))}
        save_file(dict(run.layout.named(run.weights)), run.folder / "model.safetensors", metadata=about_it)
    write_report(run.folder / "report.html", result)
    write_whole(run.folder / "metrics.json", json.dumps(result, indent=1).encode())  # last: its presence says that the run is finished
