"""Every paper's recipe on made-up hospitals that hold different labels: who is asked to train what, what is reported, and that a run survives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

from common.config.compose import stage_tasks
from common.config.schema import Config, Task
from common.learning.losses import UNSUPERVISED_TYPES
from common.modeling.model import make_model, shallow_parameter_names
from common.modeling.parameters import build_layout
from common.protocol.messages import Reply, Request, TrainRequest
from server.rounds.run_lifecycle import open_ledger, resume_run, start_run
from tests.in_process_federation import InProcess, phantom_config, sites

CENTRES = ["north", "south", "west"]
SOFT = ["stages.transition.tasks=[soft]", "tasks.soft.num_clusters=[2,3]"]
RECIPES = {  # overrides, and the metrics of each task that the report must have
    "multisource": (["recipe=multisource"], {"covid": {"auc", "f1"}, "source": {"accuracy"}}),
    "prognosis": (["recipe=prognosis"], {"outcome": {"auc", "gmean"}, "brixia": {"accuracy", "f1"}}),
    "regions": (
        ["recipe=prognosis", "stage.tasks=[outcome,regions,right,left]"],
        {"outcome": {"auc"}, "regions": {"mae", "r2"}, "right": {"f1"}, "left": {"f1"}},
    ),
    "finegrained": (
        ["recipe=finegrained"],
        {"finding": {"balanced_accuracy"}, "infection": {"dice", "precision"}},
    ),
    "inpainting": (
        ["recipe=finegrained", "stages.pretrain.tasks=[inpainting]"],
        {"finding": {"f1"}, "infection": {"dice"}},
    ),
    "triage": (
        ["recipe=triage", "preprocess.num_slices=2"],
        {"covid": {"auc"}, "lesion": {"dice", "spearman"}},
    ),
    "transfer": (["recipe=transfer"], {"target": {"accuracy", "precision", "f1", "auc"}}),
    "soft": (["recipe=transfer", *SOFT], {"target": {"accuracy", "f1", "auc"}}),
}


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("phantom")


def config(phantom: Path, *overrides: str, centres: list[str] = CENTRES) -> Config:
    few = [
        "federation.phantom.scale=0.001",
        "federation.phantom.num_slices=10",
        f"federation.centres=[{','.join(centres)}]",
    ]
    return phantom_config(phantom, *few, "stage.local_epochs=1", "stage.rounds=1", *overrides)


def labelled(table: pd.DataFrame, name: str, task: Task) -> pd.Series:
    """Which rows of a cohort have a task's label, by the table alone."""
    if task.type in UNSUPERVISED_TYPES:
        return pd.Series(True, index=table.index)
    columns = task.label_columns or [task.label_column or name]
    return (
        table[columns].notna().all(axis=1)
        if set(columns) <= set(table)
        else pd.Series(False, index=table.index)
    )


def tables(phantom: Path, modality: str) -> dict[str, pd.DataFrame]:
    read = {c: pd.read_csv(phantom / c / "cohort.csv") for c in CENTRES}
    return {c: table[table["modality"] == modality] for c, table in read.items()}


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_a_recipe_runs_and_reports(phantom: Path, tmp_path: Path, recipe: str) -> None:
    trained: list[tuple[str, str]] = []

    def hook(centre: str, request: Request, reply: Reply) -> Reply:
        if isinstance(request, TrainRequest):
            trained.append((request.stage, centre))
        return reply

    overrides, metrics = RECIPES[recipe]
    given = config(phantom, *overrides)
    result = start_run(given, InProcess(sites(), hook), tmp_path, open_ledger(tmp_path), "r")
    assert result["status"] == "finished"
    assert result["left_out"] == []
    held = tables(phantom, given.preprocess.modality)
    for (name, stage), played in zip(given.stages.items(), result["stages"], strict=True):
        tasks = {t: given.tasks[t] for t in stage_tasks(given, stage)}
        train = {c: table[table["split"] == "train"] for c, table in held.items()}
        teachers = [c for c in CENTRES if any(labelled(train[c], t, task).any() for t, task in tasks.items())]
        assert [c for s, c in trained if s == name] == teachers
        weights = played["rounds"][1]["weights"]
        for t, task in tasks.items():  # a head is averaged over those who label it
            knows = {c for c in CENTRES if labelled(train[c], t, task).any()}
            assert {c for c, w in weights[t].items() if w > 0} == knows
            seen = played["rounds"][1]["val"][t]["centres"]
            wanted = {c for c in CENTRES if labelled(held[c][held[c]["split"] == "val"], t, task).any()}
            assert {c for c, m in seen.items() if m["n"]} == wanted
    for task, wanted_metrics in metrics.items():
        views = result["test"][task]
        assert wanted_metrics <= views["macro"].keys()
        test = {c: table[table["split"] == "test"] for c, table in held.items()}
        counts = {c: int(labelled(test[c], task, given.tasks[task]).sum()) for c in CENTRES}
        assert {c: m["n"] for c, m in views["centres"].items() if m["n"]} == {
            c: n for c, n in counts.items() if n
        }
        for c, m in views["centres"].items():
            assert m["loss"] is None or np.isfinite(m["loss"])
            assert (m["loss"] is None) == (not counts[c])
    page = (tmp_path / "r" / "report.html").read_text()
    for word in (*given.stages, *metrics):
        assert word in page
    assert all(np.isfinite(w).all() for w in load_file(tmp_path / "r" / "model.safetensors").values())


# --- stopped and taken up again ----------------------------------------------------------------------------------------------------------


class Stopped(Exception):
    """The machine went away."""


def stopping(stage: str, round: int) -> InProcess:
    """Centres of which the last one's contribution in that round never arrives: the coordinator is gone by then."""

    def hook(centre: str, request: Request, reply: Reply) -> Reply:
        if isinstance(request, TrainRequest) and (request.stage, request.round, centre) == (
            stage,
            round,
            "west",
        ):
            raise Stopped
        return reply

    return InProcess(sites(), hook)


@pytest.mark.parametrize(
    ("overrides", "stage"),
    [
        (["recipe=finegrained", "stages.pretrain.rounds=2", "stages.main.rounds=1"], "pretrain"),
        (["recipe=transfer", *SOFT, "stages.transition.rounds=1", "stages.target.rounds=2"], "target"),
    ],
)
def test_a_run_stopped_in_any_stage_goes_on_to_the_same_bits(
    phantom: Path, tmp_path: Path, overrides: list[str], stage: str
) -> None:
    """In self-supervision, whose queue lives within a round, and after a clustering, whose labels the centres keep."""
    given = config(phantom, *overrides, centres=["north", "west"])
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = start_run(given, InProcess(sites()), whole, open_ledger(whole), "whole")
    with pytest.raises(Stopped):
        start_run(given, stopping(stage, 2), broken, open_ledger(broken), "broken")
    assert not (broken / "broken" / "metrics.json").exists()
    found = resume_run("broken", InProcess(sites()), broken, open_ledger(broken))
    same(load_file(whole / "whole" / "model.safetensors"), load_file(broken / "broken" / "model.safetensors"))
    assert found["test"] == expected["test"]
    assert [rounds_of(s) for s in found["stages"]] == [rounds_of(s) for s in expected["stages"]]
    assert json.loads((broken / "broken" / "metrics.json").read_text())["status"] == "finished"


def same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        np.testing.assert_array_equal(tensor, other[name], err_msg=name)


def rounds_of(stage: dict[str, Any]) -> list[tuple[int, Any]]:
    return [(r["round"], r["val"]) for r in stage["rounds"]]


def test_the_stages_are_what_they_are_called(phantom: Path, tmp_path: Path) -> None:
    """The transition moves the encoder's deeper half and its own head; the target starts from it; nobody trained the other's head."""
    before, after = [], []

    def hook(centre: str, request: Request, reply: Reply) -> Reply:
        if isinstance(request, TrainRequest):
            (before if request.stage == "transition" else after).append(request.weights.floats.copy())
        return reply

    given = config(
        phantom, "recipe=transfer", "aggregation.compression=fp32", centres=["north", "west"]
    )  # to see whole weights
    start_run(given, InProcess(sites(), hook), tmp_path, open_ledger(tmp_path), "r")
    model = make_model(given.backbone, given.tasks, 0)
    still = shallow_parameter_names(model, 0.5)
    assert still
    for e in build_layout(model).floats:
        moved = bool((before[0][e.span] != after[0][e.span]).any())
        if e.group == "target" or e.name in still:
            assert not moved, e.name
        elif e.group == "transition":
            assert moved, e.name
