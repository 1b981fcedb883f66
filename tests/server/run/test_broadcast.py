"""Weights reach the centres as changes: the same bits there as here, whole for who lacks them, and nothing lost in rounding over rounds."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from common.config.compose import compose_config
from common.config.schema import Compression
from common.modeling.model import make_model
from common.modeling.parameters import Weights, build_layout
from common.protocol.messages import BaseWeightsMissing, Reply, Request, StatisticsRequest, TrainRequest
from server.rounds.run_lifecycle import open_ledger, start_run
from server.run.broadcast import quantize_server_step
from server.run.run_state import Run
from tests.in_process_federation import InProcess, phantom_config, sites


class Watched(InProcess):
    """Notes the bytes of weights in every request; before request with weights number `lose`, the centres' disks lose what they hold."""

    def __init__(self, root: Path, lose: int = 0) -> None:
        super().__init__(sites())
        self.root, self.lose = root, lose
        self.sizes: list[tuple[str, str, int, int]] = []
        self.lacking = 0

    def _call(self, site: object, request: Request) -> Reply:
        if isinstance(request, TrainRequest | StatisticsRequest) and request.weights is not None:
            if len(self.sizes) == self.lose - 1:
                for folder in self.root.rglob("wire"):
                    shutil.rmtree(folder)
            floats, change = (
                request.weights.floats.nbytes,
                sum(a.nbytes for a in request.encoded_delta.values()),
            )
            self.sizes.append((type(request).__name__, getattr(request, "split", ""), floats, change))
        reply = super()._call(site, request)  # type: ignore[arg-type]
        self.lacking += isinstance(reply, BaseWeightsMissing)
        return reply


def model(runs: Path) -> dict[str, np.ndarray]:
    return load_file(runs / "r" / "model.safetensors")


def test_weights_travel_whole_once_and_then_as_changes(tmp_path: Path) -> None:
    config = phantom_config(tmp_path / "phantom", "evaluation.checkpoint_selection=last")
    watched = Watched(tmp_path / "phantom")
    result = start_run(config, watched, tmp_path, open_ledger(tmp_path), "r")
    size = watched.sizes[0][2]
    assert (
        size > 4 * build_layout(make_model(config.backbone, config.tasks, 0)).size
    )  # the sources' head has its classes now
    assert [whole for _, _, whole, _ in watched.sizes[:4]] == [size] * 4  # the score of round 0
    assert not any(whole for _, _, whole, _ in watched.sizes[4:])
    assert {change for kind, _, _, change in watched.sizes if kind == "TrainRequest"} == {
        0
    }  # they were evaluated, so they are there
    scored = [
        change
        for kind, split, _, change in watched.sizes[4:]
        if kind == "StatisticsRequest" and split == "val"
    ]
    assert len(scored) == 8
    assert all(
        size / 4 < change < size / 3.5 for change in scored
    )  # a small network: many scales for its values
    assert watched.lacking == 0
    assert not (tmp_path / "r" / "left.npy").exists()
    for entry in result["stages"][0]["rounds"][1:]:  # a round's whole traffic, evaluation included
        assert size < entry["bytes_down"] < 4 * size / 3.5
        assert entry["bytes_down"] == sum(said["bytes_down"] for said in entry["centres"].values())


@pytest.mark.parametrize(
    "lose", [5, 9]
)  # 4 scored, and in every round 4 trained, 4 scored: before training, before a change
def test_who_lost_its_weights_gets_them_whole(tmp_path: Path, lose: int) -> None:
    whole, lost = tmp_path / "whole", tmp_path / "lost"
    start_run(phantom_config(tmp_path / "phantom"), InProcess(sites()), whole, open_ledger(whole), "r")
    for folder in (tmp_path / "phantom").rglob("wire"):
        shutil.rmtree(folder)
    watched = Watched(tmp_path / "phantom", lose)
    result = start_run(phantom_config(tmp_path / "phantom"), watched, lost, open_ledger(lost), "r")
    assert watched.lacking == 4
    assert result["left_out"] == []
    if lose == 5:  # before anything was rounded, so that nothing else was lost with it
        assert all(np.array_equal(tensor, model(lost)[name]) for name, tensor in model(whole).items())


@pytest.mark.parametrize(
    ("codec", "bound"), [("fp16", 1e-4), ("int8", 2e-3), ("int4", 2.5e-2), ("fp32", 1e-5)]
)
def test_over_rounds_nothing_is_lost_but_the_last_rounding(
    tmp_path: Path, codec: Compression, bound: float
) -> None:
    """Relative L2 of the way of twelve rounds: an optimiser that has a direction, and noise."""
    config = compose_config([f"aggregation.compression={codec}", "tasks.source.classes=[a,b]"])
    layout = build_layout(make_model(config.backbone, config.tasks, 0))
    draws = np.random.default_rng(0)
    start = Weights(
        draws.standard_normal(layout.size, dtype=np.float32), np.zeros(layout.int_buffer_size, np.int64)
    )
    run = Run("r", config, tmp_path, InProcess([]), open_ledger(tmp_path), layout, start.copy())
    aim = start.floats.astype(np.float64)
    way = 1e-3 * draws.standard_normal(layout.size)
    for _ in range(12):
        step = (way + 1e-3 * draws.standard_normal(layout.size)).astype(np.float32)
        aim += step
        run.weights = quantize_server_step(run, Weights(run.weights.floats + step, run.weights.int_buffers))
    assert np.linalg.norm(run.weights.floats - aim) < bound * np.linalg.norm(aim - start.floats)
