"""Predictions with a trained model: the same probabilities as by hand, for every type of task."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from client.imaging.readers import read_scan
from client.imaging.slice_pipeline import select_and_crop
from client.phantom.federation import write_centre
from client.tools.mask_filenames import make_mask_filename
from client.tools.predict import PredictOptions, load_model, predict_folder
from client.tools.prediction_values import compute_output_values, list_output_columns
from common.config.compose import compose_config
from common.config.parse import config_to_dict
from common.config.schema import Config, PhantomConfig, Task
from common.modeling.model import make_model
from common.utils.errors import ConsiliumError
from server.rounds.run_lifecycle import open_ledger, start_run
from tests.in_process_federation import InProcess, phantom_config, sites


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Config]:
    """Train one round at two centres; return model.safetensors, the data folder, the configuration."""
    root = tmp_path_factory.mktemp("predict")
    config = phantom_config(
        root / "data", "federation.centres=[north,south]", "federation.phantom.scale=0.001", "stage.rounds=1"
    )
    (root / "runs").mkdir()
    start_run(config, InProcess(sites(2)), root / "runs", open_ledger(root / "runs"), "run")
    return root / "runs" / "run" / "model.safetensors", root / "data", config


@pytest.fixture
def new(trained: tuple[Path, Path, Config], tmp_path: Path) -> Path:
    """Copy two scans under names of a hospital's own."""
    for name, scan in (("first", "north-0000"), ("second", "north-0003")):
        shutil.copytree(trained[1] / "north" / "dicom" / scan, tmp_path / "new" / name)
    return tmp_path / "new"


def test_probabilities_match_the_runs_weights(
    trained: tuple[Path, Path, Config], new: Path, tmp_path: Path
) -> None:
    """Compare with the steps by hand: read, choose slices, load the state dict, sigmoid of the raw logit."""
    model, _, config = trained
    table, skipped = predict_folder(model, new, tmp_path / "store")
    assert skipped == []
    assert table["scan"].tolist() == ["first", "second"]
    tasks = {**config.tasks, "source": Task(type="multiclass", classes=["north", "south"])}
    run_model = make_model(config.backbone, tasks, 0)
    run_model.load_state_dict(load_file(model))
    for row in table.itertuples():
        kept = select_and_crop(read_scan(Path(str(row.path))), config.preprocess)
        with torch.no_grad():
            z = run_model.eval()(torch.from_numpy(kept.slices)[None] / 255)["covid"].item()
        assert row.covid == pytest.approx(1 / (1 + math.exp(-z)), abs=2e-6)
        assert row.slices == " ".join(map(str, kept.indices))
        assert len(str(row.slices).split()) == config.preprocess.num_slices
    assert table["covid"].nunique() == 2


def test_heads_that_serve_training_only_are_dropped(
    trained: tuple[Path, Path, Config], new: Path, tmp_path: Path
) -> None:
    table, _ = predict_folder(trained[0], new, tmp_path / "store")
    assert list(table.columns) == ["scan", "path", "covid", "slices", "model", "preprocessing", "notes"]
    model, config, _ = load_model(trained[0])
    assert list(model.heads) == list(config.tasks) == ["covid"]
    with safe_open(trained[0], "np") as file:
        assert any(name.startswith("heads.source") for name in file.keys())  # noqa: SIM118  (the run's file does hold it)


def test_the_table_identifies_model_and_preprocessing(
    trained: tuple[Path, Path, Config], new: Path, tmp_path: Path
) -> None:
    table, _ = predict_folder(trained[0], new, tmp_path / "store")
    assert set(table["model"]) == {hashlib.sha256(trained[0].read_bytes()).hexdigest()[:16]}
    assert table["preprocessing"].nunique() == 1
    again, _ = predict_folder(trained[0], new, tmp_path / "store")
    pd.testing.assert_frame_equal(again, table)


def test_an_unreadable_scan_is_listed_as_skipped(
    trained: tuple[Path, Path, Config], new: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained[1] / "north" / "dicom" / "north-0007", new / "broken")
    for file in (new / "broken").iterdir():
        file.write_bytes(file.read_bytes()[:3000])
    (new / "letter.docx").write_text("not a scan")
    table, skipped = predict_folder(trained[0], new, tmp_path / "store")
    assert table["scan"].tolist() == ["first", "second"]
    assert sorted(Path(s.path).name for s in skipped) == ["broken", "new"]
    assert all(s.reason for s in skipped)


def test_the_table_has_its_columns_even_when_no_scan_can_be_read(
    trained: tuple[Path, Path, Config], new: Path, tmp_path: Path
) -> None:
    for file in new.rglob("*.dcm"):
        file.write_bytes(file.read_bytes()[:3000])
    table, skipped = predict_folder(trained[0], new, tmp_path / "store")
    assert len(skipped) == 2
    assert table.empty
    assert list(table.columns) == ["scan", "path", "covid", "slices", "model", "preprocessing", "notes"]


def test_a_folder_without_scans_is_refused(trained: tuple[Path, Path, Config], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConsiliumError, match=r"empty holds no scan that can be read$"):
        predict_folder(trained[0], tmp_path / "empty", tmp_path / "store")
    with pytest.raises(ConsiliumError, match=r"gone is not there; check the path$"):
        predict_folder(trained[0], tmp_path / "gone", tmp_path / "store")


@pytest.mark.parametrize(
    "kind",
    ["missing", "a folder", "text", "empty", "cut short", "without metadata", "other metadata", "wrong key"],
)
def test_a_file_that_is_no_model_is_refused(
    trained: tuple[Path, Path, Config], new: Path, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "model.safetensors"
    weights = load_file(trained[0])
    with safe_open(trained[0], "np") as file:
        config = json.loads(file.metadata()["config"])
    if kind == "a folder":
        path.mkdir()
    elif kind in ("text", "empty"):
        path.write_text({"text": "no model", "empty": ""}[kind])
    elif kind == "cut short":
        path.write_bytes(trained[0].read_bytes()[:-1000])
    elif kind == "without metadata":
        save_file(weights, path)
    elif kind == "other metadata":
        save_file(weights, path, {"config": "{not json"})
    elif kind == "wrong key":
        save_file(weights, path, {"config": json.dumps({**config, "secrets": 1})})
    with pytest.raises(ConsiliumError, match=r"(is not a Consilium model|unknown key 'secrets')") as raised:
        predict_folder(path, new, tmp_path / "store")
    assert "\n" not in str(raised.value)


def test_weights_of_another_backbone_are_refused(
    trained: tuple[Path, Path, Config], new: Path, tmp_path: Path
) -> None:
    with safe_open(trained[0], "np") as file:
        config = json.loads(file.metadata()["config"])
    config["backbone"]["name"] = "test_efficientnet"
    save_file(load_file(trained[0]), tmp_path / "model.safetensors", {"config": json.dumps(config)})
    with pytest.raises(
        ConsiliumError, match=r"the weights lack '.*'; they belong to another backbone or recipe"
    ):
        predict_folder(tmp_path / "model.safetensors", new, tmp_path / "store")


def save_random_model(path: Path, *overrides: str, tilt: float = 0.0) -> Path:
    """Save a model with random weights, the bias of the lesion's head changed by `tilt`."""
    config = compose_config(overrides)
    state = make_model(config.backbone, config.tasks, 3).state_dict()
    if tilt:
        state["heads.lesion.1.bias"] += tilt
    save_file(state, path, {"config": json.dumps(config_to_dict(config))})
    return path


@pytest.fixture(scope="module")
def centre(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Draw a made-up hospital: `dicom/<scan>/`, `xr/<scan>.dcm`."""
    return write_centre(
        tmp_path_factory.mktemp("centre"), "north", PhantomConfig(scale=0.001, num_slices=12, image_size=64)
    )


def test_every_other_type_of_task_has_its_columns(centre: Path, tmp_path: Path) -> None:
    """Radiographs through the finegrained and prognosis recipes, without columns of self-supervised tasks."""
    (tmp_path / "new").mkdir()
    shutil.copy(centre / "xr" / "north-0000.dcm", tmp_path / "new" / "film.dcm")
    small = ["backbone=small", "preprocess.image_size=32"]
    model_path = save_random_model(tmp_path / "f.safetensors", "recipe=finegrained", *small)
    fine, _ = predict_folder(model_path, tmp_path / "new", tmp_path / "store")
    classes = ["negative", "typical", "indeterminate", "atypical"]
    assert list(fine.columns[2:-4]) == [*(f"finding_{c}" for c in classes), "infection_share"]
    assert fine[[f"finding_{c}" for c in classes]].sum(axis=1).tolist() == pytest.approx([1], abs=1e-5)
    assert fine["infection_share"].between(0, 100).all()

    scores = ["recipe=prognosis", *small, "stage.tasks=[outcome,regions]"]
    table, _ = predict_folder(
        save_random_model(tmp_path / "p.safetensors", *scores),
        tmp_path / "new",
        tmp_path / "store",
        PredictOptions(sort_column="regions_brixia_f"),
    )
    regions = [f"regions_brixia_{zone}" for zone in "abcdef"]
    assert list(table.columns[2:-4]) == ["outcome", *regions]
    model, config, _ = load_model(tmp_path / "p.safetensors")
    kept = select_and_crop(read_scan(tmp_path / "new" / "film.dcm"), config.preprocess)
    with torch.no_grad():
        raw = model.eval()(torch.from_numpy(kept.slices)[None] / 255)["regions"][0]
    # raw outputs, in the scores' own units
    assert table[regions].to_numpy()[0] == pytest.approx(raw.numpy(), abs=2e-6)


def test_what_a_model_cannot_do_is_refused(
    trained: tuple[Path, Path, Config], new: Path, tmp_path: Path
) -> None:
    expected = r"there is no column 'covit' to sort by; did you mean 'covid'\?$"
    with pytest.raises(ConsiliumError, match=expected):
        predict_folder(trained[0], new, tmp_path / "store", PredictOptions(sort_column="covit"))
    with pytest.raises(ConsiliumError, match=r"draws no masks \(covid\); leave --masks out$"):
        predict_folder(trained[0], new, tmp_path / "store", PredictOptions(masks_dir=tmp_path / "masks"))
    alone = save_random_model(
        tmp_path / "alone.safetensors",
        "recipe=finegrained",
        "backbone=small",
        "stage.tasks=[moco]",
        "evaluation.task=moco",
    )
    expected = r"predicts nothing because it was trained without labels \(moco\)"
    with pytest.raises(ConsiliumError, match=expected):
        predict_folder(alone, new, tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_output_values_match_their_formulas() -> None:
    many = Task(type="multiclass", classes=["mild", "moderate", "severe"])
    expected = np.exp([0.0, 1.0, -2.0]) / np.exp([0.0, 1.0, -2.0]).sum()
    assert list_output_columns("severity", many) == ["severity_mild", "severity_moderate", "severity_severe"]
    box = (0, 4, 0, 4)
    assert compute_output_values(many, torch.tensor([0.0, 1.0, -2.0]), box) == pytest.approx(
        expected, abs=1e-6
    )
    assert list_output_columns("covid", Task()) == ["covid"]
    assert compute_output_values(Task(), torch.tensor([0.0]), box) == [0.5]
    assert list_output_columns("age", Task(type="regression")) == ["age"]
    logits = torch.full((2, 8, 8), -5.0)
    logits[0, 2, 1:4] = 5.0  # a crop of 2 x 4 pixels fills rows 2 to 5 of the square
    assert compute_output_values(Task(type="segmentation"), logits, (10, 12, 20, 24)) == [
        round(100 * 3 / (2 * 4 * 8), 2)
    ]
    lungs = np.zeros((2, 8, 8), np.uint8)
    lungs[:, :, :4] = 1
    lungs[0, 2, 4:] = 2
    assert compute_output_values(Task(type="segmentation", severity_column="x"), logits, box, lungs) == [
        round(100 * 3 / 64, 2),
        0.0,
        round(100 * 3 / 64, 2),
    ]


@given(
    st.sets(
        st.tuples(st.text(min_size=1, max_size=200), st.text("ab_/%", min_size=1, max_size=4)), max_size=20
    )
)
def test_no_two_masks_share_a_file_name(pairs: set[tuple[str, str]]) -> None:
    pairs |= {("a", "b_c"), ("a_b", "c"), ("x" * 200, "a"), ("x" * 201, "a")}
    names = {make_mask_filename(*pair) for pair in pairs}
    assert len(names) == len(pairs)
    assert all("/" not in name and "\0" not in name and len(name) < 200 for name in names)
