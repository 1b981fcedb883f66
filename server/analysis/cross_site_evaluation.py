"""Site x model: how every centre's local model does at every centre. A local model is what a round began from plus what the centre made of it.

Off by default: one hospital's own contribution goes to the others, and N centres are asked N times.
"""

from __future__ import annotations

import logging
import shutil
from typing import Any

from safetensors.numpy import load_file, save_file

from common.config.compose import config_to_dict, stage_tasks
from common.modeling.parameters import Weights
from common.protocol.messages import StatisticsRequest
from server.aggregation.contributions import StoredUpdate
from server.analysis import score_tables
from server.analysis.additive_queries import query_per_centre
from server.run.run_state import Run

LOCAL_MODELS_DIR = "local"
log = logging.getLogger("consilium.server")


def save_local_models(run: Run, stage: str, round_number: int, updates: list[StoredUpdate]) -> None:
    """Put the local models of a round of the last stage on disk, in place of those of the round before."""
    if (
        run.config.evaluation.cross_site == "none"
        or stage != list(run.config.stages)[-1]
        or run.config.stages[stage].local_layers
    ):
        return
    shutil.rmtree(run.run_dir / LOCAL_MODELS_DIR, ignore_errors=True)
    folder = run.run_dir / LOCAL_MODELS_DIR / f"{round_number:05d}"
    folder.mkdir(parents=True)
    for one in updates:
        save_file(
            {"floats": run.weights.floats + one.load_delta(), "integers": one.int_buffers},
            folder / f"{one.centre}.safetensors",
        )


def evaluate_cross_site(run: Run) -> None:
    """Score the local models of the last round on every centre's validation scans; the table goes to the result and the ledger, the models go.

    {"stage", "round", "split", "tasks": {task: {trained at: {scored at: {metric: value, "reasons"}}}}}
    """
    if run.config.evaluation.cross_site == "none":
        return
    known = run.ledger.read_artifacts(run.run_id).get("matrix")  # the run went on after this
    rounds = sorted((run.run_dir / LOCAL_MODELS_DIR).glob("*"))
    if known or not rounds:
        run.result["matrix"] = known or {}
        if not known:
            run.result["notes"].append(
                "no matrix of sites and models: the last stage sent no weights, or nobody's were used in it"
            )
        return
    stage = list(run.config.stages)[-1]
    tasks = stage_tasks(run.config, run.config.stages[stage])
    found: dict[str, Any] = {
        "stage": stage,
        "round": int(rounds[-1].name),
        "split": "val",
        "tasks": {task: {} for task in tasks},
    }
    for path in sorted(rounds[-1].glob("*.safetensors")):
        own = load_file(path)
        weights = Weights(own["floats"], own["integers"])
        requests = {
            c: StatisticsRequest(run.run_id, config_to_dict(run.config), "scores", stage, "val", "", weights)
            for c in run.expected_centres
            if c in run.members
        }
        sums = query_per_centre(run, requests, f"scores of the model of {path.stem}")
        for task, views in score_tables.score_table(sums, run.config, tasks).items():
            found["tasks"][task][path.stem] = views["centres"]
        log.info(
            "the model of %s was scored at %d centres", path.stem, len({key.split("/")[0] for key in sums})
        )
    run.result["matrix"] = found
    run.ledger.add_artifact(run.run_id, "matrix", found)
    shutil.rmtree(run.run_dir / LOCAL_MODELS_DIR)
