"""A round's training: ask the centres, decide whose updates are used, retry below the quorum, aggregate."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field

from common.config.schema import EvaluationConfig, Stage
from common.privacy.secure_aggregation import hides_statistics
from common.protocol.messages import Refusal, TrainReply, TrainRequest
from common.protocol.update_codec import select_codec
from common.utils.errors import RefusalCode
from server.aggregation.aggregate import aggregate_round, screen_updates, secure_sum_updates
from server.aggregation.label_counts import global_label_counts, participating_centres, total_label_weights
from server.aggregation.screening import decode_reply, find_leaked_layers, find_validation_error
from server.aggregation.stored_updates import StoredUpdate, store_update
from server.analysis import cross_site_evaluation
from server.analysis.score_tables import get_selection_score
from server.rounds.model_selection import personal_layers_for, rounds_to_keep
from server.rounds.stage import ActiveStage
from server.run.broadcast import send_requests
from server.run.records import CentreRound, RoundRecord
from server.run.run_state import Run, RunPaused, group_by_reason, record_exclusion, to_refusal
from server.run.secure_aggregation import SecureSumResult
from server.run.transport import ReceivedReply

UPDATES_DIR = "spool"  # in the run's folder: the updates of the round in progress
log = logging.getLogger("consilium.server")


@dataclass
class RoundOutcome:
    """What the centres sent in a round, or in one attempt at it."""

    centres: dict[str, CentreRound] = field(default_factory=dict)  # every centre that was asked
    updates: dict[str, StoredUpdate] = field(default_factory=dict)  # those that are used
    key_replies: dict[str, TrainReply] = field(default_factory=dict)  # secure aggregation: with public keys
    secure_sum: SecureSumResult | None = (
        None  # secure aggregation: the sum of the updates, seen by nobody alone
    )
    num_permanent_refusals: int = 0
    close_reason: str = ""

    def leave_out(self, centre: str, refusal: Refusal) -> None:
        """Do not use a centre's update."""
        centre_round = self.centres[centre]
        centre_round.accepted = False
        centre_round.reason = refusal.reason
        centre_round.code = refusal.code
        self.updates.pop(centre, None)

    def list_refusals(self) -> Iterator[Refusal]:
        """Yield why each centre's update is not used."""
        for centre, centre_round in self.centres.items():
            if not centre_round.accepted:
                yield Refusal(centre, centre_round.reason, code=centre_round.code or RefusalCode.ERROR)


# --- what the centres are asked


def plan_requests(run: Run, stage: ActiveStage, round_number: int) -> dict[str, TrainRequest]:
    """Return {centre: request} for the centres that have something to train on in the stage."""
    centres, mean_centre_scans = participating_centres(run, stage.settings)
    global_counts = global_label_counts(run)
    lr_scale = 1.0
    if stage.settings.optimiser.schedule == "plateau":
        lr_scale = plateau_lr_scale(stage.settings, stage.record.rounds, run.config.evaluation)
    total_label_weight = total_label_weights(run, stage.settings) if uses_secure_sum(run, stage) else {}
    requests = {}
    for centre in centres:
        requests[centre] = TrainRequest(
            run_id=run.run_id,
            config=run.config_values,
            stage=stage.name,
            round=round_number,
            weights=run.model.weights,
            global_counts=global_counts,
            personal_rounds=personal_layers_for(run, stage.record, centre, round_number - 1),
            rounds_to_keep=rounds_to_keep(stage.record, centre, round_number),
            mean_centre_scans=mean_centre_scans,
            lr_scale=lr_scale,
            total_label_weight=total_label_weight,
        )
    return requests


def uses_secure_sum(run: Run, stage: ActiveStage) -> bool:
    """Return whether the stage's updates are only ever seen as a sum."""
    return run.config.privacy.secagg is not None and not stage.local_only


def plateau_lr_scale(stage: Stage, rounds: list[RoundRecord], evaluation: EvaluationConfig) -> float:
    """Return the factor on the learning rate under ``schedule: plateau``.

    It is multiplied by `plateau_factor` each time that validation has had no new best in more than
    `plateau_patience` rounds: the rule of PyTorch's ReduceLROnPlateau, with threshold 0.
    """
    best = -math.inf
    rounds_without_best = 0
    scale = 1.0
    for record in rounds:
        score = get_selection_score(record.validation, evaluation)
        if score is None:
            rounds_without_best = 0
        elif score > best:
            best = score
            rounds_without_best = 0
        else:
            rounds_without_best += 1
        if rounds_without_best > stage.optimiser.plateau_patience:
            scale *= stage.optimiser.plateau_factor
            rounds_without_best = 0
    return scale


# --- what the centres reply


def collect_updates(run: Run, stage: ActiveStage, round_number: int) -> RoundOutcome:
    """Let the centres train and collect their updates; retry while fewer than the quorum can be used.

    Raises RunPaused when the retries are used up.
    """
    requests = plan_requests(run, stage, round_number)
    num_attempts = run.config.federation.round_retries + 1
    for attempt in range(1, num_attempts + 1):
        outcome = _receive_updates(run, stage, requests)
        quorum = _update_quorum(run, stage, len(requests), outcome)
        _select_updates(run, stage, outcome, quorum)
        for refusal in outcome.list_refusals():
            record_exclusion(run, stage.name, round_number, refusal.centre, refusal)
        if len(outcome.updates) >= quorum:
            outcome.close_reason = _explain_closing(len(outcome.updates), len(requests), quorum)
            return outcome
        _log_below_quorum(run, stage, round_number, attempt, len(outcome.updates), quorum)
    reasons = {refusal.centre: refusal.reason for refusal in outcome.list_refusals()}
    explanation = group_by_reason(dict(sorted(reasons.items())))
    raise RunPaused(
        f"stage '{stage.name}' round {round_number}: {len(outcome.updates)} updates, {quorum} needed "
        f"({explanation}); remedy it, then resume"
    )


def _receive_updates(run: Run, stage: ActiveStage, requests: dict[str, TrainRequest]) -> RoundOutcome:
    """Send the requests and store each update on disk as it arrives."""
    shutil.rmtree(run.run_dir / UPDATES_DIR, ignore_errors=True)
    outcome = RoundOutcome()
    with_keys = uses_secure_sum(run, stage)
    for received in send_requests(run, requests):
        centre = received.centre
        if isinstance(received.reply, Refusal) and received.reply.permanent:
            outcome.num_permanent_refusals += 1
        outcome.centres[centre], update = process_reply(run, stage, received)
        if update:
            outcome.updates[centre] = update
            if with_keys and isinstance(received.reply, TrainReply):
                outcome.key_replies[centre] = received.reply
        del received  # before the next reply is received: its memory is needed
    return outcome


def process_reply(
    run: Run, stage: ActiveStage, received: ReceivedReply
) -> tuple[CentreRound, StoredUpdate | None]:
    """Return the record of a reply to a TrainRequest, and its update on disk if it can be used."""
    reply = received.reply
    if not isinstance(reply, TrainReply):
        refusal = to_refusal(received.centre, reply)
        return CentreRound(accepted=False, reason=refusal.reason, code=refusal.code), None
    record = CentreRound(
        accepted=True,
        scans=reply.scans,
        steps=reply.steps,
        seconds=reply.seconds,
        loss=_mean_loss(reply),
        epsilon=reply.epsilon,
    )
    layout = run.model.layout
    try:
        reply = decode_reply(reply, layout, select_codec(run.config))
        record.reason = _find_update_error(run, stage, reply)
    except ValueError:
        record.reason = "bad reply: encoded_delta codes cannot be unpacked"
    if record.reason:
        record.accepted = False
        record.code = RefusalCode.BAD_REPLY
        return record, None
    update = store_update(reply, layout, run.run_dir / UPDATES_DIR)
    if reply.public_keys is None:
        record.norm = update.norm
    elif hides_statistics(run.config):
        record.scans = None
        record.steps = None
    if run.config.privacy.dp_level == "patient":  # they follow from the number of patients
        record.scans = None
        record.steps = None
        record.seconds = None
    return record, update


def _find_update_error(run: Run, stage: ActiveStage, reply: TrainReply) -> str:
    """Return why a decoded update cannot be used, or ""."""
    leaked = find_leaked_layers(reply, run.model.weights, run.model.layout, stage.settings.local_layers)
    return find_validation_error(reply) or leaked


def _mean_loss(reply: TrainReply) -> float | None:
    """Return the training loss per labelled scan over all tasks."""
    summed_loss = sum(loss for loss, _ in reply.losses.values())
    num_labelled = sum(labelled for _, labelled in reply.losses.values())
    return summed_loss / num_labelled if num_labelled else None


# --- which updates are used


def _update_quorum(run: Run, stage: ActiveStage, num_asked: int, outcome: RoundOutcome) -> int:
    """Return how many updates the round needs; a centre that refuses permanently is not waited for."""
    num_waited_for = num_asked - outcome.num_permanent_refusals
    quorum = math.ceil(run.config.federation.quorum * num_waited_for)
    minimum = 1 if stage.local_only else run.config.aggregation.min_contributions
    return max(minimum, quorum)


def _select_updates(run: Run, stage: ActiveStage, outcome: RoundOutcome, quorum: int) -> None:
    """Leave out the updates that are outliers, or that are not in the secure sum."""
    if not uses_secure_sum(run, stage):
        for centre, reason in screen_updates(run, outcome.updates).items():
            outcome.leave_out(centre, Refusal(centre, reason, code=RefusalCode.BAD_REPLY))
        return
    outcome.secure_sum, dropouts = secure_sum_updates(run, outcome.key_replies, quorum)
    for centre, refusal in dropouts.items():
        outcome.leave_out(centre, refusal)
    if outcome.secure_sum is None:
        outcome.updates.clear()


def _explain_closing(num_updates: int, num_asked: int, quorum: int) -> str:
    if num_updates == num_asked:
        return "all replied"
    return f"{num_updates} of {num_asked}, quorum {quorum}"


def _log_below_quorum(
    run: Run, stage: ActiveStage, round_number: int, attempt: int, num_updates: int, quorum: int
) -> None:
    log.warning("round %d: %d of %d needed updates (attempt %d)", round_number, num_updates, quorum, attempt)
    detail = f"stage {stage.name} round {round_number}: {num_updates} of {quorum} needed"
    run.ledger.log_event(run.run_id, "below_quorum", detail)


# --- the next weights


def aggregate_updates(
    run: Run, stage: ActiveStage, round_number: int, outcome: RoundOutcome
) -> dict[str, dict[str, float]]:
    """Make the next global weights from the updates and return {parameter group: {centre: its weight}}.

    Without effect where every parameter stays at the centres.
    """
    group_weights: dict[str, dict[str, float]] = {}
    if not stage.local_only:
        updates = list(outcome.updates.values())
        cross_site_evaluation.save_local_models(run, stage.name, round_number, updates)
        group_weights = aggregate_round(
            run,
            stage.name,
            stage.settings,
            round_number,
            outcome.updates,
            outcome.centres,
            outcome.secure_sum,
        )
    shutil.rmtree(run.run_dir / UPDATES_DIR, ignore_errors=True)
    return group_weights
