"""A run's files: what is in its folder, and what is made of it when it is downloaded."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

from fastapi.responses import FileResponse, Response

from common.utils.errors import ConsiliumError
from server.ledger.ledger import Ledger
from server.reporting import export, model_card

SAVED_FILES = {
    "report.html": "the report: every table and figure in one file",
    "metrics.json": "all metrics of all rounds and of the test",
    "model.safetensors": "the model's weights, for consilium-centre predict",
    "config.yaml": "the resolved configuration",
}
GENERATED_FILES = {  # made when they are downloaded
    "model-card.html": "the model card: data, metrics by centre, intended use, limits, privacy, software",
    "model-card.md": "the model card as Markdown",
    "scores.csv": "every score, one value a line; an undefined one is empty and has a reason",
    "model.onnx": "the model as ONNX, checked against PyTorch; the export takes a while",
}
FILE_DESCRIPTIONS = SAVED_FILES | GENERATED_FILES
MODEL_CARD_TYPES = {"model-card.html": "text/html", "model-card.md": "text/markdown"}


def list_saved_files(folder: Path) -> dict[str, int]:
    """Return {name: bytes} of the files that a run's folder has."""
    sizes = {}
    for name in SAVED_FILES:
        path = folder / name
        if path.is_file():
            sizes[name] = path.stat().st_size
    return sizes


def list_generated_files(folder: Path) -> list[str]:
    """Return the files that can be made for a run; before it has results, only its scores."""
    if (folder / "metrics.json").is_file():
        return list(GENERATED_FILES)
    return ["scores.csv"]


def make_download(ledger: Ledger, run_id: str, folder: Path, name: str) -> Response:
    """Return a response that the browser saves as a file.

    Raises:
        ConsiliumError: the run does not have the file.
    """
    headers = {"Content-Disposition": f'attachment; filename="{quote(run_id)}-{name}"'}
    if name == "scores.csv":
        csv_text = export.format_scores_csv(ledger, run_id)
        return Response(csv_text, media_type="text/csv", headers=headers)
    if name in MODEL_CARD_TYPES:
        card = export.make_model_card(folder, ledger)
        if name == "model-card.html":
            card = model_card.render_card_html(card)
        return Response(card, media_type=MODEL_CARD_TYPES[name], headers=headers)
    path = folder / name
    if name == "model.onnx" and folder.is_dir() and not path.is_file():
        export.export_onnx(folder, path)
    if name not in (*SAVED_FILES, "model.onnx") or not path.is_file():
        raise ConsiliumError(f"run '{run_id}' has no {name} (yet)")
    return FileResponse(path, headers=headers)
