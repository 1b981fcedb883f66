"""Score every centre's local model at every centre. A local model is the global one plus one centre's update.

Off by default: each hospital's own update goes to the others, and N centres are asked N times.
"""

from __future__ import annotations

import dataclasses
import logging
import shutil
from pathlib import Path

from safetensors.numpy import load_file, save_file

from common.config.normalise import stage_tasks
from common.modeling.parameters import Weights
from common.protocol.messages import StatisticsRequest
from common.protocol.sum_key import SumKey
from server.aggregation.stored_updates import StoredUpdate
from server.analysis.additive_queries import query_per_centre
from server.analysis.score_tables import compute_scores
from server.ledger.ledger import ArtifactKind
from server.run.records import CentreScores, CrossSiteScores, parse_cross_site
from server.run.run_state import Run

LOCAL_MODELS_DIR = "local"
log = logging.getLogger("consilium.server")


def save_local_models(run: Run, stage: str, round_number: int, updates: list[StoredUpdate]) -> None:
    """Save the local models of a round of the last stage in place of those of the round before.

    Nothing is saved where they are not to be evaluated or are not complete (`stage.local_layers`).
    """
    is_last_stage = stage == list(run.config.stages)[-1]
    if run.config.evaluation.cross_site == "none" or not is_last_stage:
        return
    if run.config.stages[stage].local_layers:
        return
    shutil.rmtree(run.run_dir / LOCAL_MODELS_DIR, ignore_errors=True)
    folder = run.run_dir / LOCAL_MODELS_DIR / f"{round_number:05d}"
    folder.mkdir(parents=True)
    for update in updates:
        floats = run.model.weights.floats + update.load_delta()
        arrays = {"floats": floats, "integers": update.int_buffers}
        save_file(arrays, folder / f"{update.centre}.safetensors")


def evaluate_cross_site(run: Run) -> None:
    """Score the saved local models on every centre's validation scans.

    The scores go to the result and the ledger; the models are removed. A run that was resumed after this
    takes the scores from the ledger.
    """
    if run.config.evaluation.cross_site == "none":
        return
    saved = run.ledger.read_artifacts(run.run_id).get(ArtifactKind.CROSS_SITE)
    if saved:
        run.result.cross_site = parse_cross_site(saved)
        return
    round_folders = sorted((run.run_dir / LOCAL_MODELS_DIR).glob("*"))
    if not round_folders:
        run.result.notes.append(
            "no cross-site scores: the last stage exchanged no weights, or none of its updates was accepted"
        )
        return
    scores = _score_local_models(run, round_folders[-1])
    run.result.cross_site = scores
    run.ledger.add_artifact(run.run_id, ArtifactKind.CROSS_SITE, dataclasses.asdict(scores))
    shutil.rmtree(run.run_dir / LOCAL_MODELS_DIR)


def _score_local_models(run: Run, folder: Path) -> CrossSiteScores:
    stage = list(run.config.stages)[-1]
    tasks = stage_tasks(run.config, run.config.stages[stage])
    scores_by_task: dict[str, dict[str, dict[str, CentreScores]]] = {task: {} for task in tasks}
    for path in sorted(folder.glob("*.safetensors")):
        arrays = load_file(path)
        weights = Weights(arrays["floats"], arrays["integers"])
        request = StatisticsRequest(run.run_id, run.config_values, "scores", stage, "val", "", weights)
        centres = [centre for centre in run.expected_centres if centre in run.membership.members]
        sums = query_per_centre(run, dict.fromkeys(centres, request), f"scores of the model of {path.stem}")
        for task, task_scores in compute_scores(sums, run.config, tasks).items():
            scores_by_task[task][path.stem] = task_scores.centres
        cohorts = {SumKey.parse(text).cohort for text in sums}
        log.info("the model of %s was scored at %d centres", path.stem, len(cohorts))
    return CrossSiteScores(stage, int(folder.name), "val", scores_by_task)
