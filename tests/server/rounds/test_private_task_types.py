"""Every type of task under every kind of differential privacy: a whole run, or a refusal in one sentence."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from common.config.compose import prepare_config
from common.config.schema import Config, Task
from common.utils.errors import ConsiliumError
from server.rounds.run_lifecycle import open_ledger, start_run
from server.run.records import RunStatus
from tests.in_process_federation import InProcess, phantom_config, sites

TASKS = {
    "binary": Task(label_column="transition"),
    "multiclass": Task(type="multiclass", label_column="severity", bin_edges=[10.0, 30.0]),
    "clustered": Task(type="multiclass", label_column="transition", num_clusters=[2]),
    "regression": Task(type="regression", label_column="severity"),
    "segmentation": Task(type="segmentation", label_column="lesion"),
    "inpainting": Task(type="inpainting"),
    "contrastive": Task(type="contrastive"),
}
PATIENT = ["privacy=patient", "privacy.epsilon=20"]
NOISY_SCORES = [*PATIENT, "privacy.query_noise_multiplier=15", "evaluation.histogram_bins=16"]
CENTRAL = ["privacy=central", "privacy.epsilon=20"]
UNBOUNDED = "scored by sums that one patient can change without bound"
REFUSALS = {
    ("patient", "clustered"): "sends sums of features for its clusters without noise",
    ("patient", "contrastive"): "contrasts a scan with a queue of others",
    ("noisy scores", "clustered"): "sends sums of features for its clusters without noise",
    ("noisy scores", "regression"): UNBOUNDED,
    ("noisy scores", "segmentation"): UNBOUNDED,
    ("noisy scores", "inpainting"): UNBOUNDED,
    ("noisy scores", "contrastive"): "contrasts a scan with a queue of others",
    ("central", "clustered"): "uses sums of features, which get no noise",
}
KINDS = {"patient": PATIENT, "noisy scores": NOISY_SCORES, "central": CENTRAL}


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("phantom")


def make_config(phantom: Path, kind: str, task_type: str) -> Config:
    """Return a run of one round for two tasks: covid, which is scored, and one of the type."""
    small = ["stage.rounds=1", "stage.tasks=[covid]", "federation.centres=[north,east]"]
    config = phantom_config(phantom, *small, *KINDS[kind])
    stage = replace(config.stages["main"], tasks=["covid", "other"])
    tasks = {"covid": config.tasks["covid"], "other": TASKS[task_type]}
    return prepare_config(replace(config, tasks=tasks, stages={"main": stage}))


@pytest.mark.parametrize("task_type", TASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_run_finishes_and_is_charged_as_planned_or_is_refused_at_once(
    phantom: Path, tmp_path: Path, kind: str, task_type: str
) -> None:
    refusal = REFUSALS.get((kind, task_type))
    if refusal:
        with pytest.raises(ConsiliumError, match=refusal):
            make_config(phantom, kind, task_type)
        return
    config = make_config(phantom, kind, task_type)
    nodes = [replace(site, state=str(tmp_path / f"state{site.index}")) for site in sites(2)]
    result = start_run(config, InProcess(nodes), tmp_path, open_ledger(tmp_path), "r")
    assert result.status == RunStatus.FINISHED
    assert result.left_out == []
    assert result.stages[0].rounds[1].validation.keys() == {"covid", "other"}
    budget = tmp_path / "state0" / "budget" / "spent.json"
    if kind == "central":
        assert not budget.exists()
        return
    rounds = [charge["round"] for charge in json.loads(budget.read_text())["charges"]]
    noisy_scores = kind == "noisy scores"
    expected = [0, 0, 1, 0, 0] if noisy_scores else [0, 1]  # counts, scores, the round, scores, the test
    assert rounds == expected
