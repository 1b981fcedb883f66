"""A round's training: who is asked, whose contribution is used, what is made of them; retried below the quorum."""

from __future__ import annotations

import logging
import math
import shutil
from pathlib import Path
from typing import Any, cast

from common.codec import codec_of
from common.compose import to_dict
from common.imbalance import effective_number
from common.messages import Contribution, Refusal, Train
from common.schema import Evaluation, Stage
from common.secagg import hides_all
from server import matrix, scores
from server.aggregation import Spooled, decoded, fault, spool
from server.best import chain, keep
from server.broadcast import send
from server.combine import combine, screened, secretly_added
from server.counts import global_counts, masses, training
from server.state import Paused, Run, by_reason, leave_out, reason_of
from server.transport import Received

log = logging.getLogger("consilium.server")


def train_round(run: Run, name: str, stage: Stage, place: dict[str, Any], round: int) -> tuple[dict[str, Any], str]:
    """One round's training and aggregation, retried below the quorum. Returns the report's entry and why the round closed. Raises Paused."""
    taught, average = training(run, stage)
    rate = plateau(stage, place, run.config.evaluation) if stage.optimiser.schedule == "plateau" else 1.0
    secret = run.config.privacy.secagg is not None and not place["personal"]
    together = masses(run, stage) if secret else {}
    config, counts, folder = to_dict(run.config), global_counts(run), run.folder / "spool"
    own = {c: (chain(run, place, c, round - 1), keep(place, c, round)) for c in taught}
    requests = {c: Train(run.id, config, name, round, run.weights, counts, *own[c], average, rate, together) for c in taught}
    for attempt in range(run.config.federation.retries + 1):
        shutil.rmtree(folder, ignore_errors=True)
        facts: dict[str, dict[str, Any]] = {}
        arrived: dict[str, Spooled] = {}
        said: dict[str, Contribution] = {}
        declined = 0
        for received in send(run, requests):
            facts[received.centre], one = accepted(run, received, place["personal"] or secret, folder)
            declined += isinstance(received.reply, Refusal) and received.reply.declined
            if one:
                arrived[received.centre] = one
                if secret:
                    said[received.centre] = cast(Contribution, received.reply)
            del received  # before the next is taken: its memory is wanted
        waited = math.ceil(run.config.federation.quorum * (len(taught) - declined))  # who declines is not waited for
        quorum = max(1 if place["personal"] else run.config.aggregation.fewest, waited)
        found, left = secretly_added(run, said, quorum) if secret else (None, screened(run, arrived))
        for centre, why in left.items():
            facts[centre].update(accepted=False, reason=why)
            arrived.pop(centre, None)
        for centre, told in facts.items():
            if not told["accepted"]:
                leave_out(run, name, round, centre, told["reason"])
        if secret and not found:
            arrived = {}
        if len(arrived) >= quorum:
            break
        log.warning("round %d: %d of %d needed contributions (attempt %d)", round, len(arrived), quorum, attempt + 1)
        run.ledger.event(run.id, "below_quorum", f"stage {name} round {round}: {len(arrived)} of {quorum} needed")
    else:
        why = by_reason({c: told["reason"] for c, told in sorted(facts.items()) if not told["accepted"]})
        raise Paused(f"stage '{name}' round {round}: {len(arrived)} contributions, {quorum} needed ({why}); mend it, then resume")
    because = "all replied" if len(arrived) == len(taught) else f"{len(arrived)} of {len(taught)}, quorum {quorum}"
    if not place["personal"]:
        matrix.keep(run, name, round, list(arrived.values()))
    weights = {} if place["personal"] else combine(run, name, stage, round, arrived, facts, found)
    shutil.rmtree(folder, ignore_errors=True)
    effective = {group: effective_number(w) for group, w in weights.items()}
    return {"round": round, "weights": weights, "effective": effective, "centres": facts}, because


def accepted(run: Run, received: Received, empty: bool, folder: Path) -> tuple[dict[str, Any], Spooled | None]:
    """What the report and ledger say of a reply to Train; and the contribution on disk, where it can be used. `empty`: it shall hold no weights."""
    reply = received.reply
    if not isinstance(reply, Contribution):
        return {"accepted": False, "reason": reason_of(reply)}, None
    summed, labelled = (sum(column) for column in zip(*reply.losses.values(), strict=True)) if reply.losses else (0.0, 0)
    facts: dict[str, Any] = {
        "accepted": True, "reason": "", "scans": reply.scans, "steps": reply.steps, "seconds": reply.seconds,
        "loss": summed / labelled if labelled else None, "epsilon": reply.epsilon,
    }  # fmt: skip
    try:
        reply = decoded(reply, run.layout, codec_of(run.config))
        why = fault(reply, run.layout, empty)
    except (KeyError, ValueError) as error:
        why = f"cannot be decoded: {error}"
    if why:
        return facts | {"accepted": False, "reason": why}, None
    one = spool(reply, run.layout, folder)
    if reply.keys is None:
        return facts | {"norm": one.norm}, one
    return (facts | {"scans": None, "steps": None} if hides_all(run.config) else facts), one


def plateau(stage: Stage, place: dict[str, Any], evaluation: Evaluation) -> float:
    """What the learning rate is multiplied by: `factor` each time validation has no new best in more than `patience` rounds (PyTorch's rule)."""
    best, waited, rate = -math.inf, 0, 1.0
    for entry in place["rounds"]:
        value = scores.chosen(entry["val"], evaluation)
        waited = 0 if value is None or value > best else waited + 1
        best = max(best, -math.inf if value is None else value)
        if waited > stage.optimiser.patience:
            rate, waited = rate * stage.optimiser.factor, 0
    return rate
