"""Cross-validation, leave-one-centre-out and k-fold: each fold is a run with its own folder and ledger rows.

`loco` trains without each centre in turn and tests on all scans of that centre; `kfold` puts every patient
into the test split once. An interrupted cross-validation continues where it stopped: finished folds are kept,
the unfinished one is resumed. A fold that cannot be trained, because only the centre left out has the labels,
is named in the summary, and the others go on.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from common.config.normalise import stage_tasks
from common.config.parse import parse_config
from common.config.schema import Config, FederationConfig
from common.protocol.messages import Sums, add_sums
from common.protocol.sum_key import SumKey
from common.utils.atomic_files import atomic_write
from common.utils.errors import ConsiliumError
from server.analysis.score_tables import compute_scores
from server.ledger.ledger import Ledger
from server.rounds.run_lifecycle import (
    CONFIG_FILE,
    METRICS_FILE,
    SUMMARY_FILE,
    CommandScope,
    create_run_dir,
    find_run_dir,
    load_run_config,
    make_command_scope,
    resume_run,
    start_run,
)
from server.run.operator_commands import make_fold_name
from server.run.records import (
    CrossValidationSummary,
    Metrics,
    RunResult,
    RunStatus,
    TaskScores,
    parse_result,
    result_to_dict,
)
from server.run.run_state import NoLabelledScans
from server.run.transport import Transport

log = logging.getLogger("consilium.server")


@dataclass(frozen=True)
class CrossValidation:
    """A cross-validation in progress."""

    run_id: str
    config: Config
    transport: Transport
    runs_dir: Path
    ledger: Ledger
    scope: CommandScope  # commands to one of its runs apply to all


# --- the folds


def is_cross_validation(config: Config) -> bool:
    """Return whether a configuration describes several runs."""
    return config.federation.evaluation != "holdout"


def expand_folds(config: Config) -> dict[str, Config]:
    """Return {name: configuration} of a cross-validation's runs; empty for a single run."""
    if not is_cross_validation(config):
        return {}
    if config.federation.evaluation == "loco":
        folds = _leave_one_centre_out(config.federation)
    else:
        folds = {}
        for number in range(config.federation.folds):
            folds[make_fold_name(number, [])] = replace(config.federation, fold=number)
    return {
        name: replace(config, federation=replace(federation, evaluation="holdout"))
        for name, federation in folds.items()
    }


def _leave_one_centre_out(federation: FederationConfig) -> dict[str, FederationConfig]:
    centres = federation.centres
    if len(centres) < 2:
        raise ConsiliumError(
            "federation.evaluation=loco needs two centres or more; one trains while the other is left out"
        )
    folds = {}
    for centre in centres:
        folds[make_fold_name(None, [centre])] = replace(federation, held_out_centres=[centre])
    return folds


# --- running them


def start_run_or_folds(
    config: Config, transport: Transport, runs_dir: Path, ledger: Ledger, run_id: str
) -> RunResult | CrossValidationSummary:
    """Execute a new run or cross-validation and return its result or summary. Raises ConsiliumError."""
    if not expand_folds(config):
        return start_run(config, transport, runs_dir, ledger, run_id)
    folder = runs_dir / run_id
    if folder.exists():
        raise ConsiliumError(
            f"{folder} exists already; give the new cross-validation another id, or resume this one"
        )
    create_run_dir(folder, config)
    scope = make_command_scope(ledger, run_id)
    return run_folds(CrossValidation(run_id, config, transport, runs_dir, ledger, scope))


def resume_run_or_folds(
    run_id: str, transport: Transport, runs_dir: Path, ledger: Ledger
) -> RunResult | CrossValidationSummary:
    """Continue an interrupted run or cross-validation. Raises ConsiliumError."""
    folder = find_run_dir(runs_dir, run_id)
    config = load_run_config(folder)
    if not expand_folds(config):
        return resume_run(run_id, transport, runs_dir, ledger)
    if (folder / SUMMARY_FILE).is_file():
        raise ConsiliumError(f"cross-validation '{folder.name}' is finished; there is nothing to resume")
    scope = make_command_scope(ledger, folder.name)
    return run_folds(CrossValidation(folder.name, config, transport, runs_dir, ledger, scope))


def run_folds(study: CrossValidation) -> CrossValidationSummary:
    """Execute the folds that are not finished yet, then write the summary."""
    folds = expand_folds(study.config)
    evaluation = study.config.federation.evaluation
    results: dict[str, RunResult] = {}
    untrained: dict[str, str] = {}
    for number, (name, config) in enumerate(folds.items(), 1):
        log.info("%s: %s (%d of %d)", evaluation, name, number, len(folds))
        try:
            results[name] = _run_fold(study, f"{study.run_id}-{name}", config)
        except NoLabelledScans as error:
            log.warning("%s: %s", name, error)
            untrained[name] = str(error)
    if not results:
        reason = next(iter(untrained.values()))
        raise ConsiliumError(f"no run of cross-validation '{study.run_id}' can be trained: {reason}")
    summary = summarise_folds(study.run_id, evaluation, results, untrained)
    # Written last: its presence means that all folds are finished.
    path = study.runs_dir / study.run_id / SUMMARY_FILE
    atomic_write(path, json.dumps(result_to_dict(summary), indent=1).encode())
    return summary


def _run_fold(study: CrossValidation, run_id: str, config: Config) -> RunResult:
    """Return a fold's result: as it was saved, or after resuming or starting its run."""
    folder = study.runs_dir / run_id
    if (folder / METRICS_FILE).is_file():
        return parse_result(json.loads((folder / METRICS_FILE).read_text()))
    if (folder / CONFIG_FILE).exists():
        return resume_run(run_id, study.transport, study.runs_dir, study.ledger, study.scope)
    return start_run(config, study.transport, study.runs_dir, study.ledger, run_id, study.scope)


# --- the summary


def summarise_folds(
    run_id: str, evaluation: str, results: Mapping[str, RunResult], untrained: Mapping[str, str]
) -> CrossValidationSummary:
    """Return what the runs of a cross-validation say together.

    The total's test scores are computed from the sum of the folds' sums, so that every scan counts once. Of a
    `loco` fold only the sums of the centre left out are added.

    Args:
        run_id: the cross-validation's id.
        evaluation: loco or kfold.
        results: {fold: result}.
        untrained: {fold that could not be trained: why}.
    """
    total_sums: Sums = {}
    fold_metrics = {}
    for name, result in results.items():
        held_out = result.config["federation"]["held_out_centres"]
        add_sums(total_sums, _select_test_sums(result, held_out))
        fold_metrics[name] = _summarise_test(result.test, held_out)
    first = next(iter(results.values()))
    config = parse_config(first.config)
    tasks = stage_tasks(config, config.stages[first.stages[-1].name])
    total = RunResult(
        run_id=run_id,
        recipe=config.recipe,
        mode=config.federation.mode,
        seed=config.seed,
        started=first.started,
        config=first.config,
        status=RunStatus.FINISHED,
        seconds=sum(result.seconds for result in results.values()),
        test=compute_scores(total_sums, config, tasks, with_sums=True),
        fitted_tasks=first.fitted_tasks,
    )
    return CrossValidationSummary(evaluation, dict(untrained), fold_metrics, total)


def _select_test_sums(result: RunResult, held_out_centres: list[str]) -> Sums:
    """Return a fold's test sums; of a fold with centres left out, theirs only."""
    sums: Sums = {}
    for text, values in result.test_sums.items():
        if not held_out_centres or SumKey.parse(text).cohort in held_out_centres:
            sums[text] = np.array(values)
    return sums


def _summarise_test(scores: Mapping[str, TaskScores], held_out_centres: list[str]) -> dict[str, Metrics]:
    """Return {task: metrics} of a fold: the mean over centres, or those of the centre left out."""
    metrics_by_task: dict[str, Metrics] = {}
    for task, task_scores in scores.items():
        if not held_out_centres:
            metrics_by_task[task] = task_scores.macro
            continue
        centre_scores = task_scores.centres.get(held_out_centres[0])
        metrics_by_task[task] = centre_scores.metrics if centre_scores else {}
    return metrics_by_task
