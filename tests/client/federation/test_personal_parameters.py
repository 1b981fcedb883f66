"""The layers that stay at a centre: which they are, that they come back, and that names are checked."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from torch import nn

from client.federation.personal_parameters import (
    load_as_tested,
    overlay_parameters,
    prune_parameters,
    record_test_state,
    save_parameters,
)
from common.config.schema import BackboneConfig, LocalLayerGroup, Stage, Task
from common.modeling.local_layers import find_local_values
from common.modeling.model import make_model
from common.modeling.parameters import Layout, Weights, build_layout, get_model_weights
from common.utils.errors import ConsiliumError, Refused

MODEL = make_model(
    BackboneConfig(), {"covid": Task(), "source": Task(type="multiclass", classes=["a", "b"])}, 1
)
LAYOUT = build_layout(MODEL)
FEDBN = Stage(local_layers=["batch_norm"])
BAD_NAMES = ["../x", "..", ".hidden", "a/b", "/etc", "", "a\0b", "x" * 101, "a\n"]


def constant_weights(value: float) -> Weights:
    return Weights(
        np.full(LAYOUT.size, value, np.float32), np.full(LAYOUT.int_buffer_size, int(value), np.int64)
    )


def masked_tensors(mask: np.ndarray, layout: Layout) -> set[str]:
    """Return the names of the tensors that the mask selects; it must select none in part."""
    names = set()
    for slot in layout.floats:
        values = set(mask[slot.span].tolist())
        assert len(values) == 1
        if values == {True}:
            names.add(slot.name)
    return names


def test_mask_selects_batch_norms_heads_or_all() -> None:
    """The tensors are compared with the model's own modules."""
    norm_modules = {name for name, module in MODEL.named_modules() if isinstance(module, nn.BatchNorm2d)}
    floats = {name for name, tensor in MODEL.state_dict().items() if tensor.is_floating_point()}
    norms = {name for name in floats if name.rpartition(".")[0] in norm_modules}
    heads = {name for name in floats if name.startswith("heads.")}
    assert len(norms) == 4 * len(norm_modules) > 0
    cases: list[tuple[list[LocalLayerGroup], set[str]]] = [
        ([], set()),
        (["batch_norm"], norms),
        (["heads"], heads),
        (["batch_norm", "heads"], norms | heads),
        (["all"], floats),
    ]
    for local_layers, expected in cases:
        assert masked_tensors(find_local_values(LAYOUT, local_layers).floats, LAYOUT) == expected


def test_counters_of_batch_norms_belong_to_them() -> None:
    assert LAYOUT.int_buffer_size > 0
    assert find_local_values(LAYOUT, ["batch_norm"]).int_buffers.all()
    assert find_local_values(LAYOUT, ["all"]).int_buffers.all()
    assert not find_local_values(LAYOUT, ["heads"]).int_buffers.any()


def test_group_norms_are_not_batch_norms() -> None:
    layout = build_layout(make_model(BackboneConfig(norm="group"), {"covid": Task()}, 1))
    assert not find_local_values(layout, ["batch_norm"]).floats.any()


def test_stored_layers_replace_those_received(tmp_path: Path) -> None:
    trained = get_model_weights(MODEL, LAYOUT)
    mask = find_local_values(LAYOUT, ["batch_norm"])
    save_parameters(tmp_path, "run", "main", 3, trained, mask)
    received = constant_weights(7)
    merged = overlay_parameters(tmp_path, "run", [("main", 3)], received)
    np.testing.assert_array_equal(merged.floats[mask.floats], trained.floats[mask.floats])
    assert (merged.floats[~mask.floats] == 7).all()
    np.testing.assert_array_equal(merged.int_buffers, trained.int_buffers)
    assert (received.floats == 7).all()  # the received weights themselves are unchanged
    assert not list(tmp_path.rglob("*.tmp"))


def test_newest_layers_up_to_the_round_are_used(tmp_path: Path) -> None:
    mask = find_local_values(LAYOUT, ["all"])
    for round_number in (2, 9, 10, 100):
        save_parameters(tmp_path, "run", "main", round_number, constant_weights(round_number), mask)
    used = {}
    for last_round in (0, 1, 2, 8, 9, 10, 99, 100, 500):
        merged = overlay_parameters(tmp_path, "run", [("main", last_round)], constant_weights(-1))
        used[last_round] = merged.floats[0]
    assert used == {0: -1, 1: -1, 2: 2, 8: 2, 9: 9, 10: 10, 99: 10, 100: 100, 500: 100}
    assert overlay_parameters(tmp_path, "other", [("main", 500)], constant_weights(-1)).floats[0] == -1


def test_repeated_round_replaces_its_layers(tmp_path: Path) -> None:
    for value in (1, 2):
        mask = find_local_values(LAYOUT, ["all"])
        save_parameters(tmp_path, "run", "main", 1, constant_weights(value), mask)
    assert overlay_parameters(tmp_path, "run", [("main", 1)], constant_weights(-1)).floats[0] == 2


def test_layers_of_stages_are_overlaid_in_order(tmp_path: Path) -> None:
    norms = find_local_values(LAYOUT, ["batch_norm"])
    heads = find_local_values(LAYOUT, ["heads"])
    save_parameters(tmp_path, "run", "first", 5, constant_weights(1), norms.union(heads))
    save_parameters(tmp_path, "run", "second", 2, constant_weights(2), heads)
    merged = overlay_parameters(tmp_path, "run", [("first", 5), ("second", 2)], constant_weights(0)).floats
    assert (merged[norms.floats] == 1).all()
    assert (merged[heads.floats] == 2).all()
    assert (merged[~norms.floats & ~heads.floats] == 0).all()


def test_pruning_deletes_all_rounds_but_those_needed(tmp_path: Path) -> None:
    mask = find_local_values(LAYOUT, ["batch_norm"])
    for round_number in range(1, 7):
        for stage in ("main", "other"):
            save_parameters(tmp_path, "run", stage, round_number, constant_weights(round_number), mask)
    prune_parameters(tmp_path, "run", FEDBN, "main", [2, 5, 6, 99])
    assert sorted(int(path.stem) for path in (tmp_path / "run" / "main").iterdir()) == [2, 5, 6]
    assert len(list((tmp_path / "run" / "other").iterdir())) == 6
    prune_parameters(tmp_path, "run", Stage(), "other", [])  # a stage without local layers
    assert len(list((tmp_path / "run" / "other").iterdir())) == 6


def store_two_stages(folder: Path) -> None:
    """Store rounds 1 to 3 of heads (stage "main") and of batch norms (stage "norms")."""
    for round_number in (1, 2, 3):
        heads = find_local_values(LAYOUT, ["heads"])
        norms = find_local_values(LAYOUT, ["batch_norm"])
        save_parameters(folder, "run", "main", round_number, constant_weights(round_number), heads)
        save_parameters(folder, "run", "norms", round_number, constant_weights(10 + round_number), norms)


def test_layers_of_the_test_come_back_whatever_else_is_stored(tmp_path: Path) -> None:
    """They are those of a stage's best round, not of its last; best round 0 adds nothing."""
    heads = find_local_values(LAYOUT, ["heads"])
    norms = find_local_values(LAYOUT, ["batch_norm"])
    common = constant_weights(0)
    store_two_stages(tmp_path)
    record_test_state(tmp_path, "run", [("main", 2), ("norms", 0)], common)
    merged = load_as_tested(tmp_path / "run", common)
    assert (merged.floats[heads.floats] == 2).all()
    assert (merged.floats[~heads.floats] == 0).all()
    record_test_state(tmp_path, "run", [("main", 2), ("norms", 3)], common)  # tested again, after a resume
    assert (load_as_tested(tmp_path / "run", common).floats[norms.floats] == 13).all()
    assert not list(tmp_path.rglob("*.tmp"))


def test_test_state_of_the_previous_version_is_read(tmp_path: Path) -> None:
    """Its file has the same keys."""
    common = constant_weights(0)
    store_two_stages(tmp_path)
    record_test_state(tmp_path, "run", [("main", 2)], common)
    assert (tmp_path / "run" / "used.json").read_text().startswith('{"personal":[["main",2]],"common":"')
    merged = load_as_tested(tmp_path / "run", common)
    assert (merged.floats[find_local_values(LAYOUT, ["heads"]).floats] == 2).all()


def test_wrong_missing_or_damaged_layers_are_refused(tmp_path: Path) -> None:
    common = constant_weights(0)
    store_two_stages(tmp_path)
    record_test_state(tmp_path, "run", [("main", 2), ("norms", 3)], common)
    with pytest.raises(ConsiliumError, match="belong to another model"):
        load_as_tested(tmp_path / "run", constant_weights(1))
    (tmp_path / "run" / "main" / "00002.safetensors").unlink()
    with pytest.raises(ConsiliumError, match="missing or damaged"):  # round 1 does not take its place
        load_as_tested(tmp_path / "run", common)
    for text in ("", "[]", "{}", '{"personal": [[1]], "common": "", "own": ""}'):
        (tmp_path / "run" / "used.json").write_text(text)
        with pytest.raises(ConsiliumError, match="has no layers that a run was tested with"):
            load_as_tested(tmp_path / "run", common)


@pytest.mark.parametrize("bad_name", BAD_NAMES)
def test_name_that_leads_out_of_the_folder_is_refused(tmp_path: Path, bad_name: str) -> None:
    folder = tmp_path / "state"
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "00001.safetensors").write_bytes(b"another's")
    mask = find_local_values(LAYOUT, ["heads"])
    for run_id, stage in ((bad_name, "main"), ("run", bad_name)):
        with pytest.raises(Refused, match="is not a valid name of a run or stage"):
            save_parameters(folder, run_id, stage, 1, constant_weights(1), mask)
        with pytest.raises(Refused):
            overlay_parameters(folder, run_id, [(stage, 1)], constant_weights(1))
        with pytest.raises(Refused):
            record_test_state(folder, run_id, [(stage, 1)], constant_weights(1))
        with pytest.raises(Refused):
            prune_parameters(folder, run_id, FEDBN, stage, [])
    assert (tmp_path / "x" / "00001.safetensors").read_bytes() == b"another's"
    assert not folder.exists()
