"""A trained model on new scans: a table with one row a scan. Heads that serve training only (the source head) are dropped."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from rich.progress import track
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file

from client.dataset import stacked
from client.gather import Skipped, gather
from client.preprocess import preprocess
from client.store import Store
from client.trainer import infer
from common.compose import config_from
from common.errors import ConsiliumError
from common.model import Model, make_model
from common.schema import Config, Task
from common.tasks import outputs_of
from common.weights import layout_of, load


def load_model(path: Path) -> tuple[Model, Config, str]:
    """(model, its run's configuration, identity) from a `model.safetensors`; only heads for inference. Raises ConsiliumError."""
    try:
        with safe_open(path, framework="np") as file:
            config = config_from(json.loads((file.metadata() or {})["config"]))
        named = load_file(path)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise ConsiliumError(f"{path} is not a model of ours ({type(error).__name__}); give the model.safetensors of a run") from error
    tasks = {name: task for name, task in config.tasks.items() if task.inference}
    model = make_model(config.backbone, tasks, 0)
    layout = layout_of(model)
    load(model, layout, layout.flat(named))
    identity = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    return model, replace(config, tasks=tasks), identity


def predict(model_path: Path, folder: Path, store: Path, device: str = "cpu", workers: int = 1) -> tuple[pd.DataFrame, list[Skipped]]:
    """Predictions for every scan in a folder, and the scans that could not be read with the reason.

    Columns: scan, path; per task its probability (binary: `<task>`; multiclass: `<task>_<class>`); the chosen slices; model and preprocessing
    identity; notes of the reader. Raises ConsiliumError when the folder holds no scan.
    """
    model, config, identity = load_model(model_path)
    table, skipped = gather(folder)
    if table.empty:
        why = f"; {len(skipped)} files were skipped, the first because: {skipped[0].reason}" if skipped else ""
        raise ConsiliumError(f"{folder} holds no scan that can be read{why}")
    kept = Store(store)
    keys, failed = preprocess(table, folder, config.preprocess, kept, workers)
    settings = hashlib.sha256(json.dumps(vars(config.preprocess), sort_keys=True, default=str).encode()).hexdigest()[:16]
    rows: list[dict[str, Any]] = []
    for key, (_, scan) in track(list(zip(keys, table.iterrows(), strict=True)), "predict   ", transient=True):
        slices = kept.get(key) if key else None
        if slices is None:
            if key:
                failed.append(Skipped(str(scan["path"]), "its slices were removed from the store meanwhile; predict again"))
            continue
        logits = infer(model, [stacked([slices])], lambda m, x: m(x), device=device)
        facts = kept.facts(key)
        row: dict[str, Any] = {"scan": scan["scan"], "path": scan["path"]}
        for name, task in config.tasks.items():
            row |= probabilities(name, task, logits[name][0])
        row |= {
            "slices": " ".join(map(str, facts["indices"])),
            "model": identity,
            "preprocessing": settings,
            "notes": "; ".join(facts["notes"]),
        }
        rows.append(row)
    outputs = [column for name, task in config.tasks.items() for column in probabilities(name, task, torch.zeros(outputs_of(task)))]
    return pd.DataFrame(rows, columns=["scan", "path", *outputs, "slices", "model", "preprocessing", "notes"]), skipped + failed


def probabilities(name: str, task: Task, logits: torch.Tensor) -> dict[str, float]:
    """Raw logits to probabilities: no prior is added at inference."""
    if task.kind == "binary":
        return {name: float(np.round(torch.sigmoid(logits[0]).item(), 6))}
    return {f"{name}_{c}": float(np.round(p, 6)) for c, p in zip(task.classes, torch.softmax(logits, 0).tolist(), strict=True)}
