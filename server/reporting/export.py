"""What `consilium-server export` writes of a run: weights, ONNX, scores, model card, TensorBoard curves."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from common.modeling import model_file
from common.utils.errors import ConsiliumError
from server.ledger.ledger import Ledger
from server.reporting import onnx_export, tensorboard
from server.reporting.labels import View
from server.reporting.model_card import CardInput, render_card_html, render_card_markdown
from server.reporting.scores import view_metrics
from server.run.records import TaskScores, parse_result, parse_task_scores

MODEL_FILE = "model.safetensors"
METRICS_FILE = "metrics.json"
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
CsvValue = str | float | None


def export_safetensors(run_dir: Path, out: Path) -> None:
    """Copy a run's model, with its configuration inside, to a file.

    Raises:
        ConsiliumError: the run has no model, or the file is damaged.
    """
    path = _find_model(run_dir)
    model_file.load_model_file(path)
    shutil.copyfile(path, out)


def export_onnx(run_dir: Path, out: Path) -> float:
    """Write a run's model as ONNX and return its largest difference from PyTorch.

    See `onnx_export.export_onnx`.
    """
    return onnx_export.export_onnx(_find_model(run_dir), run_dir.name, out)


def _find_model(run_dir: Path) -> Path:
    path = run_dir / MODEL_FILE
    if not path.is_file():
        raise ConsiliumError(
            f"run '{run_dir.name}' has no {MODEL_FILE}: it is not finished, or every centre kept its own "
            "model"
        )
    return path


# ---- scores


def format_scores_csv(ledger: Ledger, run_id: str) -> str:
    """Return every score of a run as CSV, one value a line: each centre's, then the views over centres.

    An undefined value is empty and has a reason.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(CSV_HEADER)
    for row in ledger.read_scores(run_id):
        keys = [run_id, row["stage"], row["round"], row["split"], row["task"]]
        for values in _list_csv_values(parse_task_scores(row)):
            writer.writerow([*keys, *values])
    return text.getvalue()


def _list_csv_values(scores: TaskScores) -> Iterator[list[CsvValue]]:
    """Return the columns from `over` on of each of a task's scores."""
    for centre, centre_scores in scores.centres.items():
        metrics = {**centre_scores.metrics, "loss": centre_scores.loss}
        for metric, value in metrics.items():
            yield ["centre", centre, metric, value, centre_scores.reasons.get(metric, "")]
    for view in View:
        for metric, (value, worst_centre) in view_metrics(scores, view).items():
            yield [view, worst_centre, metric, value, ""]
    if scores.challenge_score is not None:
        yield [View.MACRO, "", "challenge_score", scores.challenge_score, ""]


# ---- the command


def make_model_card(run_dir: Path, ledger: Ledger) -> str:
    """Return the model card of a finished run as Markdown.

    Raises:
        ConsiliumError: the run is not finished.
    """
    metrics = run_dir / METRICS_FILE
    if not metrics.is_file():
        raise ConsiliumError(
            f"run '{run_dir.name}' has no {METRICS_FILE}: it is not finished, and a card reports the test"
        )
    card = CardInput(parse_result(json.loads(metrics.read_text())))
    run = ledger.read_run(run_dir.name)
    if run:
        card.code_fingerprint = run["code_fingerprint"]
    model = run_dir / MODEL_FILE
    if model.is_file():
        card.model_digest = hashlib.sha256(model.read_bytes()).hexdigest()
    return render_card_markdown(card)


def _to_safetensors(run_dir: Path, ledger: Ledger, out: str) -> str:
    path = Path(out or f"{run_dir.name}.safetensors")
    export_safetensors(run_dir, path)
    return f"weights: {path}"


def _to_onnx(run_dir: Path, ledger: Ledger, out: str) -> str:
    path = Path(out or run_dir / "model.onnx")
    difference = export_onnx(run_dir, path)
    return f"ONNX: {path}, outputs within {difference:.1g} of PyTorch's"


def _to_csv(run_dir: Path, ledger: Ledger, out: str) -> str:
    path = Path(out or run_dir / "scores.csv")
    path.write_text(format_scores_csv(ledger, run_dir.name))
    return f"scores: {path}"


def _to_card(run_dir: Path, ledger: Ledger, out: str) -> str:
    path = Path(out or run_dir / "card.html")
    text = make_model_card(run_dir, ledger)
    if path.suffix == ".html":
        text = render_card_html(text)
    path.write_text(text)
    return f"model card: {path}"


def _to_tensorboard(run_dir: Path, ledger: Ledger, out: str) -> str:
    folder = Path(out or "tensorboard")
    count = tensorboard.export_tensorboard(ledger, run_dir.name, folder)
    return f"{count} points; show them with: tensorboard --logdir {folder}"


# {format: function of the run's folder, the ledger and the output path (may be ""); returns a line to print}
EXPORTERS: dict[str, Callable[[Path, Ledger, str], str]] = {
    "safetensors": _to_safetensors,
    "onnx": _to_onnx,
    "csv": _to_csv,
    "card": _to_card,
    "tensorboard": _to_tensorboard,
}
