"""A centre's own weights: which they are, that they come back, and that no name reaches out of the folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from torch import nn

from client.federation.personal_parameters import (
    load_as_tested,
    overlay_parameters,
    personal_mask,
    prune_parameters,
    record_test_state,
    save_parameters,
)
from common.config.schema import BackboneConfig, LocalLayerGroup, Stage, Task
from common.modeling.model import make_model
from common.modeling.parameters import Layout, Weights, build_layout, get_model_weights
from common.utils.errors import ConsiliumError, Refused

MODEL = make_model(
    BackboneConfig(), {"covid": Task(), "source": Task(type="multiclass", classes=["a", "b"])}, 1
)
LAYOUT = build_layout(MODEL)
FEDBN = Stage(local_layers=["batch_norm"])
BAD = ["../x", "..", ".hidden", "a/b", "/etc", "", "a\0b", "x" * 101, "a\n"]


def constant(value: float) -> Weights:
    return Weights(
        np.full(LAYOUT.size, value, np.float32), np.full(LAYOUT.int_buffer_size, int(value), np.int64)
    )


def names_of(mask: np.ndarray, layout: Layout) -> set[str]:
    """Tensors that are personal; none may be so in part."""
    parts = {e.name: set(mask[e.span].tolist()) for e in layout.floats}
    assert all(len(values) == 1 for values in parts.values())
    return {name for name, values in parts.items() if values == {True}}


def test_the_mask_of_batch_norms_of_heads_and_of_all() -> None:
    """Against the model's own modules."""
    norms = {n for n, m in MODEL.named_modules() if isinstance(m, nn.BatchNorm2d)}
    floats = {n for n, t in MODEL.state_dict().items() if t.is_floating_point()}
    of_norms = {n for n in floats if n.rpartition(".")[0] in norms}
    of_heads = {n for n in floats if n.startswith("heads.")}
    assert len(of_norms) == 4 * len(norms) > 0
    cases: list[tuple[list[LocalLayerGroup], set[str]]] = [
        ([], set()),
        (["batch_norm"], of_norms),
        (["heads"], of_heads),
        (["batch_norm", "heads"], of_norms | of_heads),
        (["all"], floats),
    ]
    for personal, expected in cases:
        assert names_of(personal_mask(LAYOUT, personal), LAYOUT) == expected


def test_group_norms_are_not_kept_as_batch_norms() -> None:
    layout = build_layout(make_model(BackboneConfig(norm="group"), {"covid": Task()}, 1))
    assert not personal_mask(layout, ["batch_norm"]).any()


def test_what_was_kept_comes_back_over_what_was_received(tmp_path: Path) -> None:
    own, mask = get_model_weights(MODEL, LAYOUT), personal_mask(LAYOUT, ["batch_norm"])
    save_parameters(tmp_path, "run", "main", 3, own, mask)
    received = constant(7)
    merged = overlay_parameters(tmp_path, "run", [("main", 3)], received)
    np.testing.assert_array_equal(merged.floats[mask], own.floats[mask])
    assert (merged.floats[~mask] == 7).all()
    np.testing.assert_array_equal(merged.int_buffers, own.int_buffers)
    assert (received.floats == 7).all()  # and what came is as it was
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_newest_up_to_the_round_is_taken(tmp_path: Path) -> None:
    mask = personal_mask(LAYOUT, ["all"])
    for round in (2, 9, 10, 100):
        save_parameters(tmp_path, "run", "main", round, constant(round), mask)
    taken = {
        last: overlay_parameters(tmp_path, "run", [("main", last)], constant(-1)).floats[0]
        for last in (0, 1, 2, 8, 9, 10, 99, 100, 500)
    }
    assert taken == {0: -1, 1: -1, 2: 2, 8: 2, 9: 9, 10: 10, 99: 10, 100: 100, 500: 100}
    assert overlay_parameters(tmp_path, "other", [("main", 500)], constant(-1)).floats[0] == -1


def test_a_round_done_again_replaces_what_it_kept(tmp_path: Path) -> None:
    for value in (1, 2):
        save_parameters(tmp_path, "run", "main", 1, constant(value), personal_mask(LAYOUT, ["all"]))
    assert overlay_parameters(tmp_path, "run", [("main", 1)], constant(-1)).floats[0] == 2


def test_stages_lie_over_each_other_in_order(tmp_path: Path) -> None:
    norms, heads = personal_mask(LAYOUT, ["batch_norm"]), personal_mask(LAYOUT, ["heads"])
    save_parameters(tmp_path, "run", "first", 5, constant(1), norms | heads)
    save_parameters(tmp_path, "run", "second", 2, constant(2), heads)
    merged = overlay_parameters(tmp_path, "run", [("first", 5), ("second", 2)], constant(0)).floats
    assert (merged[norms] == 1).all()
    assert (merged[heads] == 2).all()
    assert (merged[~norms & ~heads] == 0).all()


def test_only_what_may_be_asked_for_again_is_kept(tmp_path: Path) -> None:
    for round in range(1, 7):
        save_parameters(
            tmp_path, "run", "main", round, constant(round), personal_mask(LAYOUT, ["batch_norm"])
        )
        save_parameters(
            tmp_path, "run", "other", round, constant(round), personal_mask(LAYOUT, ["batch_norm"])
        )
    prune_parameters(tmp_path, "run", FEDBN, "main", [2, 5, 6, 99])
    assert sorted(int(p.stem) for p in (tmp_path / "run" / "main").iterdir()) == [2, 5, 6]
    assert len(list((tmp_path / "run" / "other").iterdir())) == 6
    prune_parameters(
        tmp_path, "run", Stage(), "other", []
    )  # a stage that keeps nothing of its own forgets nothing
    assert len(list((tmp_path / "run" / "other").iterdir())) == 6


def test_what_was_tested_with_comes_back_whatever_was_kept_beside(tmp_path: Path) -> None:
    """The best round of a stage, not its last; a stage whose start was the best adds nothing."""
    heads, norms, common = (
        personal_mask(LAYOUT, ["heads"]),
        personal_mask(LAYOUT, ["batch_norm"]),
        constant(0),
    )
    for round in (1, 2, 3):
        save_parameters(tmp_path, "run", "main", round, constant(round), heads)
        save_parameters(tmp_path, "run", "norms", round, constant(10 + round), norms)
    record_test_state(tmp_path, "run", [("main", 2), ("norms", 0)], common)
    found = load_as_tested(tmp_path / "run", common)
    assert (found.floats[heads] == 2).all()
    assert (found.floats[~heads] == 0).all()
    record_test_state(tmp_path, "run", [("main", 2), ("norms", 3)], common)  # tested anew, after a resume
    assert (load_as_tested(tmp_path / "run", common).floats[norms] == 13).all()
    assert not list(tmp_path.rglob("*.tmp"))

    with pytest.raises(ConsiliumError, match="belong to another model"):
        load_as_tested(tmp_path / "run", constant(1))
    (tmp_path / "run" / "main" / "00002.safetensors").unlink()
    with pytest.raises(ConsiliumError, match="gone or damaged"):  # not the round before in its place
        load_as_tested(tmp_path / "run", common)
    for text in ("", "[]", "{}", '{"personal": [[1]], "common": "", "own": ""}'):
        (tmp_path / "run" / "used.json").write_text(text)
        with pytest.raises(ConsiliumError, match="holds no own weights that a run was tested with"):
            load_as_tested(tmp_path / "run", common)


@pytest.mark.parametrize("bad", BAD)
def test_a_name_that_reaches_out_of_the_folder_is_refused(tmp_path: Path, bad: str) -> None:
    folder = tmp_path / "state"
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "00001.safetensors").write_bytes(b"another's")
    mask = personal_mask(LAYOUT, ["heads"])
    for run, stage in ((bad, "main"), ("run", bad)):
        with pytest.raises(Refused, match="is not a name for a run or a stage"):
            save_parameters(folder, run, stage, 1, constant(1), mask)
        with pytest.raises(Refused):
            overlay_parameters(folder, run, [(stage, 1)], constant(1))
        with pytest.raises(Refused):
            record_test_state(folder, run, [(stage, 1)], constant(1))
        with pytest.raises(Refused):
            prune_parameters(folder, run, FEDBN, stage, [])
    assert (tmp_path / "x" / "00001.safetensors").read_bytes() == b"another's"
    assert not folder.exists()
