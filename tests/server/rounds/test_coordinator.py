"""Rounds without Flower: the centres' own code, failures of every kind, kill -9 and resume."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from common.config.schema import Config, EvaluationConfig, OptimiserConfig, Stage
from common.protocol.code_fingerprint import fingerprint_code
from common.protocol.messages import JoinReply, Refusal, Reply, Request, TrainReply, TrainRequest
from common.utils.errors import ConsiliumError, RefusalCode
from server.aggregation.label_counts import participating_centres
from server.rounds.run_lifecycle import open_ledger, resume_run, start_run
from server.rounds.train_round import plateau_lr_scale
from server.run.records import (
    RoundRecord,
    RunResult,
    RunStatus,
    TaskScores,
    parse_result,
    result_to_dict,
)
from server.run.run_state import Run
from tests.in_process_federation import InProcess, phantom_config, sites

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("phantom")


def run(config: Config, runs: Path, transport: InProcess | None = None, name: str = "r") -> RunResult:
    return start_run(config, transport or InProcess(sites()), runs, open_ledger(runs), name)


def load_model(runs: Path, name: str = "r") -> dict[str, np.ndarray]:
    return load_file(runs / name / "model.safetensors")


def run_killable(phantom: Path, runs: Path, how: str, moment: str, count: int, *overrides: str) -> int:
    """Run tests/server/killed_run.py in a process of its own and return its exit code."""
    command = [sys.executable, "-m", "tests.server.killed_run"]
    command += [str(phantom), str(runs), "r", how, moment, str(count), *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, timeout=600).returncode


def test_finished_run_leaves_results_and_ledger_rows(phantom: Path, tmp_path: Path) -> None:
    result = run(phantom_config(phantom), tmp_path)
    assert result.status == RunStatus.FINISHED
    assert {p.name for p in (tmp_path / "r").iterdir()} >= {
        "metrics.json",
        "model.safetensors",
        "config.yaml",
        "report.html",
    }
    assert (tmp_path / "latest").resolve() == (tmp_path / "r").resolve()
    metrics = json.loads((tmp_path / "r" / "metrics.json").read_text())
    assert metrics["test"]["covid"]["centres"].keys() == {"north", "east", "south", "west"}
    assert result_to_dict(parse_result(metrics)) == metrics
    jsonschema.validate(metrics, json.loads((ROOT / "docs" / "metrics.schema.json").read_text()))
    rounds = result.stages[0].rounds
    assert [record.round for record in rounds] == [0, 1, 2]
    assert sum(rounds[1].weights["backbone"].values()) == pytest.approx(1)
    ledger = open_ledger(tmp_path)
    assert ledger.read_status("r") == "finished"
    assert len(ledger.read_contributions("r")) == 8
    assert {row["centre"] for row in ledger.read_centres("r")} == {"north", "east", "south", "west"}


@pytest.mark.parametrize(("moment", "count"), [("training", 6), ("aggregation", 2), ("checkpoint", 3)])
def test_killed_and_resumed_run_equals_uninterrupted_run(
    phantom: Path, tmp_path: Path, moment: str, count: int
) -> None:
    """After kill -9 in training, aggregation or before the checkpoint, the weights have the same bits.

    With batch norms kept at the centres and a server optimiser, so that every kind of state has to survive.
    """
    settings = ["stage.rounds=3", "stage.local_layers=[batch_norm]", "aggregation=fedadam"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run_killable(phantom, whole, "begin", "never", 1, *settings) == 0
    assert run_killable(phantom, broken, "begin", moment, count, *settings) == -signal.SIGKILL
    assert not (broken / "r" / "metrics.json").exists()
    assert run_killable(phantom, broken, "resume", "never", 1) == 0
    resumed = load_model(broken)
    for name, tensor in load_model(whole).items():
        np.testing.assert_array_equal(resumed[name], tensor, err_msg=name)
    scores = [json.loads((folder / "r" / "metrics.json").read_text())["test"] for folder in (whole, broken)]
    assert scores[0] == scores[1]


def test_unusable_updates_are_left_out_with_the_reason(phantom: Path, tmp_path: Path) -> None:
    def hook(centre: str, request: Request, reply: Reply) -> Reply | None:
        if isinstance(reply, TrainReply) and isinstance(request, TrainRequest):
            if (centre, request.round) == ("north", 1):
                scales = reply.encoded_delta["scales"]
                reply.encoded_delta["scales"] = np.full_like(scales, 0x7F80)  # infinite
            if (centre, request.round) == ("east", 1):
                # Ten more in the exponent: 1024 times as much.
                reply.encoded_delta["scales"] = reply.encoded_delta["scales"] + np.uint16(10 << 7)
            if (centre, request.round) == ("west", 2):
                del reply.encoded_delta["codes"]
            if (centre, request.round) == ("south", 2):
                return None  # no reply
        return reply

    result = run(phantom_config(phantom, "federation.quorum=0.5"), tmp_path, InProcess(sites(), hook))
    reasons = {(left.round, left.centre): left.reason for left in result.left_out}
    assert reasons[1, "north"] == "not finite"
    assert "times the others' median" in reasons[1, "east"]
    assert "no reply within" in reasons[2, "south"]
    assert "cannot be decoded" in reasons[2, "west"]
    codes = {(left.round, left.centre): left.code for left in result.left_out}
    assert codes == {
        (1, "north"): RefusalCode.BAD_REPLY,
        (1, "east"): RefusalCode.BAD_REPLY,
        (2, "south"): RefusalCode.OFFLINE,
        (2, "west"): RefusalCode.BAD_REPLY,
    }
    assert set(result.stages[0].rounds[1].weights["backbone"]) == {"south", "west"}
    assert all(np.isfinite(tensor).all() for tensor in load_model(tmp_path).values())


def test_run_below_quorum_retries_then_pauses_and_can_be_resumed(phantom: Path, tmp_path: Path) -> None:
    asked = []

    def hook(centre: str, request: Request, reply: Reply) -> Reply | None:
        if isinstance(request, TrainRequest) and request.round == 2 and centre in ("north", "east"):
            asked.append(centre)
            return Refusal(centre, "the disk is full")
        return reply

    config = phantom_config(phantom, "federation.quorum=0.75", "federation.round_retries=1")
    with pytest.raises(
        ConsiliumError,
        match=r"is paused: .*round 2: 2 updates, 3 needed \(.*the disk is full.*consilium-server resume r",
    ):
        run(config, tmp_path, InProcess(sites(), hook))
    assert asked == ["north", "east"] * 2
    ledger = open_ledger(tmp_path)
    assert ledger.read_status("r") == "paused"
    resume_run("r", InProcess(sites()), tmp_path, ledger)
    assert ledger.read_status("r") == "finished"
    run(config, tmp_path, name="whole")
    for name, tensor in load_model(tmp_path, "whole").items():
        np.testing.assert_array_equal(load_model(tmp_path)[name], tensor)
    with pytest.raises(ConsiliumError, match="is finished; there is nothing to resume"):
        resume_run("r", InProcess(sites()), tmp_path, ledger)


def test_late_centre_is_readmitted(phantom: Path, tmp_path: Path) -> None:
    class WestIsLate(InProcess):
        num_discoveries = 0

        def discover(self, request, expected, timeout):  # type: ignore[no-untyped-def]
            self.num_discoveries += 1
            for received in super().discover(request, expected, timeout):
                if received.centre != "west" or self.num_discoveries > 2:
                    yield received
            if self.num_discoveries <= 2:
                self.by_name.pop("west", None)

    result = run(phantom_config(phantom, "federation.quorum=0.75"), tmp_path, WestIsLate(sites()))
    first, second = result.stages[0].rounds[1:]
    assert "west" not in first.weights["backbone"]
    assert second.weights["backbone"]["west"] > 0


def test_fewer_centres_than_the_quorum_pause_the_run(phantom: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConsiliumError,
        match=r"2 of 4 centres are ready, 4 are needed \(no reply from south, west.*num-supernodes=4",
    ):
        run(phantom_config(phantom), tmp_path, InProcess(sites(2)))


def test_centre_with_other_code_is_refused(phantom: Path, tmp_path: Path) -> None:
    class EastIsOld(InProcess):
        def discover(self, request, expected, timeout):  # type: ignore[no-untyped-def]
            for received in super().discover(request, expected, timeout):
                if isinstance(received.reply, JoinReply) and received.centre == "east":
                    received.reply.fingerprint = "0123456789abcdef"
                yield received

    with pytest.raises(ConsiliumError, match=r"3 of 4 centres.*east: runs other code \(0123456789abcdef"):
        run(phantom_config(phantom), tmp_path, EastIsOld(sites()))


def test_centres_are_upgraded_one_by_one(
    phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After an upgrade of the coordinator, a paused run goes on as soon as enough centres are upgraded.

    Until then the old ones are refused by name; the last ones are readmitted in a later round. The ledger
    records which code did what.
    """
    upgraded: list[str] = []

    class Upgraded(InProcess):
        def discover(self, request, expected, timeout):  # type: ignore[no-untyped-def]
            for received in super().discover(request, expected, timeout):
                if isinstance(received.reply, JoinReply) and received.centre in upgraded:
                    received.reply.fingerprint = "the next"
                yield received

    def hook(centre: str, request: Request, reply: Reply) -> Reply | None:
        if isinstance(request, TrainRequest) and request.round == 2:
            upgraded.extend({"south", "west"} - set(upgraded))  # while round 2 is in progress
        return None if isinstance(request, TrainRequest) and request.round == 1 and not upgraded else reply

    old_code = fingerprint_code()
    with pytest.raises(ConsiliumError, match="is paused"):
        run(
            phantom_config(phantom, "stage.rounds=3", "federation.quorum=0.5"),
            tmp_path,
            Upgraded(sites(), hook),
        )
    for module in ("server.rounds.run_lifecycle", "server.rounds.membership"):
        monkeypatch.setattr(f"{module}.fingerprint_code", lambda: "the next")
    ledger = open_ledger(tmp_path)
    upgraded.append("north")
    with pytest.raises(
        ConsiliumError,
        match=rf"1 of 4 centres.*east, south, west: runs other code \({old_code}, here the next\); install",
    ):
        resume_run("r", Upgraded(sites(), hook), tmp_path, ledger)
    upgraded.append("east")
    resume_run("r", Upgraded(sites(), hook), tmp_path, ledger)
    accepted: dict[int, set[str]] = {1: set(), 2: set(), 3: set()}
    for row in ledger.read_contributions("r"):
        if row["accepted"]:
            accepted[row["round"]].add(row["centre"])
    assert accepted == {1: {"north", "east"}, 2: {"north", "east"}, 3: {"north", "east", "south", "west"}}
    assert [e["detail"] for e in ledger.read_events("r") if e["kind"] == "resumed"] == [
        f"by code the next, started by {old_code}"
    ] * 2


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
