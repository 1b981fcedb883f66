"""The round loop: send weights, train at the centres, aggregate, evaluate at the centres; checkpoint and ledger after every round.

A round closes when every expected centre replied, or at its deadline with at least the quorum; below the quorum it is retried, then the run
pauses. What a resumed run needs is in the checkpoint alone, and every draw comes from `common.seeds`, so that it goes on as if it had
never stopped.
"""

from __future__ import annotations

import itertools
import logging
import math
import shutil
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from common.codec import codec_of
from common.compose import active, to_dict
from common.imbalance import effective_number
from common.logs import about
from common.messages import Contribution, Query, Refusal, Request, Train
from common.model import layout_for
from common.schema import Evaluation, Stage
from common.secagg import hides_all
from common.weights import NONE, Weights, flatten, layout_of
from server import checkpoint, matrix, scores
from server.aggregation import Spooled, decoded, fault, spool
from server.broadcast import forget_left, send
from server.combine import combine, screened, secretly_added
from server.counts import global_counts, masses, training
from server.initial import initial_model
from server.orders import heed
from server.presence import filled, greet, readmit
from server.quality import survey
from server.queries import ask
from server.source_head import balanced_discriminant
from server.state import Paused, Run, by_reason, leave_out, reason_of
from server.transport import Received

log = logging.getLogger("consilium.server")


def conduct(run: Run) -> dict[str, Any]:
    """Carry a new or interrupted run to its end; returns the result that `metrics.json` holds.

    Raises ConsiliumError when it cannot go on, Paused when it can go on later.
    """
    began = time.perf_counter()
    heed(run, round_over=True)
    restore(run)
    survey(run)
    for name, stage in run.config.stages.items():
        done = next((s for s in run.result["stages"] if s["name"] == name), None)
        with about(stage=name):
            if done is None:
                done = enter(run, name, stage)
            if not done["finished"]:
                play(run, name, stage, done)
    matrix.score(run)
    test(run)
    forget_left(run)
    run.result["seconds"] += time.perf_counter() - began
    run.result["status"] = "finished"
    return run.result


def restore(run: Run) -> None:
    """The run as its last checkpoint has it, or as it begins; what that takes of memory is free again afterwards."""
    state = checkpoint.load_latest(run.folder)
    if state:
        run.result, history = state.facts["result"], iter(state.history)
        for place in run.result["stages"]:
            place["rounds"] = list(itertools.islice(history, place["rounds"]))
        run.config = filled(run.config, run.result["filled"])
    greet(run)
    if state:
        run.layout = layout_for(run.config)
        run.weights, run.moments = run.layout.flat(state.weights), dict(state.optimiser)
        if state.note:
            run.result["notes"].append(state.note)
        log.info("resumed after round %d of stage '%s'", state.round, state.stage)
    else:
        model = initial_model(run.config)
        run.layout = layout_of(model)
        run.weights = flatten(model, run.layout)


# --- stages and rounds ----------------------------------------------------------------------------------------------------------------


def enter(run: Run, name: str, stage: Stage) -> dict[str, Any]:
    """Begin a stage from the best weights of the one before; round 0 is the score of what it starts from."""
    run.at = name, 0
    if run.result["stages"]:
        run.weights = best_weights(run)
    run.moments = {}
    if stage.reset:
        run.weights = run.weights.copy()  # digests are kept
        fresh = flatten(initial_model(replace(run.config, seed=run.config.seed + 1)), run.layout)
        for tensor in run.layout.matching(stage.reset):
            ours, theirs = (run.weights.integers, fresh.integers) if tensor in run.layout.integers else (run.weights.floats, fresh.floats)
            ours[tensor.where] = theirs[tensor.where]
    if stage.freeze:
        run.layout.matching(stage.freeze)
    place: dict[str, Any] = {"name": name, "rounds": [], "best": {}, "personal": "all" in stage.personal, "finished": False}
    run.result["stages"].append(place)
    log.info("stage '%s': %d rounds", name, stage.rounds)
    fit_heads(run, name, stage)
    val = evaluate(run, name, stage, place, "val")
    entry: dict[str, Any] = {
        "round": 0,
        "seconds": 0.0,
        "bytes_up": 0,
        "bytes_down": 0,
        "weights": {},
        "effective": {},
        "centres": {},
        "val": val,
    }
    close(run, place, stage, entry, datetime.now(UTC), "start")
    return place


def play(run: Run, name: str, stage: Stage, place: dict[str, Any]) -> None:
    """The stage's remaining rounds."""
    for round in range(len(place["rounds"]), stage.rounds + 1):
        patience, warmup = run.config.evaluation.patience, run.config.evaluation.warmup
        waited = [round - 1 - max(best["round"], warmup) for best in _bests(place)]
        if patience and all(n >= patience for n in waited):
            run.result["notes"].append(f"stage '{name}' ended after round {round - 1}: no better validation in {patience} rounds")
            break
        heed(run, round_over=True)
        run.at = name, round
        with about(round=round):
            started, began = datetime.now(UTC), time.perf_counter()
            readmit(run)
            run.traffic = {}
            entry, because = train_round(run, name, stage, place, round)
            fit_heads(run, name, stage)
            entry["val"] = evaluate(run, name, stage, place, "val", round)
            entry["seconds"] = time.perf_counter() - began
            entry["bytes_up"], entry["bytes_down"] = (sum(way) for way in zip(*run.traffic.values(), strict=True))
            for centre, said in entry["centres"].items():
                said["bytes_up"], said["bytes_down"] = run.traffic.get(centre, (0, 0))
            close(run, place, stage, entry, started, because)
            text = scores.line(entry["val"], run.config.evaluation.task, run.config.evaluation.metric)
            spent = [said["epsilon"] for said in entry["centres"].values() if said.get("epsilon") is not None]
            text += f"  epsilon {min(spent):.2f} to {max(spent):.2f}" if spent else ""
            log.info("%s round %d/%d  %5.1f s  %s", name, round, stage.rounds, entry["seconds"], text)
    place["finished"] = True
    save(run, name, len(place["rounds"]) - 1)


def train_round(run: Run, name: str, stage: Stage, place: dict[str, Any], round: int) -> tuple[dict[str, Any], str]:
    """One round's training and aggregation, retried below the quorum. Returns the report's entry and why the round closed. Raises Paused."""
    taught, average = training(run, stage)
    rate = plateau(stage, place, run.config.evaluation) if stage.optimiser.schedule == "plateau" else 1.0
    secret = run.config.privacy.secagg is not None and not place["personal"]
    together = masses(run, stage) if secret else {}
    for attempt in range(run.config.federation.retries + 1):
        folder = run.folder / "spool"
        shutil.rmtree(folder, ignore_errors=True)
        facts: dict[str, dict[str, Any]] = {}
        arrived: dict[str, Spooled] = {}
        said: dict[str, Contribution] = {}
        globals_ = global_counts(run)
        requests: dict[str, Request] = {
            c: Train(
                run.id,
                to_dict(run.config),
                name,
                round,
                run.weights,
                globals_,
                chain(run, place, c, round - 1),
                keep(place, c, round),
                average,
                rate,
                together,
            )
            for c in taught
        }
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
        why = by_reason({c: said["reason"] for c, said in sorted(facts.items()) if not said["accepted"]})
        raise Paused(f"stage '{name}' round {round}: {len(arrived)} contributions, {quorum} needed ({why}); mend it, then resume")
    because = "all replied" if len(arrived) == len(taught) else f"{len(arrived)} of {len(taught)}, quorum {quorum}"
    if not place["personal"]:
        matrix.keep(run, name, round, list(arrived.values()))
    weights = {} if place["personal"] else combine(run, name, stage, round, arrived, facts, found)
    shutil.rmtree(folder, ignore_errors=True)
    effective = {group: effective_number(w) for group, w in weights.items()}
    return {
        "round": round,
        "weights": weights,
        "effective": effective,
        "centres": facts,
    }, because


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
        value = scores.chosen(entry["val"], evaluation) if evaluation.task in entry["val"] else None
        waited = 0 if value is None or value > best else waited + 1
        best = max(best, -math.inf if value is None else value)
        if waited > stage.optimiser.patience:
            rate, waited = rate * stage.optimiser.factor, 0
    return rate


def fit_heads(run: Run, name: str, stage: Stage) -> None:
    """Fit the heads with `head: moments` on the centres' class moments of the present features."""
    for task in active(run.config, stage):
        if run.config.tasks[task].head == "moments":
            requests: dict[str, Request] = {
                c: Query(run.id, to_dict(run.config), "moments", name, "train", task, run.weights) for c in run.expected
            }
            weight, bias = balanced_discriminant(ask(run, requests))
            run.weights = run.weights.copy()  # it may be on its way to somebody
            for entry in run.layout.floats:
                if entry.group == task:
                    run.weights.floats[entry.where] = (weight if len(entry.shape) == 2 else bias).reshape(-1)


# --- evaluation, the best round -------------------------------------------------------------------------------------------------------


def evaluate(run: Run, name: str, stage: Stage, place: dict[str, Any], split: str, round: int = 0) -> dict[str, Any]:
    """Scores of the present weights on a split, as the report shows them: {task: {centres, macro, pooled, worst, spread}}."""
    requests: dict[str, Request] = {
        c: Query(run.id, to_dict(run.config), "scores", name, split, "", run.weights, chain(run, place, c, round)) for c in run.expected
    }
    return scores.table(ask(run, requests), run.config, active(run.config, stage))


def chain(run: Run, place: dict[str, Any], centre: str, round: int) -> list[tuple[str, int]]:
    """Whose personal weights a centre lays over the global ones: the best round of each finished stage, then this stage's up to `round`."""
    bests = [(s["name"], best_of(s, centre)) for s in run.result["stages"] if s["finished"] and s["name"] != place["name"]]
    before = [(name, best["round"]) for name, best in bests if best]  # none of a centre that was excluded all the time
    return [(name, last) for name, last in [*before, (place["name"], round)] if run.config.stages[name].personal]


def keep(place: dict[str, Any], centre: str, round: int) -> list[int]:
    """Rounds of a stage whose personal weights may still be asked for: the last two (a resume repeats a round) and the best."""
    return [round - 1, round - 2, best_of(place, centre).get("round", 0)]


def best_of(place: dict[str, Any], centre: str) -> dict[str, Any]:
    """The best round so far: each centre's own when nothing is exchanged, else one for all."""
    best: dict[str, Any] = place["best"]
    return best.get(centre, {}) if place["personal"] else best


def _bests(place: dict[str, Any]) -> list[dict[str, Any]]:
    """What patience looks at: the best of all, or of every centre that has a value of its own to compare."""
    bests = list(place["best"].values()) if place["personal"] else [place["best"]]
    return [best for best in bests if best["value"] is not None] or bests


def close(run: Run, place: dict[str, Any], stage: Stage, entry: dict[str, Any], started: datetime, because: str) -> None:
    """A round is over: the best is kept, ledger and checkpoint are written (in this order: a round is never missing in the ledger)."""
    place["rounds"].append(entry)
    evaluation = run.config.evaluation
    in_stage = evaluation.task in entry["val"]

    def better(best: dict[str, Any], value: float | None) -> dict[str, Any]:
        # Without a value to compare (one class only, another task) the latest round is as good as can be said.
        if evaluation.choose == "last" or value is None or not best or best["value"] is None or value > best["value"]:
            return {"stage": place["name"], "round": entry["round"], "value": value}
        return best

    if place["personal"]:
        for centre in run.expected:
            value = (
                scores.own(entry["val"], evaluation, run.presence[centre].cohorts if centre in run.presence else [centre])
                if in_stage
                else None
            )
            place["best"][centre] = better(place["best"].get(centre, {}), value)
    else:
        place["best"] = better(place["best"], scores.chosen(entry["val"], evaluation) if in_stage else None)
    run.ledger.add_round(
        run.id, place["name"], entry["round"], started=started, seconds=entry["seconds"], closed_because=because,
        contributions=entry["centres"], weights=entry["weights"], scores=scores.without_sums(entry["val"]),
    )  # fmt: skip
    save(run, place["name"], entry["round"])
    run.track()


def save(run: Run, stage: str, round: int) -> None:
    """Checkpoint what the run is."""
    place = run.result["stages"][-1]
    history = [entry for each in run.result["stages"] for entry in each["rounds"]]
    stages = [{**each, "rounds": len(each["rounds"])} for each in run.result["stages"]]
    facts = {"result": {**run.result, "stages": stages}, "best": {} if place["personal"] else place["best"]}
    checkpoint.save(run.folder, checkpoint.State(stage, round, dict(run.layout.named(run.weights)), run.moments, facts, history))


def best_weights(run: Run) -> Weights:
    """The global weights of the last stage's best round; where nothing is exchanged they never changed."""
    place = run.result["stages"][-1]
    if place["personal"] or place["best"]["round"] == len(place["rounds"]) - 1:
        return run.weights
    run.weights = Weights(NONE, run.weights.integers)  # its memory is wanted
    return run.layout.flat(checkpoint.load_weights(checkpoint.weights_path(run.folder, place["name"], place["best"]["round"])))


def test(run: Run) -> None:
    """The test split, touched once, by the best round on validation."""
    place = run.result["stages"][-1]
    name = place["name"]
    stage = run.config.stages[name]
    run.weights = best_weights(run)
    requests: dict[str, Request] = {}
    for c in run.expected:
        personal = chain(run, place, c, best_of(place, c)["round"])
        requests[c] = Query(run.id, to_dict(run.config), "scores", name, "test", "", run.weights, personal)
    sums = ask(run, requests)
    run.result["test"] = scores.table(sums, run.config, active(run.config, stage), with_sums=True)
    if run.config.federation.unseen or run.config.federation.fold is not None:
        run.result["test_sums"] = {key: array.tolist() for key, array in sums.items()}  # a cross-validation adds its parts up
    run.ledger.add_metrics(run.id, name, place["rounds"][-1]["round"], "test", scores.without_sums(run.result["test"]))
