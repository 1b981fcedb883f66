"""Exports: the ONNX file is the model, for any batch; the table holds every score; what cannot be is one sentence."""

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

from common.config.compose import compose_config, config_to_dict
from common.modeling.model import make_model
from common.modeling.parameters import build_layout, get_model_weights
from common.utils.errors import ConsiliumError
from server.ledger.ledger import Ledger
from server.reporting import export
from tests.server.ledger.test_ledger import SCORES, START


def finished(folder: Path, *overrides: str) -> Path:
    """A run's folder with a model of random weights."""
    config = compose_config(
        [
            "preprocess.image_size=64",
            "preprocess.num_slices=8",
            "federation.centres=[north,south]",
            *overrides,
        ]
    )
    model = make_model(config.backbone, config.tasks, 5)
    for module in model.modules():  # statistics that are not those of the beginning
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
    layout = build_layout(model)
    folder.mkdir()
    save_file(
        dict(layout.to_state_dict(get_model_weights(model, layout))),
        folder / export.MODEL_FILE,
        metadata={"config": json.dumps(config_to_dict(config))},
    )
    return folder


@pytest.mark.parametrize(
    ("overrides", "outputs"),
    [
        (("tasks.source.classes=[a,b]",), {"covid": (1,)}),
        (
            ("recipe=triage", "federation=folder", "backbone.name=test_resnet"),
            {"covid": (1,), "lesion": (8, 64, 64)},
        ),
    ],
)
def test_onnx_is_the_model_for_any_batch(
    tmp_path: Path, overrides: tuple[str, ...], outputs: dict[str, tuple[int, ...]]
) -> None:
    folder = finished(tmp_path / "run", *overrides)
    assert export.export_onnx(folder, tmp_path / "model.onnx") <= export.ONNX_TOLERANCE
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx", "run"]
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    assert [(i.name, i.type, i.shape[1:]) for i in session.get_inputs()] == [
        ("slices", "tensor(uint8)", [8, 64, 64])
    ]
    for batch in (1, 4):
        found = dict(
            zip(
                [o.name for o in session.get_outputs()],
                session.run(None, {"slices": np.zeros((batch, 8, 64, 64), np.uint8)}),
                strict=True,
            )
        )
        assert {name: of.shape for name, of in found.items() if name in outputs} == {
            n: (batch, *shape) for n, shape in outputs.items()
        }
        assert all(((of >= 0) & (of <= 1)).all() for name, of in found.items() if name in outputs)


def test_what_onnx_cannot_say_is_one_sentence(tmp_path: Path) -> None:
    """Cells of a scan's pyramid that overlap, as 3 slices do not fill 8."""
    folder = finished(
        tmp_path / "run", "recipe=triage", "backbone.name=test_resnet", "preprocess.num_slices=3"
    )
    with pytest.raises(ConsiliumError, match=r"a part that ONNX cannot say .*; use safetensors"):
        export.export_onnx(folder, tmp_path / "model.onnx")


def test_a_file_that_differs_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = finished(tmp_path / "run", "tasks.source.classes=[a,b]")
    monkeypatch.setattr(export, "ONNX_TOLERANCE", -1.0)
    with pytest.raises(ConsiliumError, match="differs from PyTorch"):
        export.export_onnx(folder, tmp_path / "model.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_safetensors_and_what_is_not_there(tmp_path: Path) -> None:
    folder = finished(tmp_path / "run", "tasks.source.classes=[a,b]")
    export.export_safetensors(folder, tmp_path / "out.safetensors")
    copied, own = load_file(tmp_path / "out.safetensors"), load_file(folder / export.MODEL_FILE)
    assert copied.keys() == own.keys()
    assert all((copied[name] == own[name]).all() for name in own)
    (folder / export.MODEL_FILE).unlink()
    with pytest.raises(ConsiliumError, match=r"run 'run' has no model.safetensors"):
        export.export_safetensors(folder, tmp_path / "again")


def test_every_score_is_in_the_table(tmp_path: Path) -> None:
    ledger = Ledger(f"sqlite:///{tmp_path}/ledger.db")
    ledger.add_run("r", recipe="multisource", mode="federated", config={}, code="f")
    for number in (1, 2):
        ledger.add_round(
            "r",
            "main",
            number,
            started=START,
            seconds=1.0,
            closed_because="all replied",
            contributions={},
            weights={},
            scores=SCORES,
        )
    rows = list(csv.DictReader(io.StringIO(export.format_scores_csv(ledger, "r"))))
    second = [row for row in rows if row["round"] == "2"]
    by = {(row["over"], row["centre"], row["metric"]): row for row in second}
    assert by["centre", "north", "auc"]["value"] == "0.9"
    assert (
        by["centre", "south", "auc"]["value"],
        by["centre", "south", "auc"]["undefined because"][:14],
    ) == ("", "one class only")
    assert by["worst", "north", "auc"]["value"] == "0.9"
    assert by["macro", "", "challenge_score"]["value"] == "0.7"
    assert len(by) == len(second) == len(rows) / 2 == 10
