"""The round loop: send the weights, train at the centres, aggregate, validate at the centres, keep the round.

It is federated averaging (McMahan et al., "Communication-efficient learning of deep networks from
decentralized data", AISTATS 2017, algorithm 1) in stages, each with its own tasks and settings:

    for each stage:
        start from the best weights of the stage before
        for each round:
            1. readmit the centres that are back
            2. train at the centres and collect their updates        (train_round.py)
            3. aggregate the updates to the next global weights      (server/aggregation)
            4. fit the heads that the coordinator fits itself
            5. validate the next weights at the centres              (evaluation.py)
            6. keep the round: best round, ledger, checkpoint
    evaluate the best round on the test split

A round closes when every expected centre has replied, or at its timeout with at least the quorum; below the
quorum it is retried, then the run pauses. All that a resumed run needs is in the checkpoint, and every random
draw comes from `common.learning.seeds`: a resumed run computes what it would have computed without the
interruption.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime

from common.config.normalise import stage_tasks
from common.config.schema import Stage
from common.learning.class_imbalance import compute_effective_centres
from common.modeling.parameters import get_model_weights
from common.protocol.messages import StatisticsRequest
from common.utils.log_setup import log_context
from server.analysis import cross_site_evaluation, score_tables
from server.analysis.additive_queries import query_sum
from server.analysis.image_drift import collect_image_statistics
from server.analysis.linear_discriminant import fit_balanced_discriminant
from server.rounds.evaluation import evaluate_test, evaluate_validation
from server.rounds.membership import readmit_centres
from server.rounds.model_selection import has_stalled, load_best_weights, update_best
from server.rounds.run_checkpoint import checkpoint_run, prepare_run
from server.rounds.stage import ActiveStage
from server.rounds.train_round import aggregate_updates, collect_updates
from server.run.broadcast import clear_residual
from server.run.initial_model import build_initial_model
from server.run.operator_commands import apply_pending_commands
from server.run.records import CentreRound, RoundRecord, RunResult, RunStatus, StageRecord
from server.run.run_state import Run, RunPosition, Traffic

log = logging.getLogger("consilium.server")


def run_training(run: Run) -> RunResult:
    """Carry a new or interrupted run to its end and return its result.

    Raises ConsiliumError when the run cannot go on, RunPaused when it can be resumed later.
    """
    started = time.perf_counter()
    apply_pending_commands(run, between_rounds=True)
    prepare_run(run)
    collect_image_statistics(run)
    for name, settings in run.config.stages.items():
        with log_context(stage=name):
            train_stage(run, name, settings)
    cross_site_evaluation.evaluate_cross_site(run)
    evaluate_test(run)
    clear_residual(run)
    run.result.seconds += time.perf_counter() - started
    run.result.status = RunStatus.FINISHED
    return run.result


def train_stage(run: Run, name: str, settings: Stage) -> None:
    """Run what is left of a stage."""
    stage = find_stage(run, name, settings) or start_stage(run, name, settings)
    if stage.record.finished:
        return
    for round_number in range(stage.last_round + 1, settings.rounds + 1):
        if has_stalled(run, stage.record):
            run.result.notes.append(
                f"stage '{name}' ended after round {stage.last_round}: "
                f"no better validation in {run.config.evaluation.patience} rounds"
            )
            break
        apply_pending_commands(run, between_rounds=True)
        with log_context(round=round_number):
            run_round(run, stage, round_number)
    stage.record.finished = True
    checkpoint_run(run, name, stage.last_round)


def run_round(run: Run, stage: ActiveStage, round_number: int) -> None:
    """Run one round of training and validation."""
    started = datetime.now(UTC)
    timer = time.perf_counter()
    run.position = RunPosition(stage.name, round_number)
    readmit_centres(run)
    run.traffic = Traffic()
    outcome = collect_updates(run, stage, round_number)
    group_weights = aggregate_updates(run, stage, round_number, outcome)
    fit_source_heads(run, stage)
    validation = evaluate_validation(run, stage, round_number)
    record = RoundRecord(
        round=round_number,
        seconds=time.perf_counter() - timer,
        weights=group_weights,
        effective_centres={
            group: compute_effective_centres(weights) for group, weights in group_weights.items()
        },
        centres=outcome.centres,
        validation=validation,
    )
    _record_traffic(run, record)
    close_round(run, stage, record, started, outcome.close_reason)
    _log_round(run, stage, record)


# --- the start of a stage


def find_stage(run: Run, name: str, settings: Stage) -> ActiveStage | None:
    """Return a stage that has been started before; None where it has not."""
    for record in run.result.stages:
        if record.name == name:
            return ActiveStage(name, settings, record)
    return None


def start_stage(run: Run, name: str, settings: Stage) -> ActiveStage:
    """Start a stage from the best weights of the one before; round 0 is the validation of these weights."""
    run.position = RunPosition(name, 0)
    if run.result.stages:
        run.model.weights = load_best_weights(run)
    run.model.optimiser_state = {}
    if settings.reset:
        reset_parameters(run, settings.reset)
    run.model.layout.match_patterns(settings.freeze)  # raises for a pattern that matches nothing
    record = StageRecord(name, local_only="all" in settings.local_layers)
    stage = ActiveStage(name, settings, record)
    run.result.stages.append(record)
    log.info("stage '%s': %d rounds", name, settings.rounds)
    fit_source_heads(run, stage)
    first_round = RoundRecord(round=0, validation=evaluate_validation(run, stage, 0))
    close_round(run, stage, first_round, datetime.now(UTC), "start")
    return stage


def reset_parameters(run: Run, patterns: list[str]) -> None:
    """Replace the parameters that match a pattern by newly initialised ones."""
    layout = run.model.layout
    weights = run.model.weights.copy()  # weights that have a digest are not changed
    new_config = replace(run.config, seed=run.config.seed + 1)
    new_weights = get_model_weights(build_initial_model(new_config), layout)
    for slot in layout.match_patterns(patterns):
        if slot in layout.int_buffers:
            weights.int_buffers[slot.span] = new_weights.int_buffers[slot.span]
        else:
            weights.floats[slot.span] = new_weights.floats[slot.span]
    run.model.weights = weights


# --- the steps of a round


def fit_source_heads(run: Run, stage: ActiveStage) -> None:
    """Fit the heads with `head_update: moments` on the centres' class moments of the present features."""
    for task in stage_tasks(run.config, stage.settings):
        if run.config.tasks[task].head_update == "moments":
            _fit_source_head(run, stage.name, task)


def _fit_source_head(run: Run, stage_name: str, task: str) -> None:
    request = StatisticsRequest(
        run.run_id, run.config_values, "moments", stage_name, task=task, weights=run.model.weights
    )
    moments = query_sum(run, dict.fromkeys(run.expected_centres, request))
    weight, bias = fit_balanced_discriminant(moments)
    weights = run.model.weights.copy()  # the old ones may still be on their way to a centre
    for slot in run.model.layout.floats:
        if slot.group == task:
            is_weight_matrix = len(slot.shape) == 2
            values = weight if is_weight_matrix else bias
            weights.floats[slot.span] = values.reshape(-1)
    run.model.weights = weights


def _record_traffic(run: Run, record: RoundRecord) -> None:
    record.bytes_up, record.bytes_down = run.traffic.sum_up()
    for centre, centre_round in record.centres.items():
        centre_round.bytes_up, centre_round.bytes_down = run.traffic.of_centre(centre)


def close_round(
    run: Run, stage: ActiveStage, record: RoundRecord, started: datetime, close_reason: str
) -> None:
    """Keep a finished round.

    The ledger is written before the checkpoint: a round that is repeated after a crash is then a second
    attempt in the ledger, and never missing.
    """
    stage.record.rounds.append(record)
    update_best(run, stage.record, record)
    run.ledger.add_round(run.run_id, stage.name, record, started=started, close_reason=close_reason)
    checkpoint_run(run, stage.name, record.round)
    run.on_round_end()


def _log_round(run: Run, stage: ActiveStage, record: RoundRecord) -> None:
    evaluation = run.config.evaluation
    summary = score_tables.format_summary(record.validation, evaluation.task, evaluation.metric)
    log.info(
        "%s round %d/%d  %5.1f s  %s%s",
        stage.name,
        record.round,
        stage.settings.rounds,
        record.seconds,
        summary,
        _format_epsilon(record.centres),
    )


def _format_epsilon(centres: Mapping[str, CentreRound]) -> str:
    spent = [centre.epsilon for centre in centres.values() if centre.epsilon is not None]
    return f"  epsilon {min(spent):.2f} to {max(spent):.2f}" if spent else ""
