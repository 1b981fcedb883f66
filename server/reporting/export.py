"""What a run leaves for others' hands: its weights, an ONNX file that needs nothing of ours, and its scores as a table,
its model card, its curves."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.config.schema import Task
from common.modeling import model_file
from common.modeling.model import Model, make_model
from common.modeling.parameters import build_layout, set_model_weights
from common.utils.errors import ConsiliumError
from server.ledger.ledger import Ledger
from server.reporting import model_card, tensorboard

MODEL_FILE = "model.safetensors"
ONNX_TOLERANCE = 1e-4  # how far ONNX and PyTorch may be apart
CSV_HEADER = [
    "run",
    "stage",
    "round",
    "split",
    "task",
    "over",
    "centre",
    "metric",
    "value",
    "undefined because",
]


def export_safetensors(folder: Path, out: Path) -> None:
    """A copy of the run's model, its configuration inside. Raises ConsiliumError."""
    model_file.load_model_file(_model_path(folder))
    shutil.copyfile(_model_path(folder), out)


def _model_path(folder: Path) -> Path:
    if not (folder / MODEL_FILE).is_file():
        raise ConsiliumError(
            f"run '{folder.name}' has no {MODEL_FILE}: it is not finished, or every centre kept its own model"
        )
    return folder / MODEL_FILE


# --- ONNX -----------------------------------------------------------------------------------------------------------------------------


class Predictor(nn.Module):
    """Slices uint8 [B, S, H, W], as a centre's store keeps them, to what is predicted: {task: probabilities, or a regression's values}."""

    def __init__(self, model: Model, tasks: Mapping[str, Task]) -> None:
        super().__init__()
        self.model, self.task_types = model, {name: task.type for name, task in tasks.items()}

    def forward(self, slices: Tensor) -> tuple[Tensor, ...]:
        outputs = self.model(slices.float() / 255)
        return tuple(_apply_output_activation(kind, outputs[name]) for name, kind in self.task_types.items())


def _apply_output_activation(task_type: str, logits: Tensor) -> Tensor:
    return (
        logits
        if task_type == "regression"
        else logits.softmax(1)
        if task_type == "multiclass"
        else logits.sigmoid()
    )


def export_onnx(folder: Path, out: Path) -> float:
    """Write the run's model as ONNX: input `slices` uint8 [batch, S, H, W] with any batch, an output for each task. Returns the largest difference
    from PyTorch that onnxruntime finds. Raises ConsiliumError, and leaves no file, where it is more than `CLOSE`."""
    try:
        import onnx as format
        import onnxruntime
        import onnxscript  # noqa: F401  PyTorch's exporter wants it
    except ModuleNotFoundError as error:
        raise ConsiliumError(f"ONNX needs {error.name}: pip install 'consilium[onnx]'") from None
    named, config = model_file.load_model_file(_model_path(folder))
    tasks = model_file.inference_tasks(_model_path(folder), config)
    model = make_model(config.backbone, tasks, 0)
    layout = build_layout(model)
    set_model_weights(model, layout, layout.from_state_dict(named))
    predictor = Predictor(model, tasks).eval()
    size = (
        config.preprocess.num_slices if config.preprocess.modality != "XR" else 1,
        config.preprocess.image_size,
        config.preprocess.image_size,
    )
    draw = np.random.default_rng(0)
    pictures = [torch.from_numpy(draw.integers(0, 256, (batch, *size), np.uint8)) for batch in (2, 1, 5)]
    with tempfile.TemporaryDirectory(dir=out.parent) as place, torch.inference_mode():
        part = Path(place) / "model.onnx"
        try:
            torch.onnx.export(
                predictor, (pictures[0],), part, input_names=["slices"], output_names=list(tasks), dynamo=True, external_data=False,
                dynamic_shapes={"slices": {0: torch.export.Dim("batch")}}, verbose=False,
            )  # fmt: skip
        except torch.onnx.OnnxExporterError as error:
            why = next(
                (line for line in str(error).splitlines() if "No ONNX function" in line), type(error).__name__
            )
            raise ConsiliumError(
                f"run '{folder.name}': its model has a part that ONNX cannot say ({why[:200]}); use safetensors"
            ) from error
        written = format.load(part)
        about = {
            "run": folder.name,
            "recipe": config.recipe,
            "classes": {n: t.classes for n, t in tasks.items() if t.classes},
        }
        about |= {"preprocess": vars(config.preprocess), "outputs": {n: t.type for n, t in tasks.items()}}
        format.helper.set_model_props(written, {"consilium": json.dumps(about)})
        format.save(written, part)
        session = onnxruntime.InferenceSession(part, providers=["CPUExecutionProvider"])
        apart = 0.0
        for slices in pictures:
            theirs = session.run(list(tasks), {"slices": slices.numpy()})
            apart = max(
                apart,
                *(float(np.abs(a.numpy() - b).max()) for a, b in zip(predictor(slices), theirs, strict=True)),
            )
        if not apart <= ONNX_TOLERANCE:
            raise ConsiliumError(
                f"run '{folder.name}': its ONNX file differs from PyTorch by {apart:.2g}, more than {ONNX_TOLERANCE:g}; it is not kept"
            )
        shutil.move(part, out)
    return apart


# --- metrics --------------------------------------------------------------------------------------------------------------------------


def format_scores_csv(ledger: Ledger, run_id: str) -> str:
    """Every score of a run as CSV, one value a line: centres, then views over them. A value that is undefined is empty, with the reason."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_HEADER)
    for row in ledger.read_scores(run_id):
        at = [run_id, row["stage"], row["round"], row["split"], row["task"]]
        writer.writerows([*at, *rest] for rest in _iterate_scores(row))
    return text.getvalue()


def _iterate_scores(row: Mapping[str, Any]) -> Iterator[tuple[str, str, str, Any, str]]:
    """(over, centre, metric, value, why there is none)."""
    for centre, values in row["centres"].items():
        reasons = values.get("reasons", {})
        yield from (
            ("centre", centre, metric, value, reasons.get(metric, ""))
            for metric, value in values.items()
            if metric != "reasons"
        )
    for view, values in row["views"].items():
        for metric, value in values.items() if isinstance(values, Mapping) else [(view, values)]:
            if metric == "reasons":
                continue
            centre, number = (
                (value.get("centre") or "", value.get("value")) if isinstance(value, Mapping) else ("", value)
            )
            yield ("macro" if metric == view else view), centre, metric, number, ""


# --- the command ----------------------------------------------------------------------------------------------------------------------


def make_model_card(folder: Path, ledger: Ledger) -> str:
    """The card of a finished run, as Markdown. Raises ConsiliumError."""
    if not (folder / "metrics.json").is_file():
        raise ConsiliumError(
            f"run '{folder.name}' has no metrics.json: it is not finished, and a card speaks of the test"
        )
    code = next((row["code"] for row in ledger.read_runs() if row["id"] == folder.name), "")
    model = (
        hashlib.sha256((folder / MODEL_FILE).read_bytes()).hexdigest()
        if (folder / MODEL_FILE).is_file()
        else ""
    )
    return model_card.render_card_markdown(json.loads((folder / "metrics.json").read_text()), code, model)


def _to_safetensors(folder: Path, ledger: Ledger, out: str) -> str:
    path = Path(out or f"{folder.name}.safetensors")
    export_safetensors(folder, path)
    return f"weights: {path}"


def _to_onnx(folder: Path, ledger: Ledger, out: str) -> str:
    path = Path(out or folder / "model.onnx")
    apart = export_onnx(folder, path)
    return f"ONNX: {path}, at most {apart:.1g} from PyTorch by onnxruntime"


def _to_csv(folder: Path, ledger: Ledger, out: str) -> str:
    path = Path(out or folder / "scores.csv")
    path.write_text(format_scores_csv(ledger, folder.name))
    return f"scores: {path}"


def _to_card(folder: Path, ledger: Ledger, out: str) -> str:
    path = Path(out or folder / "card.html")
    text = make_model_card(folder, ledger)
    path.write_text(model_card.render_card_html(text) if path.suffix == ".html" else text)
    return f"model card: {path}"


def _to_tensorboard(folder: Path, ledger: Ledger, out: str) -> str:
    place = Path(out or "tensorboard")
    count = tensorboard.export_tensorboard(ledger, folder.name, place)
    return f"{count} points: tensorboard --logdir {place}"


EXPORTERS: dict[str, Callable[[Path, Ledger, str], str]] = {
    "safetensors": _to_safetensors,
    "onnx": _to_onnx,
    "csv": _to_csv,
    "card": _to_card,
    "tensorboard": _to_tensorboard,
}
