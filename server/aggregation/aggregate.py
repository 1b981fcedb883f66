"""From a round's updates to the next global weights: the rule, the centres' weights, the protection."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping

import numpy as np
from numpy.typing import NDArray

from common.config.normalise import stage_tasks
from common.config.schema import Stage
from common.modeling.local_layers import find_local_values
from common.modeling.parameters import Layout, Weights
from common.privacy.secure_aggregation import dequantize_mean, empty_update_sums, require_secagg_config
from common.protocol.messages import Refusal, TrainReply
from common.utils.errors import RefusalCode
from server.aggregation.central_dp import dp_weighted_sum
from server.aggregation.label_counts import count_labels, secure_sum_weights
from server.aggregation.robust import (
    COORDINATE_WISE_RULES,
    find_quorum_error,
    robust_update,
    select_krum_outliers,
)
from server.aggregation.screening import find_outliers
from server.aggregation.server_optimizer import server_step
from server.aggregation.stored_updates import StoredUpdate
from server.aggregation.weighted_mean import weighted_sum
from server.aggregation.weighting import GroupWeights, compute_group_weights
from server.run.broadcast import quantize_server_step
from server.run.records import CentreRound
from server.run.run_state import Run, RunPaused, record_exclusion
from server.run.secure_aggregation import NotEnoughCentres, SecureSumResult, secure_sum

log = logging.getLogger("consilium.server")


def screen_updates(run: Run, updates: Mapping[str, StoredUpdate]) -> dict[str, str]:
    """Return {centre: reason} of the updates that are too large to be used.

    There are none with `privacy.dp_level=central`: all updates are clipped, and one centre's norm must not
    decide on another's.
    """
    if run.config.privacy.dp_level == "central":
        return {}
    norms = {centre: update.norm for centre, update in updates.items()}
    return find_outliers(norms, run.config.aggregation.max_norm_ratio)


def secure_sum_updates(
    run: Run, key_replies: Mapping[str, TrainReply], quorum: int
) -> tuple[SecureSumResult | None, dict[str, Refusal]]:
    """Return the sum of the masked updates, and {centre that is not in it: why}.

    The sum is None if too few centres stayed.
    """
    layout = run.model.layout
    try:
        result = secure_sum(run, key_replies, layout.num_parameters, empty_update_sums(layout), quorum)
    except NotEnoughCentres as error:
        log.warning("%s", error)
        return None, error.dropouts
    num_clipped = result.sums["clipped"][0]
    if num_clipped:
        log.warning("%d values of the updates were clipped to privacy.secagg.clip_value", num_clipped)
        detail = f"{num_clipped:.0f} values of all centres' updates were beyond privacy.secagg.clip_value"
        run.ledger.log_event(run.run_id, "clipped", detail)
    return result, result.dropouts


def aggregate_round(
    run: Run,
    stage_name: str,
    stage: Stage,
    round_number: int,
    updates: dict[str, StoredUpdate],
    centre_rounds: dict[str, CentreRound],
    secure_result: SecureSumResult | None = None,
) -> dict[str, dict[str, float]]:
    """Replace the run's weights by the next ones.

    Args:
        run: the run.
        stage_name: the stage in progress.
        stage: its settings.
        round_number: the round in progress.
        updates: {centre: update}; those that Krum leaves out are removed.
        centre_rounds: the centres' records, which note who was left out and what the round cost in privacy.
        secure_result: the sum of the updates, where no update is seen alone.

    Returns:
        {parameter group: {centre: weight}}.

    Raises:
        RunPaused: too few updates train some parameter group for the robust rule to protect it.
    """
    if run.config.aggregation.robust_rule == "krum":
        _leave_out_krum_outliers(run, stage_name, round_number, updates, centre_rounds)
    if secure_result:
        secagg = require_secagg_config(run.config)
        mean_delta = dequantize_mean(secure_result.values, secure_result.sums, run.model.layout, secagg)
        group_weights = secure_sum_weights(run, stage, sorted(updates))
    else:
        group_weights = weigh_centres(run, stage, updates)
        error = find_quorum_error(group_weights, run.config.aggregation)
        if error:
            raise RunPaused(f"stage '{stage_name}' round {round_number}: {error}")
        mean_delta = _combine_updates(run, stage, updates, group_weights, centre_rounds)
    if not np.isfinite(mean_delta).all():
        centres = ", ".join(sorted(updates))
        raise RunPaused(
            f"stage '{stage_name}' round {round_number}: the aggregated change is not finite, so one of "
            f"{centres} sent wrong numbers; find it by excluding one at a time, then resume"
        )
    model = run.model
    next_weights = server_step(
        model.weights,
        mean_delta,
        list(updates.values()),
        run.config.aggregation,
        model.layout,
        model.optimiser_state,
    )
    _restore_local_values(next_weights, model.weights, model.layout, stage)
    model.weights = quantize_server_step(run, next_weights)
    return group_weights


def _restore_local_values(next_weights: Weights, weights: Weights, layout: Layout, stage: Stage) -> None:
    """Undo, in place, what noise or an earlier stage's moments do to layers that stay at the centres."""
    local_values = find_local_values(layout, stage.local_layers)
    np.copyto(next_weights.floats, weights.floats, where=local_values.floats)
    np.copyto(next_weights.int_buffers, weights.int_buffers, where=local_values.int_buffers)


def _leave_out_krum_outliers(
    run: Run,
    stage_name: str,
    round_number: int,
    updates: dict[str, StoredUpdate],
    centre_rounds: dict[str, CentreRound],
) -> None:
    num_byzantine = run.config.aggregation.num_byzantine
    reason = f"one of the {num_byzantine} of {len(updates)} updates farthest from their nearest ones (Krum)"
    for centre in select_krum_outliers(list(updates.values()), run.model.layout, num_byzantine):
        refusal = Refusal(centre, reason, code=RefusalCode.BAD_REPLY)
        centre_rounds[centre].accepted = False
        centre_rounds[centre].reason = refusal.reason
        centre_rounds[centre].code = refusal.code
        record_exclusion(run, stage_name, round_number, centre, refusal)
        del updates[centre]


def weigh_centres(run: Run, stage: Stage, centres: Collection[str]) -> dict[str, dict[str, float]]:
    """Return {parameter group: {centre: its weight among these}}, from the labels that they hold."""
    counts = {}
    for centre in centres:
        counts[centre] = {task: count_labels(run, centre, task) for task in run.config.tasks}
    tasks = {task: run.config.tasks[task] for task in stage_tasks(run.config, stage)}
    return compute_group_weights(counts, run.config.aggregation, tasks)


def _combine_updates(
    run: Run,
    stage: Stage,
    updates: Mapping[str, StoredUpdate],
    group_weights: GroupWeights,
    centre_rounds: Mapping[str, CentreRound],
) -> NDArray[np.float32]:
    """Return the mean delta [P] by the configured rule; `centre_rounds` note what it cost in privacy."""
    stored_updates = list(updates.values())
    if run.config.privacy.dp_level == "central":
        private_sum = dp_weighted_sum(run, stage, stored_updates, group_weights)
        for centre in updates:
            centre_rounds[centre].epsilon = private_sum.epsilon
            centre_rounds[centre].clip_norm = private_sum.clip_norm
        return private_sum.update
    if run.config.aggregation.robust_rule in COORDINATE_WISE_RULES:
        return robust_update(stored_updates, group_weights, run.model.layout, run.config.aggregation)
    return weighted_sum(stored_updates, group_weights, run.model.layout)
