"""Export of a run's model as ONNX, compared with PyTorch before the file is kept."""

from __future__ import annotations

import importlib
import json
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.config.schema import Config, PreprocessConfig, Task
from common.modeling import model_file
from common.modeling.model import Model, make_model
from common.modeling.parameters import build_layout, set_model_weights
from common.utils.errors import ConsiliumError

ONNX_TOLERANCE = 1e-4  # largest difference between ONNX and PyTorch
MAX_REASON_LENGTH = 200  # characters
EXAMPLE_BATCH_SIZES = (2, 1, 5)  # the first is traced; all are compared
REQUIRED_PACKAGES = ("onnx", "onnxruntime", "onnxscript")


class Predictor(nn.Module):
    """A model from the stored slices, uint8 [B, S, H, W], to its predictions, in the order of the tasks.

    A prediction is a probability [B, classes] or, of a segmentation, [B, S, H, W]; of a regression it is a
    value.
    """

    def __init__(self, model: Model, tasks: Mapping[str, Task]) -> None:
        """Wrap a model with the heads of these tasks."""
        super().__init__()
        self.model = model
        self.task_types = list_task_types(tasks)

    def forward(self, slices: Tensor) -> tuple[Tensor, ...]:
        """Predict."""
        logits = self.model(slices.float() / 255)
        predictions = []
        for name, task_type in self.task_types.items():
            predictions.append(_apply_output_activation(task_type, logits[name]))
        return tuple(predictions)


def list_task_types(tasks: Mapping[str, Task]) -> dict[str, str]:
    """Return {task: type}."""
    return {name: task.type for name, task in tasks.items()}


def _apply_output_activation(task_type: str, logits: Tensor) -> Tensor:
    if task_type == "regression":
        return logits
    if task_type == "multiclass":
        return logits.softmax(1)
    return logits.sigmoid()


def export_onnx(model_path: Path, run_id: str, out: Path) -> float:
    """Write a run's model as ONNX.

    The input is ``slices``, uint8 [B, S, H, W] with any batch size B; there is one output a task.

    Returns:
        The largest difference between the outputs of onnxruntime and PyTorch.

    Raises:
        ConsiliumError: ONNX is not installed, cannot express the model, or differs by more than
            `ONNX_TOLERANCE`. No file is left then.
    """
    _require_packages()
    weights, config = model_file.load_model_file(model_path)
    tasks = model_file.inference_tasks(model_path, config)
    model = make_model(config.backbone, tasks, 0)
    layout = build_layout(model)
    set_model_weights(model, layout, layout.from_state_dict(weights))
    predictor = Predictor(model, tasks).eval()
    examples = _make_examples(config.preprocess)
    with tempfile.TemporaryDirectory(dir=out.parent) as folder, torch.inference_mode():
        path = Path(folder) / "model.onnx"
        _write_graph(predictor, examples[0], list(tasks), path, run_id)
        _embed_metadata(path, run_id, config, tasks)
        difference = _largest_difference(predictor, examples, list(tasks), path)
        if not difference <= ONNX_TOLERANCE:  # also when it is NaN
            raise ConsiliumError(
                f"the ONNX model of run '{run_id}' differs from PyTorch by {difference:.2g}, more than "
                f"{ONNX_TOLERANCE:g}, and was not kept; use safetensors"
            )
        shutil.move(path, out)
    return difference


def _require_packages() -> None:
    for package in REQUIRED_PACKAGES:
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            raise ConsiliumError(f"ONNX needs {error.name}: pip install 'consilium[onnx]'") from None


def _make_examples(preprocess: PreprocessConfig) -> list[Tensor]:
    """Return batches of random slices, uint8 [B, S, H, W]."""
    num_slices = 1 if preprocess.modality == "XR" else preprocess.num_slices
    size = preprocess.image_size
    generator = np.random.default_rng(0)
    batches = []
    for batch_size in EXAMPLE_BATCH_SIZES:
        slices = generator.integers(0, 256, (batch_size, num_slices, size, size), np.uint8)
        batches.append(torch.from_numpy(slices))
    return batches


def _write_graph(
    predictor: Predictor, example: Tensor, output_names: list[str], path: Path, run_id: str
) -> None:
    try:
        torch.onnx.export(
            predictor,
            (example,),
            path,
            input_names=["slices"],
            output_names=output_names,
            dynamo=True,
            external_data=False,
            dynamic_shapes={"slices": {0: torch.export.Dim("batch")}},
            verbose=False,
        )
    except torch.onnx.OnnxExporterError as error:
        raise ConsiliumError(
            f"ONNX cannot express a part of the model of run '{run_id}' ({_find_reason(error)}); "
            "use safetensors"
        ) from error


def _find_reason(error: Exception) -> str:
    """Return the line of an exporter's error that names what is missing."""
    for line in str(error).splitlines():
        if "No ONNX function" in line:
            return line[:MAX_REASON_LENGTH]
    return type(error).__name__


def _embed_metadata(path: Path, run_id: str, config: Config, tasks: Mapping[str, Task]) -> None:
    """Add to the file what a reader needs: the run, the classes, the preprocessing, the outputs' types."""
    import onnx

    metadata = {
        "run": run_id,
        "recipe": config.recipe,
        "classes": {name: task.classes for name, task in tasks.items() if task.classes},
        "preprocess": vars(config.preprocess),
        "outputs": list_task_types(tasks),
    }
    graph = onnx.load(path)
    onnx.helper.set_model_props(graph, {"consilium": json.dumps(metadata)})
    onnx.save(graph, path)


def _largest_difference(
    predictor: Predictor, examples: Sequence[Tensor], output_names: list[str], path: Path
) -> float:
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    difference = 0.0
    for slices in examples:
        onnx_outputs = session.run(output_names, {"slices": slices.numpy()})
        for expected, actual in zip(predictor(slices), onnx_outputs, strict=True):
            difference = max(difference, float(np.abs(expected.numpy() - actual).max()))
    return difference
