"""Flower's ServerApp: reads the run's settings and executes the run with Flower's grid as its transport."""

from __future__ import annotations

import logging
import shlex
from contextlib import nullcontext

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from common.config.compose import compose_config
from common.utils.errors import ConsiliumError
from common.utils.log_setup import configure_logging
from server.rounds.cross_validation import resume_run_or_folds, start_run_or_folds
from server.rounds.run_lifecycle import generate_run_id, open_ledger, resolve_runs_dir
from server.run.flower_transport import FlowerTransport
from server.run.outcome import record_outcome
from server.run.stop_signal import StopSignal

FLOWER_LOGGER = "flwr"
app = ServerApp()
log = logging.getLogger("consilium.server")


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Execute one run, new or resumed, and leave its outcome for the command that submitted it."""
    settings = {key: str(value) for key, value in context.run_config.items()}
    configure_logging()
    logging.getLogger(FLOWER_LOGGER).addFilter(drop_traceback)
    stop_signal = StopSignal()
    runs_dir = resolve_runs_dir(settings["runs"])
    submitted_id = settings["run"] or settings["resume"]  # empty for a plain `flwr run`, which nobody follows
    outcome = record_outcome(runs_dir, submitted_id) if submitted_id else nullcontext()
    try:
        with outcome, stop_signal.listen():
            execute_run(settings, FlowerTransport(grid, stop_signal))
    except ConsiliumError as error:
        log.error("error: %s", error)
        raise


def execute_run(settings: dict[str, str], transport: FlowerTransport) -> None:
    """Resume the run that the settings name, or start a new one."""
    runs_dir = resolve_runs_dir(settings["runs"])
    ledger = open_ledger(runs_dir, settings["ledger"])
    if settings["resume"]:
        resume_run_or_folds(settings["resume"], transport, runs_dir, ledger)
        return
    config = compose_config([f"recipe={settings['recipe']}", *shlex.split(settings["overrides"])])
    run_id = settings["run"] or generate_run_id(config)
    start_run_or_folds(config, transport, runs_dir, ledger, run_id)


def drop_traceback(record: logging.LogRecord) -> bool:
    """Replace an expected error's traceback by its sentence in Flower's log record of a run's end."""
    if record.exc_info and isinstance(record.exc_info[1], ConsiliumError):
        record.msg = f"{record.getMessage()}: {record.exc_info[1]}"
        record.args = ()
        record.exc_info = None
    return True
