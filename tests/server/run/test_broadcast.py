"""Broadcast of the global weights as differences: same bits on both sides, and no error that adds up."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from client.site.config import Site
from common.config.compose import compose_config
from common.config.schema import Compression
from common.modeling.model import make_model
from common.modeling.parameters import Weights, build_layout
from common.protocol.messages import BaseWeightsMissing, Reply, Request, StatisticsRequest, TrainRequest
from server.rounds.run_lifecycle import open_ledger, start_run
from server.run.broadcast import quantize_server_step
from server.run.run_state import ModelState, Run
from tests.in_process_federation import InProcess, phantom_config, sites


@dataclass(frozen=True)
class SentWeights:
    """What a request carried of the global weights."""

    kind: str
    split: str
    whole_bytes: int
    delta_bytes: int


class Observed(InProcess):
    """Records the bytes of weights in every request that has any.

    Before such request number `lose_before`, counted from 1, the centres' disks lose the weights that they
    hold.
    """

    def __init__(self, root: Path, lose_before: int = 0) -> None:
        super().__init__(sites())
        self.root = root
        self.lose_before = lose_before
        self.sent: list[SentWeights] = []
        self.num_missing = 0

    def _call(self, site: Site, request: Request) -> Reply:
        if isinstance(request, TrainRequest | StatisticsRequest) and request.weights is not None:
            if len(self.sent) == self.lose_before - 1:
                lose_weights(self.root)
            split = getattr(request, "split", "")
            delta_bytes = sum(array.nbytes for array in request.encoded_delta.values())
            whole_bytes = request.weights.floats.nbytes
            self.sent.append(SentWeights(type(request).__name__, split, whole_bytes, delta_bytes))
        reply = super()._call(site, request)
        self.num_missing += isinstance(reply, BaseWeightsMissing)
        return reply


def lose_weights(root: Path) -> None:
    """Delete what the centres hold of the global weights."""
    for folder in root.rglob("wire"):
        shutil.rmtree(folder)


def load_model(runs: Path) -> dict[str, np.ndarray]:
    return load_file(runs / "r" / "model.safetensors")


def test_weights_travel_whole_once_and_then_as_differences(tmp_path: Path) -> None:
    config = phantom_config(tmp_path / "phantom", "evaluation.checkpoint_selection=last")
    transport = Observed(tmp_path / "phantom")
    result = start_run(config, transport, tmp_path, open_ledger(tmp_path), "r")
    whole_bytes = transport.sent[0].whole_bytes
    # More than this model's, as the sources' head has its classes now.
    assert whole_bytes > 4 * build_layout(make_model(config.backbone, config.tasks, 0)).size
    validation_of_round_0 = transport.sent[:4]
    rounds = transport.sent[4:]
    assert [sent.whole_bytes for sent in validation_of_round_0] == [whole_bytes] * 4
    assert not any(sent.whole_bytes for sent in rounds)
    # The centres have validated the weights from which they train: nothing is to be sent.
    assert {sent.delta_bytes for sent in transport.sent if sent.kind == "TrainRequest"} == {0}
    validations = [sent for sent in rounds if sent.kind == "StatisticsRequest" and sent.split == "val"]
    assert len(validations) == 8
    for sent in validations:  # a small network has many scales for its values
        assert whole_bytes / 4 < sent.delta_bytes < whole_bytes / 3.5
    assert transport.num_missing == 0
    assert not (tmp_path / "r" / "left.npy").exists()
    for record in result.stages[0].rounds[1:]:  # a round's traffic includes its validation
        assert whole_bytes < record.bytes_down < 4 * whole_bytes / 3.5
        assert record.bytes_down == sum(centre.bytes_down for centre in record.centres.values())


# There are 4 validations first, then in every round 4 trainings and 4 validations: the weights are lost
# before training, and before a difference is sent.
@pytest.mark.parametrize("lose_before", [5, 9])
def test_centre_that_lost_its_weights_receives_them_whole(tmp_path: Path, lose_before: int) -> None:
    phantom = tmp_path / "phantom"
    whole, lost = tmp_path / "whole", tmp_path / "lost"
    start_run(phantom_config(phantom), InProcess(sites()), whole, open_ledger(whole), "r")
    lose_weights(phantom)
    transport = Observed(phantom, lose_before)
    result = start_run(phantom_config(phantom), transport, lost, open_ledger(lost), "r")
    assert transport.num_missing == 4
    assert result.left_out == []
    if lose_before == 5:  # before anything was quantized, so that nothing else was lost with the weights
        for name, tensor in load_model(whole).items():
            np.testing.assert_array_equal(tensor, load_model(lost)[name])


@pytest.mark.parametrize(
    ("codec", "bound"), [("fp16", 1e-4), ("int8", 2e-3), ("int4", 2.5e-2), ("fp32", 1e-5)]
)
def test_quantization_errors_do_not_add_up_over_rounds(
    tmp_path: Path, codec: Compression, bound: float
) -> None:
    """Relative L2 error of twelve rounds' way: that of an optimiser that has a direction, with noise."""
    config = compose_config([f"aggregation.compression={codec}", "tasks.source.classes=[a,b]"])
    layout = build_layout(make_model(config.backbone, config.tasks, 0))
    rng = np.random.default_rng(0)
    start = Weights(
        rng.standard_normal(layout.size, dtype=np.float32), np.zeros(layout.int_buffer_size, np.int64)
    )
    model = ModelState(layout, start.copy())
    run = Run("r", config, tmp_path, InProcess([]), open_ledger(tmp_path), model)
    exact = start.floats.astype(np.float64)
    direction = 1e-3 * rng.standard_normal(layout.size)
    for _ in range(12):
        step = (direction + 1e-3 * rng.standard_normal(layout.size)).astype(np.float32)
        exact += step
        next_weights = Weights(run.model.weights.floats + step, run.model.weights.int_buffers)
        run.model.weights = quantize_server_step(run, next_weights)
    error = np.linalg.norm(run.model.weights.floats - exact)
    assert error < bound * np.linalg.norm(exact - start.floats)
