"""A trained model on new scans: what a federation in one process has learned gives the same probabilities at the command."""

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
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from client.predict import load_model, predict, probabilities
from client.readers import read_scan
from client.slices import slices_of
from common.errors import ConsiliumError
from common.model import make_model
from common.schema import Config, Task
from server.runs import begin, open_ledger
from tests.inprocess import InProcess, phantom_config, sites


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Config]:
    """(model.safetensors, the federation's folder, its configuration) of a run of one round at two centres."""
    root = tmp_path_factory.mktemp("predict")
    config = phantom_config(root / "data", "federation.centres=[north,south]", "federation.phantom.scale=0.001", "stage.rounds=1")
    (root / "runs").mkdir()
    begin(config, InProcess(sites(2)), root / "runs", open_ledger(root / "runs"), "run")
    return root / "runs" / "run" / "model.safetensors", root / "data", config


@pytest.fixture
def new(trained: tuple[Path, Path, Config], tmp_path: Path) -> Path:
    """Two scans, named as a hospital would."""
    for name, scan in (("first", "north-0000"), ("second", "north-0003")):
        shutil.copytree(trained[1] / "north" / "dicom" / scan, tmp_path / "new" / name)
    return tmp_path / "new"


def test_probabilities_are_those_of_the_runs_weights(trained: tuple[Path, Path, Config], new: Path, tmp_path: Path) -> None:
    """Against the steps done by hand: read, choose slices, the run's state dict, the sigmoid of the raw logit."""
    model, _, config = trained
    table, skipped = predict(model, new, tmp_path / "store")
    assert skipped == []
    assert table["scan"].tolist() == ["first", "second"]
    tasks = {**config.tasks, "source": Task(kind="multiclass", classes=["north", "south"])}
    whole = make_model(config.backbone, tasks, 0)
    whole.load_state_dict(load_file(model))
    for row in table.itertuples():
        kept = slices_of(read_scan(Path(str(row.path))), config.preprocess)
        with torch.no_grad():
            z = whole.eval()(torch.from_numpy(kept.slices)[None] / 255)["covid"].item()
        assert row.covid == pytest.approx(1 / (1 + math.exp(-z)), abs=2e-6)
        assert row.slices == " ".join(map(str, kept.indices))
        assert len(str(row.slices).split()) == config.preprocess.slices
    assert table["covid"].nunique() == 2


def test_heads_that_serve_training_only_are_dropped(trained: tuple[Path, Path, Config], new: Path, tmp_path: Path) -> None:
    table, _ = predict(trained[0], new, tmp_path / "store")
    assert list(table.columns) == ["scan", "path", "covid", "slices", "model", "preprocessing", "notes"]
    model, config, _ = load_model(trained[0])
    assert list(model.heads) == list(config.tasks) == ["covid"]
    with safe_open(trained[0], "np") as file:
        assert any(name.startswith("heads.source") for name in file.keys())  # noqa: SIM118  (the run's file does hold it)


def test_identities_name_the_model_and_the_preprocessing(trained: tuple[Path, Path, Config], new: Path, tmp_path: Path) -> None:
    table, _ = predict(trained[0], new, tmp_path / "store")
    assert set(table["model"]) == {hashlib.sha256(trained[0].read_bytes()).hexdigest()[:16]}
    assert table["preprocessing"].nunique() == 1
    again, _ = predict(trained[0], new, tmp_path / "store")
    pd.testing.assert_frame_equal(again, table)


def test_a_scan_that_cannot_be_read_is_listed(trained: tuple[Path, Path, Config], new: Path, tmp_path: Path) -> None:
    shutil.copytree(trained[1] / "north" / "dicom" / "north-0007", new / "broken")
    for file in (new / "broken").iterdir():
        file.write_bytes(file.read_bytes()[:3000])
    (new / "letter.docx").write_text("not a scan")
    table, skipped = predict(trained[0], new, tmp_path / "store")
    assert table["scan"].tolist() == ["first", "second"]
    assert sorted(Path(s.path).name for s in skipped) == ["broken", "new"]
    assert all(s.reason for s in skipped)


def test_when_no_scan_can_be_read_the_table_still_has_its_columns(trained: tuple[Path, Path, Config], new: Path, tmp_path: Path) -> None:
    for file in new.rglob("*.dcm"):
        file.write_bytes(file.read_bytes()[:3000])
    table, skipped = predict(trained[0], new, tmp_path / "store")
    assert len(skipped) == 2
    assert table.empty
    assert list(table.columns) == ["scan", "path", "covid", "slices", "model", "preprocessing", "notes"]


def test_a_folder_without_a_scan_is_one_sentence(trained: tuple[Path, Path, Config], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConsiliumError, match=r"empty holds no scan that can be read$"):
        predict(trained[0], tmp_path / "empty", tmp_path / "store")
    with pytest.raises(ConsiliumError, match=r"gone is not there; check the path$"):
        predict(trained[0], tmp_path / "gone", tmp_path / "store")


@pytest.mark.parametrize("kind", ["missing", "a folder", "text", "empty", "cut short", "without metadata", "other metadata", "wrong key"])
def test_a_file_that_is_no_model_of_ours_is_one_sentence(trained: tuple[Path, Path, Config], new: Path, tmp_path: Path, kind: str) -> None:
    path = tmp_path / "model.safetensors"
    weights = load_file(trained[0])
    with safe_open(trained[0], "np") as file:
        config = json.loads(file.metadata()["config"])
    if kind == "a folder":
        path.mkdir()
    elif kind in ("text", "empty"):
        path.write_text("no model" * (kind == "text"))
    elif kind == "cut short":
        path.write_bytes(trained[0].read_bytes()[:-1000])
    elif kind == "without metadata":
        save_file(weights, path)
    elif kind == "other metadata":
        save_file(weights, path, {"config": "{not json"})
    elif kind == "wrong key":
        save_file(weights, path, {"config": json.dumps({**config, "secrets": 1})})
    with pytest.raises(ConsiliumError, match=r"(is not a model of ours|unknown key 'secrets')") as raised:
        predict(path, new, tmp_path / "store")
    assert "\n" not in str(raised.value)


def test_weights_of_another_backbone_are_one_sentence(trained: tuple[Path, Path, Config], new: Path, tmp_path: Path) -> None:
    with safe_open(trained[0], "np") as file:
        config = json.loads(file.metadata()["config"])
    config["backbone"]["name"] = "test_efficientnet"
    save_file(load_file(trained[0]), tmp_path / "model.safetensors", {"config": json.dumps(config)})
    with pytest.raises(ConsiliumError, match=r"the weights lack '.*'; they belong to another backbone or recipe"):
        predict(tmp_path / "model.safetensors", new, tmp_path / "store")


def test_probabilities_of_many_classes_sum_to_one() -> None:
    found = probabilities("severity", Task(kind="multiclass", classes=["mild", "moderate", "severe"]), torch.tensor([0.0, 1.0, -2.0]))
    expected = np.exp([0.0, 1.0, -2.0]) / np.exp([0.0, 1.0, -2.0]).sum()
    assert list(found) == ["severity_mild", "severity_moderate", "severity_severe"]
    assert list(found.values()) == pytest.approx(expected, abs=1e-6)
    assert probabilities("covid", Task(), torch.tensor([0.0])) == {"covid": 0.5}
