"""Whole runs in which layers stay at the centres: nobody can rebuild them from what left."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from common.config.schema import Config
from common.modeling.local_layers import LocalValues, find_local_values
from common.modeling.model import parameter_layout
from common.modeling.parameters import Layout, Weights
from common.protocol.messages import (
    MaskedInputReply,
    Reply,
    Request,
    StatisticsRequest,
    TrainReply,
    TrainRequest,
)
from common.protocol.update_codec import decode_update, select_codec
from common.utils.errors import RefusalCode
from server.rounds.run_lifecycle import open_ledger, start_run
from server.run.records import RunResult
from tests.in_process_federation import InProcess, phantom_config, sites

CENTRES = ("north", "east", "south", "west")
RECIPE = ["recipe=multisource_personal", "stages.main.rounds=2", "stages.own.rounds=1"]


@pytest.fixture(scope="module")
def phantom(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("phantom")


@dataclass
class Coordinator:
    """A hook that keeps everything the coordinator sends and receives of training."""

    layout: Layout
    config: Config
    initial: Weights | None = None  # the first that were sent, in full
    sent: dict[tuple[str, str, int], TrainRequest] = field(default_factory=dict)
    deltas: dict[tuple[str, str, int], np.ndarray] = field(default_factory=dict)
    int_buffers: dict[tuple[str, str, int], np.ndarray] = field(default_factory=dict)

    def __call__(self, centre: str, request: Request, reply: Reply) -> Reply:
        if isinstance(request, StatisticsRequest) and self.initial is None:
            self.initial = request.weights
        if isinstance(request, TrainRequest) and isinstance(reply, TrainReply):
            key = (centre, request.stage, request.round)
            self.sent[key] = request
            self.int_buffers[key] = reply.int_buffers
            self.deltas[key] = reply.delta
            if reply.encoded_delta:
                codec = select_codec(self.config)
                self.deltas[key] = decode_update(reply.encoded_delta, self.layout, codec)
        return reply


def run_and_record(phantom: Path, runs: Path, *overrides: str) -> tuple[RunResult, Coordinator, LocalValues]:
    config = phantom_config(phantom, *RECIPE, *overrides)
    layout = parameter_layout(config)
    coordinator = Coordinator(layout, config)
    result = start_run(config, InProcess(sites(), coordinator), runs, open_ledger(runs), "run")
    return result, coordinator, find_local_values(layout, ["batch_norm", "heads"])


def read_own_layers(phantom: Path, centre: str) -> np.ndarray:
    path = phantom / centre / ".consilium" / "personal" / "run" / "main" / "00002.safetensors"
    return load_file(path)["floats"]


def test_local_layers_cannot_be_rebuilt_from_all_that_left(phantom: Path, tmp_path: Path) -> None:
    """Neither by adding up a centre's changes, nor from any file of the coordinator's."""
    result, coordinator, local = run_and_record(phantom, tmp_path)
    assert not result.left_out
    assert coordinator.initial is not None
    initial = coordinator.initial.floats[local.floats]
    num_moved = 0
    for centre in CENTRES:
        changes = read_own_layers(phantom, centre) - initial
        moved = np.abs(changes) > 1e-4
        num_moved += int(moved.sum())
        rebuilt = np.zeros(len(changes), np.float32)
        for stage, round_number in (("main", 1), ("main", 2)):
            delta = coordinator.deltas[centre, stage, round_number]
            assert delta[~local.floats].any()
            rebuilt += delta[local.floats]
        np.testing.assert_array_equal(rebuilt, 0)
        for stage, round_number in (("main", 1), ("main", 2), ("own", 1)):  # all counters are batch norms'
            sent = coordinator.sent[centre, stage, round_number].weights
            np.testing.assert_array_equal(
                coordinator.int_buffers[centre, stage, round_number], sent.int_buffers
            )
        assert coordinator.deltas[centre, "own", 1].size == 0
    assert num_moved > 4000
    assert_common_layers_untouched(tmp_path / "run", coordinator, local)


def assert_common_layers_untouched(run_dir: Path, coordinator: Coordinator, local: LocalValues) -> None:
    """Every file of weights has the initial values where layers are local, and moments have zeros."""
    initial = coordinator.initial
    assert initial is not None
    num_weights = 0
    for path in run_dir.rglob("*.safetensors"):
        tensors = load_file(path)
        if not {slot.name for slot in coordinator.layout.floats} <= tensors.keys():
            continue
        num_weights += 1
        weights = coordinator.layout.from_state_dict(tensors)
        np.testing.assert_array_equal(weights.floats[local.floats], initial.floats[local.floats])
        np.testing.assert_array_equal(weights.int_buffers, initial.int_buffers)
        assert not np.array_equal(weights.floats[~local.floats], initial.floats[~local.floats])
    assert num_weights >= 1


def test_local_layers_add_nothing_to_a_secure_sum(phantom: Path, tmp_path: Path) -> None:
    """Whatever the masks hide, the numbers under them are zero: the centre's own file of them says so."""
    numbers: list[np.ndarray] = []

    class ReadsNumbers(Coordinator):
        def __call__(self, centre: str, request: Request, reply: Reply) -> Reply:
            if isinstance(reply, MaskedInputReply):
                folder = phantom / centre / ".consilium" / "secagg" / "run" / "train"
                with np.load(folder / "numbers.npz") as stored:
                    numbers.append(stored["values"])
            return super().__call__(centre, request, reply)

    config = phantom_config(phantom, *RECIPE, "privacy=secagg")
    layout = parameter_layout(config)
    hook = ReadsNumbers(layout, config)
    result = start_run(config, InProcess(sites(), hook), tmp_path, open_ledger(tmp_path), "run")
    assert not result.left_out
    local = find_local_values(layout, ["batch_norm", "heads"])
    is_local = local.floats[layout.parameter_mask()]
    assert len(numbers) == 8
    for values in numbers:
        assert not values[is_local].any()
        assert values[~is_local].any()


@pytest.mark.parametrize("kind", ["float", "counter"])
def test_update_that_holds_a_local_value_is_left_out(phantom: Path, tmp_path: Path, kind: str) -> None:
    """Its norm is inconspicuous: one value, or one counter, of a batch norm."""
    config = phantom_config(
        phantom, "stage.local_layers=[batch_norm]", "stage.rounds=1", "aggregation.compression=fp32",
        "federation.quorum=0.5",
    )  # fmt: skip
    layout = parameter_layout(config)
    local = find_local_values(layout, ["batch_norm"])

    def leak(centre: str, request: Request, reply: Reply) -> Reply:
        if centre == "east" and isinstance(reply, TrainReply):
            if kind == "float":
                reply.delta = reply.delta.copy()
                reply.delta[np.flatnonzero(local.floats)[0]] = 1e-6
            else:
                reply.int_buffers = reply.int_buffers + (np.arange(len(reply.int_buffers)) == 0)
        return reply

    result = start_run(config, InProcess(sites(), leak), tmp_path, open_ledger(tmp_path), "run")
    (left,) = result.left_out
    assert (left.centre, left.code) == ("east", RefusalCode.BAD_REPLY)
    assert "holds 1 values of layers that stay at the centre" in left.reason
    assert set(result.stages[0].rounds[1].weights["backbone"]) == {"north", "south", "west"}


def test_central_noise_does_not_move_layers_that_stay_at_the_centres(phantom: Path, tmp_path: Path) -> None:
    heads = ["stage.local_layers=[heads]", "privacy=central", "tasks.source.head_update=local"]
    config = phantom_config(phantom, *heads, "stage.rounds=1", "privacy=central", "aggregation=fedadam")
    classes = "tasks.source.classes=[north,east,south,west]"
    layout = parameter_layout(phantom_config(phantom, *heads, classes))
    coordinator = Coordinator(layout, config)
    start_run(config, InProcess(sites(), coordinator), tmp_path, open_ledger(tmp_path), "run")
    weights = layout.from_state_dict(load_file(tmp_path / "run" / "checkpoints" / "main-00001.safetensors"))
    assert coordinator.initial is not None
    is_local = find_local_values(layout, ["heads"]).floats
    np.testing.assert_array_equal(weights.floats[is_local], coordinator.initial.floats[is_local])
    moved = weights.floats[~is_local] != coordinator.initial.floats[~is_local]
    assert moved.mean() > 0.9
