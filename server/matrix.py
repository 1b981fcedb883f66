"""Site x model: how every centre's local model does at every centre. A local model is what a round began from plus what the centre made of it.

Off by default: one hospital's own contribution goes to the others, and N centres are asked N times.
"""

from __future__ import annotations

import logging
import shutil
from typing import Any

from safetensors.numpy import load_file, save_file

from common.compose import active, to_dict
from common.messages import Query
from common.weights import Weights
from server import scores
from server.aggregation import Spooled
from server.queries import apart
from server.state import Run

FOLDER = "local"
log = logging.getLogger("consilium.server")


def keep(run: Run, stage: str, round: int, arrived: list[Spooled]) -> None:
    """Put the local models of a round of the last stage on disk, in place of those of the round before."""
    if run.config.evaluation.matrix == "none" or stage != list(run.config.stages)[-1] or run.config.stages[stage].personal:
        return
    shutil.rmtree(run.folder / FOLDER, ignore_errors=True)
    folder = run.folder / FOLDER / f"{round:05d}"
    folder.mkdir(parents=True)
    for one in arrived:
        save_file({"floats": run.weights.floats + one.delta(), "integers": one.integers}, folder / f"{one.centre}.safetensors")


def score(run: Run) -> None:
    """Score the local models of the last round on every centre's validation scans; the table goes to the result and the ledger, the models go.

    {"stage", "round", "split", "tasks": {task: {trained at: {scored at: {metric: value, "reasons"}}}}}
    """
    if run.config.evaluation.matrix == "none":
        return
    known = run.ledger.evidence(run.id).get("matrix")  # the run went on after this
    rounds = sorted((run.folder / FOLDER).glob("*"))
    if known or not rounds:
        run.result["matrix"] = known or {}
        if not known:
            run.result["notes"].append("no matrix of sites and models: the last stage sent no weights, or nobody's were used in it")
        return
    stage = list(run.config.stages)[-1]
    tasks = active(run.config, run.config.stages[stage])
    found: dict[str, Any] = {"stage": stage, "round": int(rounds[-1].name), "split": "val", "tasks": {task: {} for task in tasks}}
    for path in sorted(rounds[-1].glob("*.safetensors")):
        own = load_file(path)
        weights = Weights(own["floats"], own["integers"])
        requests = {c: Query(run.id, to_dict(run.config), "scores", stage, "val", "", weights) for c in run.expected if c in run.presence}
        sums = apart(run, requests, f"scores of the model of {path.stem}")
        for task, views in scores.table(sums, run.config, tasks).items():
            found["tasks"][task][path.stem] = views["centres"]
        log.info("the model of %s was scored at %d centres", path.stem, len({key.split("/")[0] for key in sums}))
    run.result["matrix"] = found
    run.ledger.add_evidence(run.id, "matrix", found)
    shutil.rmtree(run.folder / FOLDER)
