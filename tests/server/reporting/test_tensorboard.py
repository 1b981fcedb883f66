"""Curves for TensorBoard, written while a run goes on and read by TensorBoard's own reader."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.config.schema import Config
from common.protocol.messages import Reply, Request, TrainRequest
from server.reporting.tensorboard import export_tensorboard
from server.rounds.run_lifecycle import open_ledger, resume_run, start_run
from server.run.records import RunStatus
from tests.in_process_federation import InProcess, phantom_config, sites


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A short run of two centres."""
    overrides = [
        "federation.centres=[north,east]",
        "stage.rounds=3",
        "stage.local_epochs=0.5",
        "stage.tasks=[covid]",
        "evaluation.image_statistics=false",
    ]
    return phantom_config(tmp_path_factory.mktemp("phantom"), *overrides)


def read_steps(folder: Path, tag: str) -> list[int]:
    """Return the steps at which a curve has points."""
    curves = EventAccumulator(str(folder))
    curves.Reload()
    if tag not in curves.Tags()["scalars"]:
        return []
    return [event.step for event in curves.Scalars(tag)]


def test_each_round_is_written_before_the_next_begins(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A resume and an export to the same folder draw no point twice; the test's scores come last."""
    monkeypatch.setenv("CONSILIUM_TENSORBOARD", "curves")
    ledger = open_ledger(tmp_path)
    macro = tmp_path / "curves/r/macro"
    north = tmp_path / "curves/r/north"
    steps_before_round: dict[int, tuple[list[int], list[int]]] = {}

    def read_curves(centre: str, request: Request, reply: Reply) -> Reply:
        if not isinstance(request, TrainRequest) or centre != "east":
            return reply
        if request.round not in steps_before_round:
            steps = read_steps(macro, "covid/auc/val"), read_steps(north, "training/loss")
            steps_before_round[request.round] = steps
            if request.round == 3:
                raise KeyboardInterrupt
        return reply

    with pytest.raises(KeyboardInterrupt):
        start_run(config, InProcess(sites(2), read_curves), tmp_path, ledger, "r")
    assert steps_before_round == {1: ([0], []), 2: ([0, 1], [1]), 3: ([0, 1, 2], [1, 2])}
    assert not read_steps(macro, "covid/auc/test")
    resume_run("r", InProcess(sites(2)), tmp_path, ledger)
    for _ in range(2):
        assert read_steps(macro, "covid/auc/val") == [0, 1, 2, 3]
        assert read_steps(north, "training/loss") == read_steps(north, "weight/backbone") == [1, 2, 3]
        assert read_steps(macro, "covid/auc/test") == [3]
        export_tensorboard(ledger, "r", tmp_path / "curves")


def test_unwritable_folder_ends_the_curves_but_not_the_run(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "curves").write_text("a file where a folder should be")
    monkeypatch.setenv("CONSILIUM_TENSORBOARD", str(tmp_path / "curves"))
    result = start_run(config, InProcess(sites(2)), tmp_path, open_ledger(tmp_path), "r")
    assert result.status == RunStatus.FINISHED
