"""Curves for TensorBoard, written while a run goes on and read by TensorBoard's own reader."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common.config.schema import Config
from common.protocol.messages import Reply, Request, TrainRequest
from server.reporting.tensorboard import export_tensorboard
from server.rounds.run_lifecycle import open_ledger, resume_run, start_run
from tests.in_process_federation import InProcess, phantom_config, sites


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    few = [
        "federation.centres=[north,east]",
        "stage.rounds=3",
        "stage.local_epochs=0.5",
        "stage.tasks=[covid]",
        "evaluation.image_statistics=false",
    ]
    return phantom_config(tmp_path_factory.mktemp("phantom"), *few)


def steps(folder: Path, tag: str) -> list[int]:
    curves = EventAccumulator(str(folder))
    curves.Reload()
    return [event.step for event in curves.Scalars(tag)] if tag in curves.Tags()["scalars"] else []


def test_each_round_is_there_when_the_next_begins(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after the coordinator was killed and resumed, and once exported on top: every point is drawn once, and the test comes last."""
    monkeypatch.setenv("CONSILIUM_TENSORBOARD", "curves")
    ledger, macro, north = open_ledger(tmp_path), tmp_path / "curves/r/macro", tmp_path / "curves/r/north"
    seen: dict[int, tuple[list[int], list[int]]] = {}

    def look(centre: str, request: Request, reply: Reply) -> Reply:
        if isinstance(request, TrainRequest) and centre == "east" and request.round not in seen:
            seen[request.round] = steps(macro, "covid/auc/val"), steps(north, "training/loss")
            if request.round == 3:
                raise KeyboardInterrupt
        return reply

    with pytest.raises(KeyboardInterrupt):
        start_run(config, InProcess(sites(2), look), tmp_path, ledger, "r")
    assert seen == {1: ([0], []), 2: ([0, 1], [1]), 3: ([0, 1, 2], [1, 2])}
    assert not steps(macro, "covid/auc/test")
    resume_run("r", InProcess(sites(2)), tmp_path, ledger)
    for _ in range(2):
        assert steps(macro, "covid/auc/val") == [0, 1, 2, 3]
        assert steps(north, "training/loss") == steps(north, "weight/backbone") == [1, 2, 3]
        assert steps(macro, "covid/auc/test") == [3]
        export_tensorboard(ledger, "r", tmp_path / "curves")


def test_a_place_that_cannot_be_written_ends_the_curves_and_not_the_run(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "curves").write_text("a file where a folder should be")
    monkeypatch.setenv("CONSILIUM_TENSORBOARD", str(tmp_path / "curves"))
    result = start_run(config, InProcess(sites(2)), tmp_path, open_ledger(tmp_path), "r")
    assert result["status"] == "finished"
