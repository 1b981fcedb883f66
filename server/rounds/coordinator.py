"""The round loop: send weights, train at the centres, aggregate, evaluate at the centres; checkpoint and ledger after every round.

A round closes when every expected centre replied, or at its deadline with at least the quorum; below the quorum it is retried, then the run
pauses. What a resumed run needs is in the checkpoint alone, and every draw comes from `common.learning.seeds`, so that it goes on as if it had
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

from common.config.compose import config_to_dict, stage_tasks
from common.config.schema import Stage
from common.modeling.model import parameter_layout
from common.modeling.parameters import build_layout, get_model_weights
from common.protocol.messages import StatisticsRequest, Sums
from common.utils.log_setup import log_context
from server.analysis import cross_site_evaluation, score_tables
from server.analysis.additive_queries import query_sum
from server.analysis.image_drift import collect_image_statistics
from server.analysis.linear_discriminant import fit_balanced_discriminant
from server.rounds.membership import admit_centres, readmit_centres, restore_classes
from server.rounds.model_selection import (
    best_round_for,
    best_rounds,
    load_best_weights,
    personal_layers_for,
    update_best,
)
from server.rounds.train_round import run_train_round
from server.run import checkpoint
from server.run.broadcast import clear_residual
from server.run.initial_model import build_initial_model
from server.run.operator_commands import apply_pending_commands
from server.run.run_state import Run

log = logging.getLogger("consilium.server")


def run_training(run: Run) -> dict[str, Any]:
    """Carry a new or interrupted run to its end; returns the result that `metrics.json` holds.

    Raises ConsiliumError when it cannot go on, Paused when it can go on later.
    """
    began = time.perf_counter()
    apply_pending_commands(run, between_rounds=True)
    restore_run(run)
    collect_image_statistics(run)
    for name, stage in run.config.stages.items():
        done = next((s for s in run.result["stages"] if s["name"] == name), None)
        with log_context(stage=name):
            if done is None:
                done = start_stage(run, name, stage)
            if not done["finished"]:
                run_stage(run, name, stage, done)
    cross_site_evaluation.evaluate_cross_site(run)
    evaluate_test(run)
    clear_residual(run)
    run.result["seconds"] += time.perf_counter() - began
    run.result["status"] = "finished"
    return run.result


def restore_run(run: Run) -> None:
    """The run as its last checkpoint has it, or as it begins; what that takes of memory is free again afterwards."""
    state = checkpoint.load_latest(run.run_dir)
    if state:
        run.result, history = state.metadata["result"], iter(state.history)
        for place in run.result["stages"]:
            place["rounds"] = list(itertools.islice(history, place["rounds"]))
        run.config = restore_classes(run.config, run.result["filled"])
    admit_centres(run)
    if state:
        run.layout = parameter_layout(run.config)
        run.weights, run.optimiser_state = (
            run.layout.from_state_dict(state.weights),
            dict(state.optimiser_state),
        )
        if state.recovery_note:
            run.result["notes"].append(state.recovery_note)
        log.info("resumed after round %d of stage '%s'", state.round, state.stage)
    else:
        model = build_initial_model(run.config)
        run.layout = build_layout(model)
        run.weights = get_model_weights(model, run.layout)


# --- stages and rounds ----------------------------------------------------------------------------------------------------------------


def start_stage(run: Run, stage_name: str, stage: Stage) -> dict[str, Any]:
    """Begin a stage from the best weights of the one before; round 0 is the score of what it starts from."""
    run.stage_and_round = stage_name, 0
    if run.result["stages"]:
        run.weights = load_best_weights(run)
    run.optimiser_state = {}
    if stage.reset:
        run.weights = run.weights.copy()  # digests are kept
        fresh = get_model_weights(
            build_initial_model(replace(run.config, seed=run.config.seed + 1)), run.layout
        )
        for tensor in run.layout.match_patterns(stage.reset):
            ours, theirs = (
                (run.weights.int_buffers, fresh.int_buffers)
                if tensor in run.layout.int_buffers
                else (run.weights.floats, fresh.floats)
            )
            ours[tensor.span] = theirs[tensor.span]
    run.layout.match_patterns(stage.freeze)  # raises for a pattern that matches nothing
    place: dict[str, Any] = {
        "name": stage_name,
        "rounds": [],
        "best": {},
        "personal": "all" in stage.local_layers,
        "finished": False,
    }
    run.result["stages"].append(place)
    log.info("stage '%s': %d rounds", stage_name, stage.rounds)
    fit_moment_heads(run, stage_name, stage)
    entry: dict[str, Any] = {
        "round": 0,
        "seconds": 0.0,
        "bytes_up": 0,
        "bytes_down": 0,
        "weights": {},
        "effective": {},
        "centres": {},
    }
    entry["val"] = evaluate_validation(run, stage_name, stage, place, 0)
    finish_round(run, place, stage, entry, datetime.now(UTC), "start")
    return place


def run_stage(run: Run, stage_name: str, stage: Stage, stage_record: dict[str, Any]) -> None:
    """The stage's remaining rounds."""
    for round in range(len(stage_record["rounds"]), stage.rounds + 1):
        patience, warmup = run.config.evaluation.patience, run.config.evaluation.warmup
        waited = [round - 1 - max(best["round"], warmup) for best in best_rounds(stage_record)]
        if patience and all(n >= patience for n in waited):
            run.result["notes"].append(
                f"stage '{stage_name}' ended after round {round - 1}: no better validation in {patience} rounds"
            )
            break
        apply_pending_commands(run, between_rounds=True)
        run.stage_and_round = stage_name, round
        with log_context(round=round):
            started, began = datetime.now(UTC), time.perf_counter()
            readmit_centres(run)
            run.traffic = {}
            entry, because = run_train_round(run, stage_name, stage, stage_record, round)
            fit_moment_heads(run, stage_name, stage)
            entry["val"] = evaluate_validation(run, stage_name, stage, stage_record, round)
            entry["seconds"] = time.perf_counter() - began
            entry["bytes_up"], entry["bytes_down"] = (
                sum(way) for way in zip(*run.traffic.values(), strict=True)
            )
            for centre, said in entry["centres"].items():
                said["bytes_up"], said["bytes_down"] = run.traffic.get(centre, (0, 0))
            finish_round(run, stage_record, stage, entry, started, because)
            text = score_tables.summary_line(
                entry["val"], run.config.evaluation.task, run.config.evaluation.metric
            )
            spent = [said["epsilon"] for said in entry["centres"].values() if said.get("epsilon") is not None]
            text += f"  epsilon {min(spent):.2f} to {max(spent):.2f}" if spent else ""
            log.info("%s round %d/%d  %5.1f s  %s", stage_name, round, stage.rounds, entry["seconds"], text)
    stage_record["finished"] = True
    checkpoint_run(run, stage_name, len(stage_record["rounds"]) - 1)


def fit_moment_heads(run: Run, stage_name: str, stage: Stage) -> None:
    """Fit the heads with `head: moments` on the centres' class moments of the present features."""
    for task in stage_tasks(run.config, stage):
        if run.config.tasks[task].head_update == "moments":
            requests = {
                c: StatisticsRequest(
                    run.run_id, config_to_dict(run.config), "moments", stage_name, "train", task, run.weights
                )
                for c in run.expected_centres
            }
            weight, bias = fit_balanced_discriminant(query_sum(run, requests))
            run.weights = run.weights.copy()  # it may be on its way to somebody
            for entry in run.layout.floats:
                if entry.group == task:
                    run.weights.floats[entry.span] = (weight if len(entry.shape) == 2 else bias).reshape(-1)


# --- evaluation and the end of a round ------------------------------------------------------------------------------------------------


def evaluate_validation(
    run: Run, stage_name: str, stage: Stage, stage_record: dict[str, Any], round_number: int
) -> dict[str, Any]:
    """Validation scores of the present weights, as the report shows them: {task: {centres, macro, pooled, worst, spread}}."""
    sums = query_scores(
        run,
        stage_name,
        "val",
        {c: personal_layers_for(run, stage_record, c, round_number) for c in run.expected_centres},
    )
    return score_tables.score_table(sums, run.config, stage_tasks(run.config, stage))


def query_scores(
    run: Run, stage_name: str, split: str, personal_rounds: Mapping[str, list[tuple[str, int]]]
) -> Sums:
    """The centres' sums for the scores of the present weights, over which each lays its `personal` ones."""
    return query_sum(
        run,
        {
            c: StatisticsRequest(
                run.run_id, config_to_dict(run.config), "scores", stage_name, split, "", run.weights, own
            )
            for c, own in personal_rounds.items()
        },
    )


def finish_round(
    run: Run,
    stage_record: dict[str, Any],
    stage: Stage,
    round_record: dict[str, Any],
    started: datetime,
    close_reason: str,
) -> None:
    """A round is over: the best is kept, ledger and checkpoint are written (in this order: a round is never missing in the ledger)."""
    stage_record["rounds"].append(round_record)
    update_best(run, stage_record, round_record)
    run.ledger.add_round(
        run.run_id, stage_record["name"], round_record["round"], started=started, seconds=round_record["seconds"], closed_because=close_reason,
        contributions=round_record["centres"], weights=round_record["weights"], scores=score_tables.drop_sums(round_record["val"]),
    )  # fmt: skip
    checkpoint_run(run, stage_record["name"], round_record["round"])
    run.on_round_end()


def checkpoint_run(run: Run, stage: str, round_number: int) -> None:
    """Checkpoint what the run is."""
    place = run.result["stages"][-1]
    history = [entry for each in run.result["stages"] for entry in each["rounds"]]
    stages = [{**each, "rounds": len(each["rounds"])} for each in run.result["stages"]]
    facts = {"result": {**run.result, "stages": stages}, "best": {} if place["personal"] else place["best"]}
    checkpoint.write_checkpoint(
        run.run_dir,
        checkpoint.Checkpoint(
            stage,
            round_number,
            dict(run.layout.to_state_dict(run.weights)),
            run.optimiser_state,
            facts,
            history,
        ),
    )


def evaluate_test(run: Run) -> None:
    """The test split, touched once, by the best round on validation."""
    place = run.result["stages"][-1]
    name = place["name"]
    run.weights = load_best_weights(run)
    sums = query_scores(
        run,
        name,
        "test",
        {
            c: personal_layers_for(run, place, c, best_round_for(place, c)["round"])
            for c in run.expected_centres
        },
    )
    run.result["test"] = score_tables.score_table(
        sums, run.config, stage_tasks(run.config, run.config.stages[name]), with_sums=True
    )
    if run.config.federation.held_out_centres or run.config.federation.fold is not None:
        run.result["test_sums"] = {
            key: array.tolist() for key, array in sums.items()
        }  # a cross-validation adds its parts up
    run.ledger.add_metrics(
        run.run_id, name, place["rounds"][-1]["round"], "test", score_tables.drop_sums(run.result["test"])
    )
