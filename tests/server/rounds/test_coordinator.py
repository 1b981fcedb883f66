"""Rounds without Flower: real centres' answers, real accidents, kill -9 and resume."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from common.config.schema import Config, EvaluationConfig, OptimiserConfig, Stage
from common.protocol.code_fingerprint import fingerprint_code
from common.protocol.messages import JoinReply, Refusal, Reply, Request, TrainReply, TrainRequest
from common.utils.errors import ConsiliumError
from server.aggregation.label_counts import participating_centres
from server.rounds.run_lifecycle import open_ledger, resume_run, start_run
from server.rounds.train_round import plateau_lr_scale
from server.run.run_state import Run
from tests.in_process_federation import InProcess, phantom_config, sites

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("phantom")


def run(config: Config, runs: Path, transport: InProcess | None = None, name: str = "r") -> dict:  # type: ignore[type-arg]
    return start_run(config, transport or InProcess(sites()), runs, open_ledger(runs), name)


def weights(runs: Path, name: str = "r") -> dict[str, np.ndarray]:
    return load_file(runs / name / "model.safetensors")


def deadly(phantom: Path, runs: Path, how: str, moment: str, count: int, *overrides: str) -> int:
    command = [
        sys.executable,
        "-m",
        "tests.server.killed_run",
        str(phantom),
        str(runs),
        "r",
        how,
        moment,
        str(count),
        *overrides,
    ]
    return subprocess.run(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, timeout=600
    ).returncode


def test_a_run_leaves_what_it_should(phantom: Path, tmp_path: Path) -> None:
    result = run(phantom_config(phantom), tmp_path)
    assert result["status"] == "finished"
    assert {p.name for p in (tmp_path / "r").iterdir()} >= {
        "metrics.json",
        "model.safetensors",
        "config.yaml",
        "report.html",
    }
    assert (tmp_path / "latest").resolve() == (tmp_path / "r").resolve()
    assert json.loads((tmp_path / "r" / "metrics.json").read_text())["test"]["covid"]["centres"].keys() == {
        "north",
        "east",
        "south",
        "west",
    }
    rounds = result["stages"][0]["rounds"]
    assert [r["round"] for r in rounds] == [0, 1, 2]
    assert sum(rounds[1]["weights"]["backbone"].values()) == pytest.approx(1)
    ledger = open_ledger(tmp_path)
    assert ledger.read_status("r") == "finished"
    assert len(ledger.read_contributions("r")) == 8
    assert {row["centre"] for row in ledger.read_centres("r")} == {"north", "east", "south", "west"}


@pytest.mark.parametrize(("moment", "count"), [("training", 6), ("aggregation", 2), ("checkpoint", 3)])
def test_killed_and_resumed_equals_uninterrupted(
    phantom: Path, tmp_path: Path, moment: str, count: int
) -> None:
    """kill -9 in training, in aggregation, between ledger and checkpoint: the same weights, bit for bit, as the run that was not killed.

    With batch norms kept at the centres and a server optimiser, so that every kind of state has to survive.
    """
    settings = ["stage.rounds=3", "stage.local_layers=[batch_norm]", "aggregation=fedadam"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert deadly(phantom, whole, "begin", "never", 1, *settings) == 0
    assert deadly(phantom, broken, "begin", moment, count, *settings) == -signal.SIGKILL
    assert not (broken / "r" / "metrics.json").exists()
    assert deadly(phantom, broken, "resume", "never", 1) == 0
    expected, found = weights(whole), weights(broken)
    for name, tensor in expected.items():
        np.testing.assert_array_equal(found[name], tensor, err_msg=name)
    scores = [json.loads((folder / "r" / "metrics.json").read_text())["test"] for folder in (whole, broken)]
    assert scores[0] == scores[1]


def test_bad_contributions_are_left_out_with_the_reason(phantom: Path, tmp_path: Path) -> None:
    def hook(centre: str, request: Request, reply: Reply) -> Reply | None:
        if isinstance(reply, TrainReply) and isinstance(request, TrainRequest):
            if (centre, request.round) == ("north", 1):
                reply.encoded_delta["scales"] = np.full_like(
                    reply.encoded_delta["scales"], 0x7F80
                )  # infinite
            if (centre, request.round) == ("east", 1):
                reply.encoded_delta["scales"] = reply.encoded_delta["scales"] + np.uint16(
                    10 << 7
                )  # ten more in the exponent: 1024 times as much
            if (centre, request.round) == ("west", 2):
                del reply.encoded_delta["codes"]
            if (centre, request.round) == ("south", 2):
                return None  # silence
        return reply

    result = run(phantom_config(phantom, "federation.quorum=0.5"), tmp_path, InProcess(sites(), hook))
    left = {(r["round"], r["centre"]): r["reason"] for r in result["left_out"]}
    assert left[1, "north"] == "not finite"
    assert "times the others' median" in left[1, "east"]
    assert "no reply within" in left[2, "south"]
    assert "cannot be decoded" in left[2, "west"]
    assert set(result["stages"][0]["rounds"][1]["weights"]["backbone"]) == {"south", "west"}
    assert all(np.isfinite(w).all() for w in weights(tmp_path).values())


def test_below_the_quorum_it_retries_then_pauses_then_resumes(phantom: Path, tmp_path: Path) -> None:
    asked = []

    def broken(centre: str, request: Request, reply: Reply) -> Reply | None:
        if isinstance(request, TrainRequest) and request.round == 2 and centre in ("north", "east"):
            asked.append(centre)
            return Refusal(centre, "the disk is full")
        return reply

    with pytest.raises(
        ConsiliumError,
        match=r"is paused: .*round 2: 2 contributions, 3 needed \(.*the disk is full.*consilium-server resume r",
    ):
        run(
            phantom_config(phantom, "federation.quorum=0.75", "federation.round_retries=1"),
            tmp_path,
            InProcess(sites(), broken),
        )
    assert asked == ["north", "east"] * 2
    ledger = open_ledger(tmp_path)
    assert ledger.read_status("r") == "paused"
    resume_run("r", InProcess(sites()), tmp_path, ledger)
    assert ledger.read_status("r") == "finished"
    run(
        phantom_config(phantom, "federation.quorum=0.75", "federation.round_retries=1"),
        tmp_path,
        name="whole",
    )
    for name, tensor in weights(tmp_path, "whole").items():
        np.testing.assert_array_equal(weights(tmp_path)[name], tensor)
    with pytest.raises(ConsiliumError, match="is finished; there is nothing to resume"):
        resume_run("r", InProcess(sites()), tmp_path, ledger)


def test_a_centre_that_comes_late_is_readmitted(phantom: Path, tmp_path: Path) -> None:
    class Late(InProcess):
        greetings = 0

        def discover(self, request, expected, timeout):  # type: ignore[no-untyped-def]
            self.greetings += 1
            yield from (
                r
                for r in super().discover(request, expected, timeout)
                if r.centre != "west" or self.greetings > 2
            )
            if self.greetings <= 2:
                self.by_name.pop("west", None)

    result = run(phantom_config(phantom, "federation.quorum=0.75"), tmp_path, Late(sites()))
    first, second = (set(r["weights"]["backbone"]) for r in result["stages"][0]["rounds"][1:])
    assert "west" not in first
    assert "west" in second
    assert result["stages"][0]["rounds"][2]["weights"]["backbone"]["west"] > 0


def test_fewer_centres_than_the_quorum_is_one_sentence(phantom: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConsiliumError,
        match=r"2 of 4 centres are ready, 4 are needed \(nothing heard from south, west.*num-supernodes=4",
    ):
        run(phantom_config(phantom), tmp_path, InProcess(sites(2)))


def test_other_code_has_no_part(phantom: Path, tmp_path: Path) -> None:
    class Old(InProcess):
        def discover(self, request, expected, timeout):  # type: ignore[no-untyped-def]
            for received in super().discover(request, expected, timeout):
                if isinstance(received.reply, JoinReply) and received.centre == "east":
                    received.reply.fingerprint = "0123456789abcdef"
                yield received

    with pytest.raises(ConsiliumError, match=r"3 of 4 centres.*east: runs other code \(0123456789abcdef"):
        run(phantom_config(phantom), tmp_path, Old(sites()))


def test_an_upgrade_hospital_by_hospital(
    phantom: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run paused, the coordinator replaced: the old centres are refused by name until enough have followed; then the run goes on with those, and
    the last ones come back in a later round. The ledger tells which code did what."""
    upgraded: list[str] = []

    class Upgraded(InProcess):
        def discover(self, request, expected, timeout):  # type: ignore[no-untyped-def]
            for received in super().discover(request, expected, timeout):
                if isinstance(received.reply, JoinReply) and received.centre in upgraded:
                    received.reply.fingerprint = "the next"
                yield received

    def away(centre: str, request: Request, reply: Reply) -> Reply | None:
        if isinstance(request, TrainRequest) and request.round == 2:
            upgraded.extend(
                {"south", "west"} - set(upgraded)
            )  # these follow while the next run of the round is on
        return None if isinstance(request, TrainRequest) and request.round == 1 and not upgraded else reply

    was = fingerprint_code()
    with pytest.raises(ConsiliumError, match="is paused"):
        run(
            phantom_config(phantom, "stage.rounds=3", "federation.quorum=0.5"),
            tmp_path,
            Upgraded(sites(), away),
        )
    for module in ("server.rounds.run_lifecycle", "server.rounds.membership"):
        monkeypatch.setattr(f"{module}.fingerprint_code", lambda: "the next")
    ledger = open_ledger(tmp_path)
    upgraded.append("north")
    with pytest.raises(
        ConsiliumError,
        match=rf"1 of 4 centres.*east, south, west: runs other code \({was}, here the next\); install the same",
    ):
        resume_run("r", Upgraded(sites(), away), tmp_path, ledger)
    upgraded.append("east")
    resume_run("r", Upgraded(sites(), away), tmp_path, ledger)
    took_part = {
        n: {row["centre"] for row in ledger.read_contributions("r") if row["round"] == n and row["accepted"]}
        for n in (1, 2, 3)
    }
    assert took_part == {1: {"north", "east"}, 2: {"north", "east"}, 3: {"north", "east", "south", "west"}}
    assert [e["detail"] for e in ledger.read_events("r") if e["kind"] == "resumed"] == [
        f"by code the next, begun by {was}"
    ] * 2


@pytest.mark.parametrize("head", ["local", "anchored", "moments"])
def test_every_source_head_runs(phantom: Path, tmp_path: Path, head: str) -> None:
    result = run(phantom_config(phantom, f"tasks.source.head_update={head}", "stage.rounds=1"), tmp_path)
    assert result["stages"][0]["rounds"][1]["val"]["source"]["pooled"]["n"] == sum(
        sum(c["counts"]["val"]["source"].values()) for c in result["centres"].values()
    )


def test_three_modes_take_equal_steps(phantom: Path, tmp_path: Path) -> None:
    steps = {}
    for mode in ("federated", "central", "local"):
        result = run(
            phantom_config(phantom, f"federation.mode={mode}", "stage.rounds=1"), tmp_path, name=mode
        )
        steps[mode] = sum(c["steps"] for c in result["stages"][0]["rounds"][1]["centres"].values())
        assert set(result["test"]["covid"]["centres"]) == {"north", "east", "south", "west"}
    assert steps["federated"] == steps["central"] == steps["local"]
    assert not (tmp_path / "local" / "model.safetensors").exists()
    assert any(
        "nothing was exchanged" in note
        for note in json.loads((tmp_path / "local" / "metrics.json").read_text())["notes"]
    )


def test_stages_hand_weights_on_and_a_personal_stage_starts_from_them(phantom: Path, tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    config = phantom_config(phantom)
    from dataclasses import replace

    first = config.stages["main"]
    two = replace(
        config, stages={"main": first, "own": replace(first, rounds=1, local_layers=["all"], tasks=["covid"])}
    )
    result = run(two, tmp_path)
    main, own = result["stages"]
    best = main["rounds"][main["best"]["round"]]["val"]["covid"]["centres"]
    assert (
        own["rounds"][0]["val"]["covid"]["centres"] == best
    )  # round 0 of a stage is the best of the one before
    assert set(own["best"]) == {"north", "east", "south", "west"}
    for centre, chosen in own["best"].items():
        values = [r["val"]["covid"]["centres"][centre]["auc"] for r in own["rounds"]]
        assert chosen["value"] == max(v for v in values if v is not None)


def test_no_column_for_a_task(phantom: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConsiliumError, match="no centre has a column 'covit' for task 'covid'; fill it at one centre"
    ):
        run(phantom_config(phantom, "tasks.covid.label_column=covit"), tmp_path)


def test_patience_ends_a_stage(phantom: Path, tmp_path: Path) -> None:
    result = run(
        phantom_config(phantom, "evaluation.patience=1", "stage.rounds=5", "stage.optimiser.lr=1e-9"),
        tmp_path,
    )
    assert [r["round"] for r in result["stages"][0]["rounds"]] == [0, 1]
    assert "no better validation in 1 rounds" in result["notes"][0]


# --- who teaches, how fast, how long ---------------------------------------------------------------------------------------------------


def rounds(values: list[float | None]) -> dict[str, Any]:
    """A stage's rounds as far as their validation goes."""
    return {"rounds": [{"val": {"covid": {"macro": {"auc": value}}}} for value in values]}


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.sampled_from([0.1, 0.2, 0.3, 0.4, 0.5]), min_size=1, max_size=25),
    st.integers(1, 4),
    st.sampled_from([0.5, 0.65]),
)
def test_the_plateau_is_pytorchs(values: list[float], patience: int, factor: float) -> None:
    stage = Stage(
        optimiser=OptimiserConfig(schedule="plateau", plateau_patience=patience, plateau_factor=factor)
    )
    reference = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(
        reference, mode="max", threshold=0, patience=patience, factor=factor, eps=0
    )
    for value in values:
        scheduler.step(value)
    assert plateau_lr_scale(stage, rounds(list(values)), EvaluationConfig()) == pytest.approx(
        reference.param_groups[0]["lr"]
    )


def test_a_stage_without_the_chosen_task_keeps_its_rate() -> None:
    stage = Stage(optimiser=OptimiserConfig(schedule="plateau", plateau_patience=1))
    assert plateau_lr_scale(stage, {"rounds": [{"val": {"other": {}}}] * 9}, EvaluationConfig()) == 1.0
    assert plateau_lr_scale(stage, rounds([None] * 9), EvaluationConfig()) == 1.0


def test_a_plateau_reaches_the_centres(phantom: Path, tmp_path: Path) -> None:
    rates = []

    def hook(centre: str, request: Request, reply: Reply) -> Reply:
        if isinstance(request, TrainRequest) and centre == "north":
            rates.append(request.lr_scale)
        return reply

    still = [
        "stage.optimiser.schedule=plateau",
        "stage.optimiser.plateau_patience=1",
        "stage.optimiser.lr=1e-9",
        "stage.rounds=5",
    ]
    run(phantom_config(phantom, *still), tmp_path, InProcess(sites(), hook))
    assert rates == [1.0, 1.0, 0.65, 0.65, pytest.approx(0.65**2)]


def test_warm_up_is_before_patience(phantom: Path, tmp_path: Path) -> None:
    late = ["evaluation.patience=1", "evaluation.warmup=2", "stage.rounds=9", "stage.optimiser.lr=1e-9"]
    result = run(phantom_config(phantom, *late), tmp_path)
    played = [r["round"] for r in result["stages"][0]["rounds"]]
    assert played == [0, 1, 2, 3]


def told(counts: dict[str, list[float]], *overrides: str) -> Run:
    """A run of which is known how many training scans there are of `covid` at each centre that has answered."""
    config = phantom_config(Path("none"), "stage.tasks=[covid]", *overrides)
    one = Run("r", config, Path("none"), InProcess([]), None)  # type: ignore[arg-type]
    one.members = {c: JoinReply(c, [c], "", [c], ["covid"], {}, {}, {}, "cpu") for c in counts}
    one.label_counts = {f"{c}/train/covid": np.array(n) for c, n in counts.items()}
    return one


def test_who_teaches_in_a_stage() -> None:
    """Those with a label for any of its tasks, and one that has not answered yet; not the unseen. The average is of those that have labels."""
    of = {"north": [4.0, 6.0, 1.0], "east": [0.0, 0.0, 9.0], "south": [0.0, 2.0, 0.0]}
    teachers, average = participating_centres(one := told(of), one.config.stages["main"])
    assert (teachers, average) == (["north", "south", "west"], 6.0)
    assert participating_centres(told(of, "federation.held_out_centres=[north]"), one.config.stages["main"])[
        0
    ] == ["south", "west"]
    with pytest.raises(
        ConsiliumError,
        match="no centre has a labelled training scan for the tasks covid; fill a column or drop them",
    ):
        participating_centres(told({"north": [0.0, 0.0, 9.0]}), one.config.stages["main"])


def test_a_task_that_only_the_unseen_centre_labels_is_one_sentence(phantom: Path, tmp_path: Path) -> None:
    config = phantom_config(phantom, "recipe=transfer", "federation.held_out_centres=[west]")
    with pytest.raises(
        ConsiliumError,
        match="no centre has a labelled training scan for task 'target'; fill the column or drop the task",
    ):
        run(config, tmp_path)
