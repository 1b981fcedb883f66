"""A round's training: who is asked, whose contribution is used, what is made of them; retried below the quorum."""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path
from typing import Any, cast

from common.config.compose import config_to_dict
from common.config.schema import EvaluationConfig, Stage
from common.learning.class_imbalance import compute_effective_centres
from common.privacy.secure_aggregation import hides_statistics
from common.protocol.messages import Refusal, TrainReply, TrainRequest
from common.protocol.update_codec import select_codec
from server.aggregation.aggregate import aggregate_round, screen_updates, secure_sum_updates
from server.aggregation.contributions import StoredUpdate, decode_reply, store_update, validation_error
from server.aggregation.label_counts import global_label_counts, participating_centres, total_label_weights
from server.analysis import cross_site_evaluation, score_tables
from server.rounds.model_selection import personal_layers_for, rounds_to_keep
from server.run.broadcast import send_requests
from server.run.run_state import Run, RunPaused, group_by_reason, record_exclusion, refusal_reason
from server.run.transport import ReceivedReply

log = logging.getLogger("consilium.server")


def run_train_round(
    run: Run, stage_name: str, stage: Stage, stage_record: dict[str, Any], round_number: int
) -> tuple[dict[str, Any], str]:
    """One round's training and aggregation, retried below the quorum. Returns the report's entry and why the round closed. Raises Paused."""
    taught, average = participating_centres(run, stage)
    rate = (
        plateau_lr_scale(stage, stage_record, run.config.evaluation)
        if stage.optimiser.schedule == "plateau"
        else 1.0
    )
    secret = run.config.privacy.secagg is not None and not stage_record["personal"]
    together = total_label_weights(run, stage) if secret else {}
    config, counts, folder = config_to_dict(run.config), global_label_counts(run), run.run_dir / "spool"
    own = {
        c: (
            personal_layers_for(run, stage_record, c, round_number - 1),
            rounds_to_keep(stage_record, c, round_number),
        )
        for c in taught
    }
    requests = {
        c: TrainRequest(
            run.run_id,
            config,
            stage_name,
            round_number,
            run.weights,
            counts,
            *own[c],
            average,
            rate,
            together,
        )
        for c in taught
    }
    for attempt in range(run.config.federation.round_retries + 1):
        shutil.rmtree(folder, ignore_errors=True)
        facts: dict[str, dict[str, Any]] = {}
        arrived: dict[str, StoredUpdate] = {}
        said: dict[str, TrainReply] = {}
        declined = 0
        for received in send_requests(run, requests):
            facts[received.centre], one = process_reply(
                run, received, stage_record["personal"] or secret, folder
            )
            declined += isinstance(received.reply, Refusal) and received.reply.permanent
            if one:
                arrived[received.centre] = one
                if secret:
                    said[received.centre] = cast(TrainReply, received.reply)
            del received  # before the next is taken: its memory is wanted
        waited = math.ceil(
            run.config.federation.quorum * (len(taught) - declined)
        )  # who declines is not waited for
        quorum = max(1 if stage_record["personal"] else run.config.aggregation.min_contributions, waited)
        found, left = (
            secure_sum_updates(run, said, quorum) if secret else (None, screen_updates(run, arrived))
        )
        for centre, why in left.items():
            facts[centre].update(accepted=False, reason=why)
            arrived.pop(centre, None)
        for centre, told in facts.items():
            if not told["accepted"]:
                record_exclusion(run, stage_name, round_number, centre, told["reason"])
        if secret and not found:
            arrived = {}
        if len(arrived) >= quorum:
            break
        log.warning(
            "round %d: %d of %d needed contributions (attempt %d)",
            round_number,
            len(arrived),
            quorum,
            attempt + 1,
        )
        run.ledger.log_event(
            run.run_id,
            "below_quorum",
            f"stage {stage_name} round {round_number}: {len(arrived)} of {quorum} needed",
        )
    else:
        why = group_by_reason(
            {c: told["reason"] for c, told in sorted(facts.items()) if not told["accepted"]}
        )
        raise RunPaused(
            f"stage '{stage_name}' round {round_number}: {len(arrived)} contributions, {quorum} needed ({why}); mend it, then resume"
        )
    because = (
        "all replied" if len(arrived) == len(taught) else f"{len(arrived)} of {len(taught)}, quorum {quorum}"
    )
    if not stage_record["personal"]:
        cross_site_evaluation.save_local_models(run, stage_name, round_number, list(arrived.values()))
    weights = (
        {}
        if stage_record["personal"]
        else aggregate_round(run, stage_name, stage, round_number, arrived, facts, found)
    )
    shutil.rmtree(folder, ignore_errors=True)
    effective = {group: compute_effective_centres(w) for group, w in weights.items()}
    return {"round": round_number, "weights": weights, "effective": effective, "centres": facts}, because


def process_reply(
    run: Run, received: ReceivedReply, expect_empty: bool, spool_dir: Path
) -> tuple[dict[str, Any], StoredUpdate | None]:
    """What the report and ledger say of a reply to Train; and the contribution on disk, where it can be used. `empty`: it shall hold no weights."""
    reply = received.reply
    if not isinstance(reply, TrainReply):
        return {"accepted": False, "reason": refusal_reason(reply)}, None
    summed, labelled = (
        (sum(column) for column in zip(*reply.losses.values(), strict=True)) if reply.losses else (0.0, 0)
    )
    facts: dict[str, Any] = {
        "accepted": True, "reason": "", "scans": reply.scans, "steps": reply.steps, "seconds": reply.seconds,
        "loss": summed / labelled if labelled else None, "epsilon": reply.epsilon,
    }  # fmt: skip
    try:
        reply = decode_reply(reply, run.layout, select_codec(run.config))
        why = validation_error(reply, run.layout, expect_empty)
    except (KeyError, ValueError) as error:
        why = f"cannot be decoded: {error}"
    if why:
        return facts | {"accepted": False, "reason": why}, None
    one = store_update(reply, run.layout, spool_dir)
    if reply.public_keys is None:
        return facts | {"norm": one.norm}, one
    return (facts | {"scans": None, "steps": None} if hides_statistics(run.config) else facts), one


def plateau_lr_scale(stage: Stage, stage_record: dict[str, Any], evaluation: EvaluationConfig) -> float:
    """What the learning rate is multiplied by: `factor` each time validation has no new best in more than `patience` rounds (PyTorch's rule)."""
    best, waited, rate = -math.inf, 0, 1.0
    for entry in stage_record["rounds"]:
        value = score_tables.selection_score(entry["val"], evaluation)
        waited = 0 if value is None or value > best else waited + 1
        best = max(best, -math.inf if value is None else value)
        if waited > stage.optimiser.plateau_patience:
            rate, waited = rate * stage.optimiser.plateau_factor, 0
    return rate
