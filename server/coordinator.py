"""The round loop: send weights, train at the centres, aggregate, evaluate at the centres; checkpoint and ledger after every round.

A round closes when every expected centre replied, or at its deadline with at least the quorum; below the quorum it is retried, then the run
pauses. What a resumed run needs is in the checkpoint alone, and every draw comes from `common.seeds`, so that it goes on as if it had
never stopped.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from common.compose import active, to_dict
from common.logs import about
from common.messages import Query, Sums
from common.model import layout_for
from common.schema import Stage
from common.weights import flatten, layout_of
from server import checkpoint, matrix, scores
from server.best import best_of, best_weights, bests, chain, judge
from server.broadcast import forget_left
from server.initial import initial_model
from server.orders import heed
from server.presence import filled, greet, readmit
from server.quality import survey
from server.queries import ask
from server.round import train_round
from server.source_head import balanced_discriminant
from server.state import Run

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
    run.layout.matching(stage.freeze)  # raises for a pattern that matches nothing
    place: dict[str, Any] = {"name": name, "rounds": [], "best": {}, "personal": "all" in stage.personal, "finished": False}
    run.result["stages"].append(place)
    log.info("stage '%s': %d rounds", name, stage.rounds)
    fit_heads(run, name, stage)
    entry: dict[str, Any] = {"round": 0, "seconds": 0.0, "bytes_up": 0, "bytes_down": 0, "weights": {}, "effective": {}, "centres": {}}
    entry["val"] = evaluate(run, name, stage, place, 0)
    close(run, place, stage, entry, datetime.now(UTC), "start")
    return place


def play(run: Run, name: str, stage: Stage, place: dict[str, Any]) -> None:
    """The stage's remaining rounds."""
    for round in range(len(place["rounds"]), stage.rounds + 1):
        patience, warmup = run.config.evaluation.patience, run.config.evaluation.warmup
        waited = [round - 1 - max(best["round"], warmup) for best in bests(place)]
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
            entry["val"] = evaluate(run, name, stage, place, round)
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


def fit_heads(run: Run, name: str, stage: Stage) -> None:
    """Fit the heads with `head: moments` on the centres' class moments of the present features."""
    for task in active(run.config, stage):
        if run.config.tasks[task].head == "moments":
            requests = {c: Query(run.id, to_dict(run.config), "moments", name, "train", task, run.weights) for c in run.expected}
            weight, bias = balanced_discriminant(ask(run, requests))
            run.weights = run.weights.copy()  # it may be on its way to somebody
            for entry in run.layout.floats:
                if entry.group == task:
                    run.weights.floats[entry.where] = (weight if len(entry.shape) == 2 else bias).reshape(-1)


# --- evaluation and the end of a round ------------------------------------------------------------------------------------------------


def evaluate(run: Run, name: str, stage: Stage, place: dict[str, Any], round: int) -> dict[str, Any]:
    """Validation scores of the present weights, as the report shows them: {task: {centres, macro, pooled, worst, spread}}."""
    sums = asked_scores(run, name, "val", {c: chain(run, place, c, round) for c in run.expected})
    return scores.table(sums, run.config, active(run.config, stage))


def asked_scores(run: Run, name: str, split: str, personal: Mapping[str, list[tuple[str, int]]]) -> Sums:
    """The centres' sums for the scores of the present weights, over which each lays its `personal` ones."""
    return ask(run, {c: Query(run.id, to_dict(run.config), "scores", name, split, "", run.weights, own) for c, own in personal.items()})


def close(run: Run, place: dict[str, Any], stage: Stage, entry: dict[str, Any], started: datetime, because: str) -> None:
    """A round is over: the best is kept, ledger and checkpoint are written (in this order: a round is never missing in the ledger)."""
    place["rounds"].append(entry)
    judge(run, place, entry)
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


def test(run: Run) -> None:
    """The test split, touched once, by the best round on validation."""
    place = run.result["stages"][-1]
    name = place["name"]
    run.weights = best_weights(run)
    sums = asked_scores(run, name, "test", {c: chain(run, place, c, best_of(place, c)["round"]) for c in run.expected})
    run.result["test"] = scores.table(sums, run.config, active(run.config, run.config.stages[name]), with_sums=True)
    if run.config.federation.unseen or run.config.federation.fold is not None:
        run.result["test_sums"] = {key: array.tolist() for key, array in sums.items()}  # a cross-validation adds its parts up
    run.ledger.add_metrics(run.id, name, place["rounds"][-1]["round"], "test", scores.without_sums(run.result["test"]))
