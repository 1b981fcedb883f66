"""A run's start: from its last checkpoint, or from the beginning; and the checkpoint after each round."""

from __future__ import annotations

import logging

from common.modeling.model import parameter_layout
from common.modeling.parameters import build_layout, get_model_weights
from server.rounds.membership import admit_centres, count_again, fit_to_centres, restore_tasks
from server.run import checkpoint
from server.run.initial_model import build_initial_model
from server.run.run_state import ModelState, Run

log = logging.getLogger("consilium.server")


def prepare_run(run: Run) -> None:
    """Admit the centres, and set the run up from its last checkpoint or with newly initialised weights."""
    latest = checkpoint.load_latest(run.run_dir)
    if latest is None:
        admit_centres(run)
        fit_to_centres(run)
        model = build_initial_model(run.config)
        layout = build_layout(model)
        run.model = ModelState(layout, get_model_weights(model, layout))
    else:
        restore_run(run, latest)


def restore_run(run: Run, latest: checkpoint.Checkpoint) -> None:
    """Continue from a checkpoint."""
    run.result = latest.result
    run.set_config(restore_tasks(run.config, run.result.fitted_tasks))
    admit_centres(run)
    count_again(run)
    layout = parameter_layout(run.config)
    run.model = ModelState(layout, layout.from_state_dict(latest.weights), dict(latest.optimiser_state))
    if latest.recovery_note:
        run.result.notes.append(latest.recovery_note)
    log.info("resumed after round %d of stage '%s'", latest.round, latest.stage)


def checkpoint_run(run: Run, stage_name: str, round_number: int) -> None:
    """Write the run's state after a round to disk."""
    weights = dict(run.model.layout.to_state_dict(run.model.weights))
    checkpoint.write_checkpoint(
        run.run_dir,
        checkpoint.Checkpoint(stage_name, round_number, weights, run.result, run.model.optimiser_state),
    )
