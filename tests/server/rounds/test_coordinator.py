"""Rounds without Flower: the centres' own code, failures of every kind, kill -9 and resume."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jsonschema
import numpy as np
import pytest

from common.protocol.code_fingerprint import fingerprint_code
from common.protocol.messages import JoinReply, Refusal, Reply, Request, TrainReply, TrainRequest
from common.utils.errors import ConsiliumError, RefusalCode
from server.rounds.run_lifecycle import open_ledger, resume_run
from server.run.records import RunStatus, parse_result, result_to_dict
from tests.in_process_federation import InProcess, phantom_config, sites
from tests.server.rounds.phantom_run import load_model, run

ROOT = Path(__file__).resolve().parents[3]


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
    assert "encoded_delta does not have the arrays codes" in reasons[2, "west"]
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
