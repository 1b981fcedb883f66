"""Exports: the ONNX file predicts like the model, the CSV holds every score, failures are explained."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.numpy import load_file, save_file

from common.config.compose import compose_config
from common.config.parse import config_to_dict
from common.modeling.model import make_model
from common.modeling.parameters import build_layout, get_model_weights
from common.utils.errors import ConsiliumError
from server.ledger.ledger import Ledger
from server.reporting import export, onnx_export
from server.run.records import RoundRecord
from tests.server.ledger.test_ledger import SCORES, START


def make_run_dir(folder: Path, *overrides: str) -> Path:
    """Make the folder of a run whose model has random weights and running statistics."""
    size = ["preprocess.image_size=64", "preprocess.num_slices=8"]
    config = compose_config([*size, "federation.centres=[north,south]", *overrides])
    model = make_model(config.backbone, config.tasks, 5)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    layout = build_layout(model)
    weights = dict(layout.to_state_dict(get_model_weights(model, layout)))
    folder.mkdir()
    metadata = {"config": json.dumps(config_to_dict(config))}
    save_file(weights, folder / export.MODEL_FILE, metadata=metadata)
    return folder


@pytest.mark.parametrize(
    ("overrides", "output_shapes"),
    [
        (("tasks.source.classes=[a,b]",), {"covid": (1,)}),
        (
            ("recipe=triage", "federation=folder", "backbone.name=test_resnet"),
            {"covid": (1,), "lesion": (8, 64, 64)},
        ),
    ],
)
def test_onnx_file_predicts_for_any_batch_size(
    tmp_path: Path, overrides: tuple[str, ...], output_shapes: dict[str, tuple[int, ...]]
) -> None:
    run_dir = make_run_dir(tmp_path / "run", *overrides)
    difference = export.export_onnx(run_dir, tmp_path / "model.onnx")
    assert difference <= onnx_export.ONNX_TOLERANCE
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.onnx", "run"]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    inputs = [(tensor.name, tensor.type, tensor.shape[1:]) for tensor in session.get_inputs()]
    assert inputs == [("slices", "tensor(uint8)", [8, 64, 64])]
    names = [tensor.name for tensor in session.get_outputs()]
    for batch_size in (1, 4):
        slices = np.zeros((batch_size, 8, 64, 64), np.uint8)
        outputs = dict(zip(names, session.run(None, {"slices": slices}), strict=True))
        for name, shape in output_shapes.items():
            assert outputs[name].shape == (batch_size, *shape)
            assert ((outputs[name] >= 0) & (outputs[name] <= 1)).all()


def test_model_that_onnx_cannot_express_is_refused(tmp_path: Path) -> None:
    """Three slices do not fill the eight cells of a scan's pyramid, so that the cells overlap."""
    overrides = ("recipe=triage", "backbone.name=test_resnet", "preprocess.num_slices=3")
    run_dir = make_run_dir(tmp_path / "run", *overrides)
    with pytest.raises(ConsiliumError, match=r"ONNX cannot express a part of the model .*; use safetensors"):
        export.export_onnx(run_dir, tmp_path / "model.onnx")


def test_onnx_file_that_differs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_dir = make_run_dir(tmp_path / "run", "tasks.source.classes=[a,b]")
    monkeypatch.setattr(onnx_export, "ONNX_TOLERANCE", -1.0)
    with pytest.raises(ConsiliumError, match="differs from PyTorch"):
        export.export_onnx(run_dir, tmp_path / "model.onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_safetensors_export_copies_the_model(tmp_path: Path) -> None:
    run_dir = make_run_dir(tmp_path / "run", "tasks.source.classes=[a,b]")
    export.export_safetensors(run_dir, tmp_path / "out.safetensors")
    copied = load_file(tmp_path / "out.safetensors")
    original = load_file(run_dir / export.MODEL_FILE)
    assert copied.keys() == original.keys()
    assert all((copied[name] == original[name]).all() for name in original)


def test_run_without_a_model_cannot_be_exported(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    with pytest.raises(ConsiliumError, match=r"run 'run' has no model.safetensors"):
        export.export_safetensors(tmp_path / "run", tmp_path / "out.safetensors")


def test_csv_holds_every_score(tmp_path: Path) -> None:
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    ledger.add_run("r", recipe="multisource", mode="federated", config={}, code_fingerprint="f")
    for number in (1, 2):
        closed_round = RoundRecord(number, seconds=1.0, validation=SCORES)
        ledger.add_round("r", "main", closed_round, started=START, close_reason="all replied")
    rows = list(csv.DictReader(io.StringIO(export.format_scores_csv(ledger, "r"))))
    second_round = [row for row in rows if row["round"] == "2"]
    by_key = {(row["over"], row["centre"], row["metric"]): row for row in second_round}
    assert by_key["centre", "north", "auc"]["value"] == "0.9"
    undefined = by_key["centre", "south", "auc"]
    assert undefined["value"] == ""
    assert undefined["undefined because"].startswith("one class only")
    assert by_key["worst", "north", "auc"]["value"] == "0.9"
    assert by_key["macro", "", "challenge_score"]["value"] == "0.7"
    assert len(by_key) == len(second_round) == len(rows) / 2 == 12
