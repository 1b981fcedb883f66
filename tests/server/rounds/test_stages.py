"""What a stage trains: head updates, modes, local layers, participants, learning rate, number of rounds."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.config.schema import EvaluationConfig, OptimiserConfig, Stage
from common.protocol.messages import JoinReply, Reply, Request, TrainRequest
from common.utils.errors import ConsiliumError
from server.aggregation.label_counts import participating_centres
from server.rounds.train_round import plateau_lr_scale
from server.run.records import RoundRecord, TaskScores
from server.run.run_state import Run
from tests.in_process_federation import InProcess, phantom_config, sites
from tests.server.rounds.phantom_run import run


@pytest.mark.parametrize("head_update", ["local", "anchored", "moments"])
def test_every_head_update_runs(phantom: Path, tmp_path: Path, head_update: str) -> None:
    config = phantom_config(phantom, f"tasks.source.head_update={head_update}", "stage.rounds=1")
    result = run(config, tmp_path)
    num_scans = sum(sum(centre.counts["val"]["source"].values()) for centre in result.centres.values())
    assert result.stages[0].rounds[1].validation["source"].pooled["n"] == num_scans


def test_all_three_modes_take_equally_many_steps(phantom: Path, tmp_path: Path) -> None:
    steps = {}
    for mode in ("federated", "central", "local"):
        config = phantom_config(phantom, f"federation.mode={mode}", "stage.rounds=1")
        result = run(config, tmp_path, name=mode)
        steps[mode] = sum(centre.steps or 0 for centre in result.stages[0].rounds[1].centres.values())
        assert set(result.test["covid"].centres) == {"north", "east", "south", "west"}
    assert steps["federated"] == steps["central"] == steps["local"]
    assert not (tmp_path / "local" / "model.safetensors").exists()
    notes = json.loads((tmp_path / "local" / "metrics.json").read_text())["notes"]
    assert any("no weights were exchanged" in note for note in notes)


def test_local_only_stage_starts_from_the_best_weights_of_the_stage_before(
    phantom: Path, tmp_path: Path
) -> None:
    config = phantom_config(phantom)
    main_stage = config.stages["main"]
    local_stage = replace(main_stage, rounds=1, local_layers=["all"], tasks=["covid"])
    config = replace(config, stages={"main": main_stage, "own": local_stage})
    main, own = run(config, tmp_path).stages
    assert main.best is not None
    best = main.rounds[main.best.round].validation["covid"].centres
    assert own.rounds[0].validation["covid"].centres == best
    assert set(own.best_by_centre) == {"north", "east", "south", "west"}
    for centre, chosen in own.best_by_centre.items():
        values = [record.validation["covid"].centres[centre].metrics["auc"] for record in own.rounds]
        assert chosen.value == max(value for value in values if value is not None)


def test_missing_label_column_is_refused(phantom: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConsiliumError, match="no centre has a column 'covit' for task 'covid'; fill it at one centre"
    ):
        run(phantom_config(phantom, "tasks.covid.label_column=covit"), tmp_path)


def test_patience_ends_a_stage(phantom: Path, tmp_path: Path) -> None:
    result = run(
        phantom_config(phantom, "evaluation.patience=1", "stage.rounds=5", "stage.optimiser.lr=1e-9"),
        tmp_path,
    )
    assert [record.round for record in result.stages[0].rounds] == [0, 1]
    assert "no better validation in 1 rounds" in result.notes[0]


# --- which centres train, the learning rate, the number of rounds


def records_of(values: list[float | None], task: str = "covid") -> list[RoundRecord]:
    """Records of rounds, as far as the AUC on validation goes."""
    records = []
    for value in values:
        scores = TaskScores(centres={}, macro={"auc": value}, pooled={}, worst={}, spread={})
        records.append(RoundRecord(round=len(records), validation={task: scores}))
    return records


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.4, 0.5]), min_size=1, max_size=25),
    st.integers(1, 4),
    st.sampled_from([0.5, 0.65]),
)
def test_plateau_schedule_is_that_of_pytorch(values: list[float], patience: int, factor: float) -> None:
    stage = Stage(
        optimiser=OptimiserConfig(schedule="plateau", plateau_patience=patience, plateau_factor=factor)
    )
    reference = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        reference, mode="max", threshold=0, patience=patience, factor=factor, eps=0
    )
    for value in values:
        scheduler.step(value)
    assert plateau_lr_scale(stage, records_of(list(values)), EvaluationConfig()) == pytest.approx(
        reference.param_groups[0]["lr"]
    )


def test_plateau_schedule_without_a_score_keeps_the_learning_rate() -> None:
    stage = Stage(optimiser=OptimiserConfig(schedule="plateau", plateau_patience=1))
    assert plateau_lr_scale(stage, records_of([0.5] * 9, task="other"), EvaluationConfig()) == 1.0
    assert plateau_lr_scale(stage, records_of([None] * 9), EvaluationConfig()) == 1.0


def test_centres_receive_the_reduced_learning_rate(phantom: Path, tmp_path: Path) -> None:
    scales = []

    def hook(centre: str, request: Request, reply: Reply) -> Reply:
        if isinstance(request, TrainRequest) and centre == "north":
            scales.append(request.lr_scale)
        return reply

    overrides = [
        "stage.optimiser.schedule=plateau",
        "stage.optimiser.plateau_patience=1",
        "stage.optimiser.lr=1e-9",
        "stage.rounds=5",
    ]
    run(phantom_config(phantom, *overrides), tmp_path, InProcess(sites(), hook))
    assert scales == [1.0, 1.0, 0.65, 0.65, pytest.approx(0.65**2)]


def test_patience_counts_from_the_end_of_the_warm_up(phantom: Path, tmp_path: Path) -> None:
    overrides = ["evaluation.patience=1", "evaluation.warmup=2", "stage.rounds=9", "stage.optimiser.lr=1e-9"]
    result = run(phantom_config(phantom, *overrides), tmp_path)
    assert [record.round for record in result.stages[0].rounds] == [0, 1, 2, 3]


def run_with_counts(counts: dict[str, list[float]], *overrides: str) -> Run:
    """A run whose members have the given numbers of training scans of `covid`."""
    config = phantom_config(Path("none"), "stage.tasks=[covid]", *overrides)
    run = Run("r", config, Path("none"), InProcess([]), None)  # type: ignore[arg-type]
    for centre, scans in counts.items():
        run.membership.members[centre] = JoinReply(
            centre, [centre], "", [centre], ["covid"], {}, {}, {}, "cpu"
        )
        run.membership.label_counts[f"{centre}/train/covid"] = np.array(scans)
    return run


def test_centres_with_labels_train_in_a_stage() -> None:
    """A centre that has not joined yet may have labels; one that is held out does not train.

    The average is over the centres that have labels.
    """
    counts = {"north": [4.0, 6.0, 1.0], "east": [0.0, 0.0, 9.0], "south": [0.0, 2.0, 0.0]}
    run = run_with_counts(counts)
    centres, mean_scans = participating_centres(run, run.config.stages["main"])
    assert (centres, mean_scans) == (["north", "south", "west"], 6.0)
    run = run_with_counts(counts, "federation.held_out_centres=[north]")
    assert participating_centres(run, run.config.stages["main"])[0] == ["south", "west"]
    run = run_with_counts({"north": [0.0, 0.0, 9.0]})
    with pytest.raises(
        ConsiliumError,
        match="no centre has a labelled training scan for the tasks covid; fill a label column or drop",
    ):
        participating_centres(run, run.config.stages["main"])


def test_task_that_only_the_held_out_centre_labels_is_refused(phantom: Path, tmp_path: Path) -> None:
    config = phantom_config(phantom, "recipe=transfer", "federation.held_out_centres=[west]")
    with pytest.raises(
        ConsiliumError,
        match="no centre has a labelled training scan for task 'target'; fill the column or drop the task",
    ):
        run(config, tmp_path)
