"""Every recipe on phantom hospitals with different labels: who trains what, what is reported, resumption."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import load_file

from common.config.normalise import stage_tasks
from common.config.schema import Config, Task
from common.learning.losses import UNSUPERVISED_TYPES
from common.modeling.model import make_model, shallow_parameter_names
from common.modeling.parameters import build_layout
from common.protocol.messages import Reply, Request, TrainRequest
from server.rounds.run_lifecycle import open_ledger, resume_run, start_run
from server.run.records import RunStatus, StageRecord, TaskScores
from tests.in_process_federation import InProcess, phantom_config, sites

CENTRES = ["north", "south", "west"]
SOFT_LABELS = ["stages.transition.tasks=[soft]", "tasks.soft.num_clusters=[2,3]"]
# {name: (overrides, {task: metrics that the report must have})}
RECIPES = {
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
    "soft": (["recipe=transfer", *SOFT_LABELS], {"target": {"accuracy", "f1", "auc"}}),
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


def is_labelled(table: pd.DataFrame, name: str, task: Task) -> pd.Series:
    """Which rows of a cohort have a task's label, by the table alone."""
    if task.type in UNSUPERVISED_TYPES:
        return pd.Series(True, index=table.index)
    columns = task.label_columns or [task.label_column or name]
    if not set(columns) <= set(table):
        return pd.Series(False, index=table.index)
    return table[columns].notna().all(axis=1)


def read_tables(phantom: Path, modality: str) -> dict[str, pd.DataFrame]:
    """Each centre's cohort table, of one modality."""
    tables = {}
    for centre in CENTRES:
        table = pd.read_csv(phantom / centre / "cohort.csv")
        tables[centre] = table[table["modality"] == modality]
    return tables


def select_split(tables: dict[str, pd.DataFrame], split: str) -> dict[str, pd.DataFrame]:
    return {centre: table[table["split"] == split] for centre, table in tables.items()}


def centres_with_label(tables: dict[str, pd.DataFrame], name: str, task: Task) -> set[str]:
    return {centre for centre, table in tables.items() if is_labelled(table, name, task).any()}


def centres_with_scans(scores: TaskScores) -> set[str]:
    return {centre for centre, centre_scores in scores.centres.items() if centre_scores.metrics["n"]}


@pytest.mark.parametrize("recipe", list(RECIPES))
def test_recipe_runs_and_reports(phantom: Path, tmp_path: Path, recipe: str) -> None:
    trained: list[tuple[str, str]] = []

    def hook(centre: str, request: Request, reply: Reply) -> Reply:
        if isinstance(request, TrainRequest):
            trained.append((request.stage, centre))
        return reply

    overrides, expected_metrics = RECIPES[recipe]
    run_config = config(phantom, *overrides)
    result = start_run(run_config, InProcess(sites(), hook), tmp_path, open_ledger(tmp_path), "r")
    assert result.status == RunStatus.FINISHED
    assert result.left_out == []
    tables = read_tables(phantom, run_config.preprocess.modality)
    train = select_split(tables, "train")
    val = select_split(tables, "val")
    test = select_split(tables, "test")
    for (name, stage), record in zip(run_config.stages.items(), result.stages, strict=True):
        first_round = record.rounds[1]
        expected_centres: set[str] = set()
        for task_name in stage_tasks(run_config, stage):
            task = run_config.tasks[task_name]
            with_label = centres_with_label(train, task_name, task)
            expected_centres |= with_label
            # A head is averaged over the centres that have labels for it.
            weights = first_round.weights[task_name]
            assert {centre for centre, weight in weights.items() if weight > 0} == with_label
            validated = centres_with_scans(first_round.validation[task_name])
            assert validated == centres_with_label(val, task_name, task)
        asked = [centre for stage_name, centre in trained if stage_name == name]
        assert asked == [centre for centre in CENTRES if centre in expected_centres]
    for task_name, metric_names in expected_metrics.items():
        scores = result.test[task_name]
        assert metric_names <= scores.macro.keys()
        for centre in CENTRES:
            num_labelled = int(is_labelled(test[centre], task_name, run_config.tasks[task_name]).sum())
            assert (centre in centres_with_scans(scores)) == bool(num_labelled)
            if centre in scores.centres:
                centre_scores = scores.centres[centre]
                assert centre_scores.metrics["n"] == num_labelled
                assert centre_scores.loss is None or np.isfinite(centre_scores.loss)
                assert (centre_scores.loss is None) == (not num_labelled)
    page = (tmp_path / "r" / "report.html").read_text()
    for word in (*run_config.stages, *expected_metrics):
        assert word in page
    assert all(
        np.isfinite(tensor).all() for tensor in load_file(tmp_path / "r" / "model.safetensors").values()
    )


# --- interruption and resumption


class CoordinatorCrash(Exception):
    """The coordinator's machine went away."""


def crash_in_round(stage: str, round_number: int) -> InProcess:
    """Centres of which the last one's reply in a round never arrives: the coordinator is gone by then."""

    def hook(centre: str, request: Request, reply: Reply) -> Reply:
        is_training = isinstance(request, TrainRequest) and centre == "west"
        if is_training and (request.stage, request.round) == (stage, round_number):
            raise CoordinatorCrash
        return reply

    return InProcess(sites(), hook)


@pytest.mark.parametrize(
    ("overrides", "stage"),
    [
        (["recipe=finegrained", "stages.pretrain.rounds=2", "stages.main.rounds=1"], "pretrain"),
        (["recipe=transfer", *SOFT_LABELS, "stages.transition.rounds=1", "stages.target.rounds=2"], "target"),
    ],
)
def test_run_interrupted_in_any_stage_resumes_to_the_same_bits(
    phantom: Path, tmp_path: Path, overrides: list[str], stage: str
) -> None:
    """In self-supervision, whose queue lasts for a round, and after a clustering, whose labels remain."""
    run_config = config(phantom, *overrides, centres=["north", "west"])
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = start_run(run_config, InProcess(sites()), whole, open_ledger(whole), "whole")
    with pytest.raises(CoordinatorCrash):
        start_run(run_config, crash_in_round(stage, 2), broken, open_ledger(broken), "broken")
    assert not (broken / "broken" / "metrics.json").exists()
    resumed = resume_run("broken", InProcess(sites()), broken, open_ledger(broken))
    expected_tensors = load_file(whole / "whole" / "model.safetensors")
    resumed_tensors = load_file(broken / "broken" / "model.safetensors")
    assert expected_tensors.keys() == resumed_tensors.keys()
    for name, tensor in expected_tensors.items():
        np.testing.assert_array_equal(tensor, resumed_tensors[name], err_msg=name)
    assert resumed.test == expected.test
    assert [list_validations(stage) for stage in resumed.stages] == [
        list_validations(stage) for stage in expected.stages
    ]
    assert json.loads((broken / "broken" / "metrics.json").read_text())["status"] == "finished"


def list_validations(stage: StageRecord) -> list[tuple[int, dict[str, TaskScores]]]:
    return [(record.round, record.validation) for record in stage.rounds]


def test_stages_train_the_parameters_that_they_should(phantom: Path, tmp_path: Path) -> None:
    """The transition trains the encoder's deeper half and its own head; no stage trains the other's head."""
    in_transition, in_target = [], []

    def hook(centre: str, request: Request, reply: Reply) -> Reply:
        if isinstance(request, TrainRequest):
            received = in_transition if request.stage == "transition" else in_target
            received.append(request.weights.floats.copy())
        return reply

    # Without compression, so that every request carries all weights.
    run_config = config(phantom, "recipe=transfer", "aggregation.compression=fp32", centres=["north", "west"])
    start_run(run_config, InProcess(sites(), hook), tmp_path, open_ledger(tmp_path), "r")
    model = make_model(run_config.backbone, run_config.tasks, 0)
    shallow = shallow_parameter_names(model, 0.5)
    assert shallow
    for slot in build_layout(model).floats:
        has_changed = bool((in_transition[0][slot.span] != in_target[0][slot.span]).any())
        if slot.group == "target" or slot.name in shallow:
            assert not has_changed, slot.name
        elif slot.group == "transition":
            assert has_changed, slot.name
