"""A trained model on new scans: a table with one row a scan, and masks. Heads that serve training only (the source head) are dropped.

| kind | columns |
|---|---|
| binary | `<task>`: its probability |
| multiclass | `<task>_<class>`: their probabilities |
| regression | `<task>_<column>`, or `<task>` of a single one: in the label's units |
| segmentation with `burden` | `<task>_right`, `<task>_left`: affected per cent of each lung; `<task>_severity`: the larger (client/severity.py) |
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

from client import personal
from client.cohort import of_modality
from client.dataset import stacked
from client.gather import Skipped, gather
from client.lungs import Box
from client.masks import to_nifti
from client.preprocess import LUNGS, preprocess, stack_masks
from client.readers import read_scan
from client.severity import affected_shares, severity
from client.slices import place
from client.store import Store
from client.trainer import infer
from common import saved
from common.errors import ConsiliumError, nearest
from common.model import Model, make_model
from common.schema import Config, Task
from common.weights import layout_of, load


def load_model(path: Path, own: Path | None = None) -> tuple[Model, Config, str]:
    """(model, its run's configuration, identity) from a `model.safetensors`; only heads for inference.

    `own` is the folder of this centre's own weights of that run (client/personal.py), which are laid over. Raises ConsiliumError.
    """
    named, config = saved.read(path)
    identity = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    tasks = saved.predicting(path, config)
    if own:
        whole = layout_of(make_model(config.backbone, config.tasks, 0))  # own weights lie in the layout of all the run's heads
        weights = personal.as_tested(own, whole.flat(named))
        named, identity = dict(whole.named(weights)), f"{identity}+{personal.digest(weights)}"
    model = make_model(config.backbone, tasks, 0)
    layout = layout_of(model)
    load(model, layout, layout.flat(named))
    return model, replace(config, tasks=tasks), identity


def predict(
    model_path: Path,
    folder: Path,
    store: Path,
    device: str = "cpu",
    workers: int = 1,
    own: Path | None = None,
    masks: Path | None = None,
    sort: str = "",
) -> tuple[pd.DataFrame, list[Skipped]]:
    """Predictions for every scan in a folder, and the scans that could not be read with the reason.

    Columns: scan, path; each task's (module docstring), with `masks` also `<task>_mask`, the file in that folder; the chosen slices; model
    and preprocessing identity; notes of the reader. Rows as they were found, or by the column `sort`, the largest first. One scan is in
    memory at a time. Raises ConsiliumError when the folder holds no scan or the model has no such column.
    """
    model, config, identity = load_model(model_path, own)
    drawn = [name for name, task in config.tasks.items() if task.kind == "segmentation"] if masks else []
    outputs = [c for name, task in config.tasks.items() for c in columns(name, task) + [f"{name}_mask"] * (name in drawn)]
    header = ["scan", "path", *outputs, "slices", "model", "preprocessing", "notes"]
    if sort and sort not in header:
        raise ConsiliumError(f"there is no column '{sort}' to sort by{nearest(sort, header)}")
    if masks and not drawn:
        raise ConsiliumError(f"{model_path} draws no masks ({', '.join(config.tasks)}); leave --masks out")
    table, skipped = scans_in(folder, config.preprocess.modality)
    if masks:
        masks.mkdir(parents=True, exist_ok=True)
    base, kept = folder if folder.is_dir() else folder.parent, Store(store)
    burden = any(task.burden for task in config.tasks.values())
    keys, failed = preprocess(table, base, config.preprocess, kept, workers, masks=[LUNGS] if burden else [])
    settings = hashlib.sha256(json.dumps(vars(config.preprocess), sort_keys=True, default=str).encode()).hexdigest()[:16]
    rows: list[dict[str, Any]] = []
    for i in track([i for i, key in enumerate(keys) if key], "predict   ", transient=True):
        scan, key = table.iloc[i], keys[i]
        slices, facts = kept.get(key), kept.facts(key)
        if slices is None or not facts:
            failed.append(Skipped(str(scan["path"]), "its slices were removed from the store meanwhile; predict again"))
            continue
        outcome = infer(model, [stacked([slices])], lambda m, x: m(x), device=device)
        lungs = stack_masks(kept, table.iloc[[i]], base, [key], LUNGS, config.preprocess)[0] if burden else None
        row: dict[str, Any] = {"scan": scan["scan"], "path": scan["path"]}
        for name, task in config.tasks.items():
            row |= dict(zip(columns(name, task), numbers(task, outcome[name][0], facts["box"], lungs), strict=True))
        if masks:
            volume = read_scan(Path(scan["path"]), series if isinstance(series := scan.get("series"), str) and series else None)
            for name in drawn:
                out = masks.resolve() / mask_name(str(scan["scan"]), name)
                probability = outcome[name][0].sigmoid().numpy()
                to_nifti(out, probability, facts["indices"], facts["box"], volume, config.tasks[name].cut)
                row[f"{name}_mask"] = str(out)
        notes = list(facts["notes"])
        if burden and lungs is None:
            notes.append("Its lungs were not found: how much of each is affected is not known.")
        looks, wanted = facts.get("modality", ""), config.preprocess.modality
        if wanted not in ("any", looks) and looks and not isinstance(scan.get("modality"), str):
            notes.append(f"It was read as {looks}, the model was made for {wanted}.")
        row |= {"slices": " ".join(map(str, facts["indices"])), "model": identity, "preprocessing": settings, "notes": "; ".join(notes)}
        rows.append(row)
    found = pd.DataFrame(rows, columns=header)
    if sort:
        found = found.sort_values(sort, ascending=False, kind="stable", na_position="last", ignore_index=True)
    return found, skipped + failed


def scans_in(folder: Path, modality: str) -> tuple[pd.DataFrame, list[Skipped]]:
    """The folder's scans, and what was passed over, also those of another modality where its table says so. Raises ConsiliumError for none."""
    table, skipped = gather(folder)
    if "modality" in table:
        table["modality"] = [m.strip().upper() if isinstance(m, str) else np.nan for m in table["modality"]]
    fit = of_modality(table, modality)
    if len(fit) < len(table):
        others = table.loc[~table["scan"].isin(fit["scan"]), "path"]
        skipped = skipped + [Skipped(str(path), f"it is no {modality}, for which the model was made") for path in others]
    if fit.empty:
        why = f"; {len(skipped)} files were skipped, the first because: {skipped[0].reason}" if skipped else ""
        raise ConsiliumError(f"{folder} holds no scan that can be read{why}")
    return fit, skipped


def columns(name: str, task: Task) -> list[str]:
    """A task's columns of the table (module docstring)."""
    if task.kind == "binary":
        return [name]
    if task.kind == "multiclass":
        return [f"{name}_{c}" for c in task.classes]
    if task.kind == "regression":
        return [f"{name}_{c}" for c in task.columns] or [name]
    return [f"{name}_{what}" for what in (("right", "left", "severity") if task.burden else ("share",))]


def numbers(task: Task, output: torch.Tensor, box: Box, lungs: NDArray[np.uint8] | None = None) -> list[float]:
    """What stands in a task's columns, from one scan's raw output (no prior is added at inference), its crop's box and its lungs [S, H, W].

    NaN where a lung is not seen. Lungs whose sides are not told apart (a radiograph's) have a severity only.
    """
    if task.kind == "binary":
        return [round(torch.sigmoid(output[0]).item(), 6)]
    if task.kind in ("multiclass", "regression"):
        return [round(v, 6) for v in (torch.softmax(output, 0) if task.kind == "multiclass" else output).tolist()]
    lesion = (output.sigmoid() >= task.cut).numpy()
    if not task.burden:
        y0, y1, x0, x1 = box
        top, bottom, left, right = place(y1 - y0, x1 - x0, lesion.shape[-1])
        return [round(100 * float(lesion[:, top:bottom, left:right].mean()), 2)]  # what was padded to a square is no part of the scan
    if lungs is None:
        return [np.nan] * 3
    sides = affected_shares(lesion, lungs) if (lungs == 2).any() else (np.nan, np.nan)
    return [round(100 * share, 2) for share in (*sides, severity(lesion, lungs))]


def mask_name(scan: str, task: str) -> str:
    """A file name for a scan's mask; no two pairs share one, whatever characters they hold ('/' and the like become %2F ...)."""
    name = quote(scan, safe="")
    if len(name) > 150:
        name = f"{name[:120]}%-{hashlib.sha256(scan.encode()).hexdigest()[:24]}"  # "%-" stands in no quoted name
    return f"{name}_{quote(task, safe='').replace('_', '%5F')}.nii.gz"
