"""Scores of the global weights at the centres: on validation after every round, on test once."""

from __future__ import annotations

from collections.abc import Mapping

from common.config.normalise import stage_tasks
from common.protocol.messages import StatisticsRequest, Sums
from server.analysis.additive_queries import query_sum
from server.analysis.score_tables import compute_scores
from server.rounds.model_selection import (
    PersonalRounds,
    best_round_for,
    load_best_weights,
    personal_layers_for,
)
from server.rounds.stage import ActiveStage
from server.run.records import TaskScores
from server.run.run_state import Run


def evaluate_validation(run: Run, stage: ActiveStage, round_number: int) -> dict[str, TaskScores]:
    """Score the present weights on validation: {task: scores} for the stage's tasks."""
    personal_rounds = {}
    for centre in run.expected_centres:
        personal_rounds[centre] = personal_layers_for(run, stage.record, centre, round_number)
    sums = query_scores(run, stage.name, "val", personal_rounds)
    return compute_scores(sums, run.config, stage_tasks(run.config, stage.settings))


def query_scores(
    run: Run, stage_name: str, split: str, personal_rounds: Mapping[str, PersonalRounds]
) -> Sums:
    """Return the sums over scans from which the present weights are scored.

    `personal_rounds`: {centre that is asked: which of its own local layers replace the global ones}.
    """
    requests = {}
    for centre, rounds in personal_rounds.items():
        requests[centre] = StatisticsRequest(
            run.run_id,
            run.config_values,
            "scores",
            stage_name,
            split,
            weights=run.model.weights,
            personal_rounds=rounds,
        )
    return query_sum(run, requests)


def evaluate_test(run: Run) -> None:
    """Score the last stage's best round on the test split, which is used for nothing else."""
    record = run.result.stages[-1]
    run.model.weights = load_best_weights(run)
    personal_rounds = {}
    for centre in run.expected_centres:
        best = best_round_for(record, centre)
        personal_rounds[centre] = personal_layers_for(run, record, centre, best.round if best else 0)
    sums = query_scores(run, record.name, "test", personal_rounds)
    tasks = stage_tasks(run.config, run.config.stages[record.name])
    run.result.test = compute_scores(sums, run.config, tasks, with_sums=True)
    federation = run.config.federation
    if federation.held_out_centres or federation.fold is not None:  # a cross-validation adds its folds' sums
        run.result.test_sums = {key: array.tolist() for key, array in sums.items()}
    last_round = record.rounds[-1].round
    run.ledger.add_metrics(run.run_id, record.name, last_round, "test", run.result.test)
