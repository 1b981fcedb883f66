"""From the contributions that arrived to the next weights: by which rule, weighed how, hidden by what."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from common.config.compose import stage_tasks
from common.config.schema import Stage
from common.privacy.secure_aggregation import dequantize_mean, empty_update_sums, require_secagg_config
from common.protocol.messages import TrainReply
from server.aggregation.central_dp import dp_weighted_sum
from server.aggregation.contributions import (
    StoredUpdate,
    compute_group_weights,
    find_outliers,
    server_step,
    weighted_sum,
)
from server.aggregation.label_counts import count_labels, secure_sum_weights
from server.aggregation.robust import quorum_error, robust_update, select_krum_outliers
from server.run.broadcast import quantize_server_step
from server.run.run_state import Run, RunPaused, record_exclusion
from server.run.secure_aggregation import NotEnoughCentres, SecureSumResult, secure_sum

log = logging.getLogger("consilium.server")


def screen_updates(run: Run, updates: Mapping[str, StoredUpdate]) -> dict[str, str]:
    """{centre: reason} of those too large to be used. With `privacy=central` all are clipped, and one centre's norm must not decide on another."""
    if run.config.privacy.dp_level == "central":
        return {}
    return find_outliers({c: s.norm for c, s in updates.items()}, run.config.aggregation.max_norm_ratio)


def secure_sum_updates(
    run: Run, replies: Mapping[str, TrainReply], quorum: int
) -> tuple[SecureSumResult | None, dict[str, str]]:
    """The sum of the changes that came masked, None where too few centres stayed for it; and {centre: why it is not in the sum}."""
    size = sum(e.stop - e.start for e in run.layout.floats if e.is_parameter)
    try:
        found = secure_sum(run, replies, size, empty_update_sums(run.layout), quorum)
    except NotEnoughCentres as few:
        log.warning("%s", few)
        return None, few.dropouts
    if clipped := found.sums["clipped"][0]:
        log.warning("%d values of the changes were cut off at privacy.secagg.clip_value", clipped)
        run.ledger.log_event(
            run.run_id,
            "clipped",
            f"{clipped:.0f} values of all centres' changes lay beyond privacy.secagg.clip_value",
        )
    return found, found.dropouts


def aggregate_round(
    run: Run,
    stage_name: str,
    stage: Stage,
    round_number: int,
    updates: dict[str, StoredUpdate],
    centre_records: dict[str, dict[str, Any]],
    secure_result: SecureSumResult | None = None,
) -> dict[str, Any]:
    """Make the next weights of a round's contributions and drop the run's old ones; returns {group: {centre: weight}}. `facts` learn who was left
    out and what the round cost in privacy; `found` is the sum of changes that nobody saw alone. Raises Paused when too few teach some group for the
    rule to protect it."""
    settings = run.config.aggregation
    if settings.robust_rule == "krum":
        why = f"one of the {settings.num_byzantine} of {len(updates)} contributions that lie farthest from their nearest (Krum)"
        for centre in select_krum_outliers(list(updates.values()), run.layout, settings.num_byzantine):
            centre_records[centre].update(accepted=False, reason=why)
            record_exclusion(run, stage_name, round_number, centre, why)
            del updates[centre]
    spooled = list(updates.values())
    if secure_result:  # added up already
        update = dequantize_mean(
            secure_result.values, secure_result.sums, run.layout, require_secagg_config(run.config)
        )
        run.weights = quantize_server_step(
            run, server_step(run.weights, update, spooled, settings, run.layout, run.optimiser_state)
        )
        return secure_sum_weights(run, stage, sorted(updates))
    counts = {c: {t: count_labels(run, c, t) for t in run.config.tasks} for c in updates}
    weights = compute_group_weights(
        counts, settings, {t: run.config.tasks[t] for t in stage_tasks(run.config, stage)}
    )
    if few := quorum_error(weights, settings):
        raise RunPaused(f"stage '{stage_name}' round {round_number}: {few}")
    if run.config.privacy.dp_level == "central":
        update, cost = dp_weighted_sum(run, stage, spooled, weights)
        for centre in updates:
            centre_records[centre].update(cost)
    elif settings.robust_rule in ("median", "trimmed_mean"):
        update = robust_update(spooled, weights, run.layout, settings)
    else:
        update = weighted_sum(spooled, weights, run.layout)
    run.weights = quantize_server_step(
        run, server_step(run.weights, update, spooled, settings, run.layout, run.optimiser_state)
    )
    return weights
