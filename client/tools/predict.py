"""A trained model on new scans: a table with one row a scan, and masks. Heads that serve training only (the source head) are dropped.

| kind | columns |
|---|---|
| binary | `<task>`: its probability |
| multiclass | `<task>_<class>`: their probabilities |
| regression | `<task>_<column>`, or `<task>` of a single one: in the label's units |
| segmentation with `burden` | `<task>_right`, `<task>_left`: affected per cent of each lung; `<task>_severity`: the larger (client/imaging/severity.py) |
| segmentation | `<task>_share`: affected per cent of the kept slices |
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from rich.progress import track

from client.data.cohort import filter_modality
from client.data.dataset import stack_batch
from client.data.discovery import SkippedItem, discover_scans
from client.federation import personal_parameters
from client.imaging.lung_segmentation import Box
from client.imaging.masks import write_nifti_mask
from client.imaging.preprocess import LUNGS_COLUMN, load_masks, preprocess_cohort
from client.imaging.readers import read_scan
from client.imaging.severity import compute_affected_fractions, compute_severity
from client.imaging.slice_pipeline import letterbox_box
from client.imaging.slice_store import SliceStore
from client.training.trainer import run_inference
from common.config.schema import Config, Task
from common.modeling import model_file
from common.modeling.model import Model, make_model
from common.modeling.parameters import build_layout, set_model_weights
from common.utils.errors import ConsiliumError, suggest


def load_model(path: Path, personal_dir: Path | None = None) -> tuple[Model, Config, str]:
    """(model, its run's configuration, identity) from a `model.safetensors`; only heads for inference.

    `own` is the folder of this centre's own weights of that run (client/federation/personal_parameters.py), which are laid over. Raises ConsiliumError.
    """
    named, config = model_file.load_model_file(path)
    identity = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    tasks = model_file.inference_tasks(path, config)
    if personal_dir:
        whole = build_layout(
            make_model(config.backbone, config.tasks, 0)
        )  # own weights lie in the layout of all the run's heads
        weights = personal_parameters.load_as_tested(personal_dir, whole.from_state_dict(named))
        named, identity = (
            dict(whole.to_state_dict(weights)),
            f"{identity}+{personal_parameters.hash_weights(weights)}",
        )
    model = make_model(config.backbone, tasks, 0)
    layout = build_layout(model)
    set_model_weights(model, layout, layout.from_state_dict(named))
    return model, replace(config, tasks=tasks), identity


def predict_folder(
    model_path: Path,
    folder: Path,
    store_dir: Path,
    device: str = "cpu",
    num_workers: int = 1,
    personal_dir: Path | None = None,
    masks_dir: Path | None = None,
    sort_column: str = "",
) -> tuple[pd.DataFrame, list[SkippedItem]]:
    """Predictions for every scan in a folder, and the scans that could not be read with the reason.

    Columns: scan, path; each task's (module docstring), with `masks` also `<task>_mask`, the file in that folder; the chosen slices; model
    and preprocessing identity; notes of the reader. Rows as they were found, or by the column `sort`, the largest first. One scan is in
    memory at a time. Raises ConsiliumError when the folder holds no scan or the model has no such column.
    """
    model, config, identity = load_model(model_path, personal_dir)
    drawn = [name for name, task in config.tasks.items() if task.type == "segmentation"] if masks_dir else []
    outputs = [
        c
        for name, task in config.tasks.items()
        for c in list_output_columns(name, task) + [f"{name}_mask"] * (name in drawn)
    ]
    header = ["scan", "path", *outputs, "slices", "model", "preprocessing", "notes"]
    if sort_column and sort_column not in header:
        raise ConsiliumError(f"there is no column '{sort_column}' to sort by{suggest(sort_column, header)}")
    if masks_dir and not drawn:
        raise ConsiliumError(f"{model_path} draws no masks ({', '.join(config.tasks)}); leave --masks out")
    table, skipped = find_matching_scans(folder, config.preprocess.modality)
    if masks_dir:
        masks_dir.mkdir(parents=True, exist_ok=True)
    base, kept = folder if folder.is_dir() else folder.parent, SliceStore(store_dir)
    burden = any(task.severity_column for task in config.tasks.values())
    keys, failed = preprocess_cohort(
        table, base, config.preprocess, kept, num_workers, mask_columns=[LUNGS_COLUMN] if burden else []
    )
    settings = hashlib.sha256(
        json.dumps(vars(config.preprocess), sort_keys=True, default=str).encode()
    ).hexdigest()[:16]
    rows: list[dict[str, Any]] = []
    for i in track([i for i, key in enumerate(keys) if key], "predict   ", transient=True):
        scan, key = table.iloc[i], keys[i]
        slices, facts = kept.get(key), kept.read_metadata(key)
        if slices is None or not facts:
            failed.append(
                SkippedItem(
                    str(scan["path"]), "its slices were removed from the store meanwhile; predict again"
                )
            )
            continue
        outcome = run_inference(model, [stack_batch([slices])], lambda m, x: m(x), device=device)
        lungs = (
            load_masks(kept, table.iloc[[i]], base, [key], LUNGS_COLUMN, config.preprocess)[0]
            if burden
            else None
        )
        row: dict[str, Any] = {"scan": scan["scan"], "path": scan["path"]}
        for name, task in config.tasks.items():
            row |= dict(
                zip(
                    list_output_columns(name, task),
                    compute_output_values(task, outcome[name][0], facts["box"], lungs),
                    strict=True,
                )
            )
        if masks_dir:
            volume = read_scan(
                Path(scan["path"]),
                series if isinstance(series := scan.get("series"), str) and series else None,
            )
            for name in drawn:
                out = masks_dir.resolve() / make_mask_filename(str(scan["scan"]), name)
                probability = outcome[name][0].sigmoid().numpy()
                write_nifti_mask(
                    out, probability, facts["indices"], facts["box"], volume, config.tasks[name].threshold
                )
                row[f"{name}_mask"] = str(out)
        notes = list(facts["notes"])
        if burden and lungs is None:
            notes.append("Its lungs were not found: how much of each is affected is not known.")
        looks, wanted = facts.get("modality", ""), config.preprocess.modality
        if wanted not in ("any", looks) and looks and not isinstance(scan.get("modality"), str):
            notes.append(f"It was read as {looks}, the model was made for {wanted}.")
        row |= {
            "slices": " ".join(map(str, facts["indices"])),
            "model": identity,
            "preprocessing": settings,
            "notes": "; ".join(notes),
        }
        rows.append(row)
    found = pd.DataFrame(rows, columns=header)
    if sort_column:
        found = found.sort_values(
            sort_column, ascending=False, kind="stable", na_position="last", ignore_index=True
        )
    return found, skipped + failed


def find_matching_scans(folder: Path, modality: str) -> tuple[pd.DataFrame, list[SkippedItem]]:
    """The folder's scans, and what was passed over, also those of another modality where its table says so. Raises ConsiliumError for none."""
    table, skipped = discover_scans(folder)
    if "modality" in table:
        table["modality"] = [m.strip().upper() if isinstance(m, str) else np.nan for m in table["modality"]]
    fit = filter_modality(table, modality)
    if len(fit) < len(table):
        others = table.loc[~table["scan"].isin(fit["scan"]), "path"]
        skipped = skipped + [
            SkippedItem(str(path), f"it is no {modality}, for which the model was made") for path in others
        ]
    if fit.empty:
        why = (
            f"; {len(skipped)} files were skipped, the first because: {skipped[0].reason}" if skipped else ""
        )
        raise ConsiliumError(f"{folder} holds no scan that can be read{why}")
    return fit, skipped


def list_output_columns(task_name: str, task: Task) -> list[str]:
    """A task's columns of the table (module docstring)."""
    if task.type == "binary":
        return [task_name]
    if task.type == "multiclass":
        return [f"{task_name}_{c}" for c in task.classes]
    if task.type == "regression":
        return [f"{task_name}_{c}" for c in task.label_columns] or [task_name]
    return [
        f"{task_name}_{what}"
        for what in (("right", "left", "severity") if task.severity_column else ("share",))
    ]


def compute_output_values(
    task: Task, output: torch.Tensor, box: Box, lungs: NDArray[np.uint8] | None = None
) -> list[float]:
    """What stands in a task's columns, from one scan's raw output (no prior is added at inference), its crop's box and its lungs [S, H, W].

    NaN where a lung is not seen. Lungs whose sides are not told apart (a radiograph's) have a severity only.
    """
    if task.type == "binary":
        return [round(torch.sigmoid(output[0]).item(), 6)]
    if task.type in ("multiclass", "regression"):
        return [
            round(v, 6) for v in (torch.softmax(output, 0) if task.type == "multiclass" else output).tolist()
        ]
    lesion = (output.sigmoid() >= task.threshold).numpy()
    if not task.severity_column:
        y0, y1, x0, x1 = box
        top, bottom, left, right = letterbox_box(y1 - y0, x1 - x0, lesion.shape[-1])
        return [
            round(100 * float(lesion[:, top:bottom, left:right].mean()), 2)
        ]  # what was padded to a square is no part of the scan
    if lungs is None:
        return [np.nan] * 3
    sides = compute_affected_fractions(lesion, lungs) if (lungs == 2).any() else (np.nan, np.nan)
    return [round(100 * share, 2) for share in (*sides, compute_severity(lesion, lungs))]


def make_mask_filename(scan: str, task: str) -> str:
    """A file name for a scan's mask; no two pairs share one, whatever characters they hold ('/' and the like become %2F ...)."""
    name = quote(scan, safe="")
    if len(name) > 150:
        name = (
            f"{name[:120]}%-{hashlib.sha256(scan.encode()).hexdigest()[:24]}"  # "%-" stands in no quoted name
        )
    return f"{name}_{quote(task, safe='').replace('_', '%5F')}.nii.gz"
