"""Apply a trained model to new scans.

The result is a table with one row a scan (columns: client/tools/prediction_values.py), and masks. Heads that
serve training only (the source head) are dropped.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from rich.progress import track
from torch import Tensor

from client.data.cohort import filter_modality
from client.data.dataset import stack_batch
from client.data.discovery import discover_scans
from client.federation import personal_parameters
from client.imaging.jobs import LUNGS_COLUMN
from client.imaging.mask_files import write_nifti_mask
from client.imaging.preprocess import load_masks, preprocess_cohort
from client.imaging.readers import read_scan
from client.imaging.skipped import SkippedItem
from client.imaging.slice_metadata import ScanGeometry, SliceMetadata
from client.imaging.slice_store import KEY_NAMES, SliceStore
from client.tools.mask_filenames import make_mask_filename
from client.tools.prediction_values import compute_output_values, list_output_columns
from client.training.trainer import run_inference
from common.config.schema import Config, PreprocessConfig
from common.modeling import model_file
from common.modeling.model import Model, make_model
from common.modeling.parameters import build_layout, set_model_weights
from common.utils.errors import ConsiliumError, suggest


class LoadedModel(NamedTuple):
    """A model with its run's configuration, only tasks for inference, and the identity of its weights."""

    model: Model
    config: Config
    identity: str

    @property
    def segmentation_tasks(self) -> list[str]:
        """List the tasks that predict masks."""
        return [name for name, task in self.config.tasks.items() if task.type == "segmentation"]

    @property
    def needs_lungs(self) -> bool:
        """Tell whether a task's values refer to the lungs."""
        return any(task.severity_column for task in self.config.tasks.values())


@dataclass(frozen=True)
class PredictOptions:
    """How to predict, and what beside the table.

    Attributes:
        device: Where to compute.
        num_workers: Processes that read scans.
        personal_dir: This centre's own weights of the model's run, which replace the common ones.
        masks_dir: Folder for masks; None writes none.
        sort_column: Column to sort the table by, the largest first; empty keeps the order of discovery.
    """

    device: str = "cpu"
    num_workers: int = 1
    personal_dir: Path | None = None
    masks_dir: Path | None = None
    sort_column: str = ""


DEFAULT_OPTIONS = PredictOptions()


def load_model(path: Path, personal_dir: Path | None = None) -> LoadedModel:
    """Load a `model.safetensors` with its heads for inference only.

    `personal_dir` holds this centre's own weights of the model's run
    (client/federation/personal_parameters.py), which replace the common ones. Raises ConsiliumError when a
    file is wrong or the model predicts nothing.
    """
    tensors, config = model_file.load_model_file(path)
    identity = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]
    tasks = model_file.inference_tasks(path, config)
    if personal_dir:
        # own weights have the layout of the run's model, with all heads
        run_layout = build_layout(make_model(config.backbone, config.tasks, 0))
        weights = personal_parameters.load_as_tested(personal_dir, run_layout.from_state_dict(tensors))
        tensors = dict(run_layout.to_state_dict(weights))
        identity = f"{identity}+{personal_parameters.hash_weights(weights)}"
    model = make_model(config.backbone, tasks, 0)
    layout = build_layout(model)
    set_model_weights(model, layout, layout.from_state_dict(tensors))
    return LoadedModel(model, replace(config, tasks=tasks), identity)


def predict_folder(
    model_path: Path, folder: Path, store_dir: Path, options: PredictOptions = DEFAULT_OPTIONS
) -> tuple[pd.DataFrame, list[SkippedItem]]:
    """Predict every scan in a folder; one scan is in memory at a time.

    Returns:
        A table with the columns scan, path, those of each task, with masks also `<task>_mask` (the file),
        the chosen slices, identities of model and preprocessing, and the reader's notes; and the scans that
        were skipped.

    Raises:
        ConsiliumError: The folder holds no scan, or the model has no such column or no masks.
    """
    loaded = load_model(model_path, options.personal_dir)
    columns = _list_columns(loaded, options)
    if options.sort_column and options.sort_column not in columns:
        raise ConsiliumError(
            f"there is no column '{options.sort_column}' to sort by{suggest(options.sort_column, columns)}"
        )
    if options.masks_dir and not loaded.segmentation_tasks:
        raise ConsiliumError(
            f"{model_path} draws no masks ({', '.join(loaded.config.tasks)}); leave --masks out"
        )
    table, skipped = find_matching_scans(folder, loaded.config.preprocess.modality)
    if options.masks_dir:
        options.masks_dir.mkdir(parents=True, exist_ok=True)
    base = folder if folder.is_dir() else folder.parent
    predictor = ScanPredictor(loaded, SliceStore(store_dir), base, options)
    keys, unreadable = predictor.preprocess(table)
    rows: list[dict[str, Any]] = []
    for index, key in enumerate(track(keys, "predict   ", transient=True)):
        if not key:
            continue
        row = predictor.predict(table.iloc[[index]], key)
        if row is None:
            reason = "its slices were removed from the store meanwhile; predict again"
            unreadable.append(SkippedItem(str(table["path"].iloc[index]), reason))
        else:
            rows.append(row)
    predictions = pd.DataFrame(rows, columns=columns)
    if options.sort_column:
        predictions = predictions.sort_values(
            options.sort_column, ascending=False, kind="stable", na_position="last", ignore_index=True
        )
    return predictions, skipped + unreadable


def _list_columns(loaded: LoadedModel, options: PredictOptions) -> list[str]:
    """List the columns of the table of predictions."""
    columns = ["scan", "path"]
    for name, task in loaded.config.tasks.items():
        columns += list_output_columns(name, task)
        if options.masks_dir and task.type == "segmentation":
            columns.append(f"{name}_mask")
    return [*columns, "slices", "model", "preprocessing", "notes"]


class ScanPredictor:
    """Predicts scan after scan of one table with one model."""

    def __init__(self, loaded: LoadedModel, store: SliceStore, base: Path, options: PredictOptions) -> None:
        """Predict with a model; relative paths of the table start from `base`."""
        self.loaded = loaded
        self.store = store
        self.base = base
        self.options = options
        self.preprocess_identity = _hash_settings(loaded.config.preprocess)

    def preprocess(self, table: pd.DataFrame) -> tuple[list[str], list[SkippedItem]]:
        """Bring the scans' slices into the store.

        Returns their keys, empty for a scan that cannot be read, and what was skipped.
        """
        mask_columns = [LUNGS_COLUMN] if self.loaded.needs_lungs else []
        return preprocess_cohort(
            table,
            self.base,
            self.loaded.config.preprocess,
            self.store,
            self.options.num_workers,
            mask_columns=mask_columns,
        )

    def predict(self, one_scan: pd.DataFrame, key: str) -> dict[str, Any] | None:
        """Predict the scan of a table with one row; returns None when its slices have left the store."""
        scan = one_scan.iloc[0]
        slices = self.store.get(key)
        document = self.store.read_metadata(key)
        if slices is None or not document:
            return None
        metadata = SliceMetadata.from_json(document)
        outputs = run_inference(
            self.loaded.model,
            [stack_batch([slices])],
            lambda model, batch: model(batch),
            device=self.options.device,
        )
        lung_mask = self._load_lung_mask(one_scan, key)
        row: dict[str, Any] = {"scan": scan["scan"], "path": scan["path"]}
        for name, task in self.loaded.config.tasks.items():
            columns = list_output_columns(name, task)
            values = compute_output_values(task, outputs[name][0], metadata.crop_box, lung_mask)
            row.update(zip(columns, values, strict=True))
        if self.options.masks_dir:
            row |= self._write_masks(scan, outputs, metadata, self.options.masks_dir)
        notes = [*metadata.notes]
        if self.loaded.needs_lungs and lung_mask is None:
            notes.append("Its lungs were not found: how much of each is affected is not known.")
        notes += self._note_modality(scan, metadata.geometry)
        row["slices"] = " ".join(map(str, metadata.indices))
        row["model"] = self.loaded.identity
        row["preprocessing"] = self.preprocess_identity
        row["notes"] = "; ".join(notes)
        return row

    def _load_lung_mask(self, one_scan: pd.DataFrame, key: str) -> NDArray[np.uint8] | None:
        if not self.loaded.needs_lungs:
            return None
        settings = self.loaded.config.preprocess
        (lung_mask,) = load_masks(self.store, one_scan, self.base, [key], LUNGS_COLUMN, settings)
        return lung_mask

    def _write_masks(
        self, scan: pd.Series, outputs: dict[str, Tensor], metadata: SliceMetadata, masks_dir: Path
    ) -> dict[str, str]:
        """Write the scan's masks in its own geometry; returns {column: file}."""
        series = scan.get("series")
        if not isinstance(series, str) or not series:
            series = None
        volume = read_scan(Path(scan["path"]), series)
        files: dict[str, str] = {}
        for name in self.loaded.segmentation_tasks:
            path = masks_dir.resolve() / make_mask_filename(str(scan["scan"]), name)
            write_nifti_mask(
                path,
                outputs[name][0].sigmoid().numpy(),
                metadata.indices,
                metadata.crop_box,
                volume,
                self.loaded.config.tasks[name].threshold,
            )
            files[f"{name}_mask"] = str(path)
        return files

    def _note_modality(self, scan: pd.Series, geometry: ScanGeometry | None) -> list[str]:
        """Note a scan that seems to be of another modality, unless the hospital's table names its own."""
        model_modality = self.loaded.config.preprocess.modality
        if geometry is None or isinstance(scan.get("modality"), str):
            return []
        if model_modality in ("any", geometry.modality):
            return []
        return [f"It was read as {geometry.modality}, the model was made for {model_modality}."]


def _hash_settings(settings: PreprocessConfig) -> str:
    """Return the identity of preprocessing settings, the same as under their names in version 0.1.0."""
    values = {KEY_NAMES.get(name, name): value for name, value in asdict(settings).items()}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:16]


def find_matching_scans(folder: Path, modality: str) -> tuple[pd.DataFrame, list[SkippedItem]]:
    """Find the folder's scans of a modality, and those whose modality is not known.

    Returns:
        The scans, and what was skipped.

    Raises:
        ConsiliumError: There is no such scan.
    """
    table, skipped = discover_scans(folder)
    if "modality" in table:
        table["modality"] = table["modality"].map(_normalise_modality)
    matching = filter_modality(table, modality)
    if len(matching) < len(table):
        other_paths = table.loc[~table["scan"].isin(matching["scan"]), "path"]
        reason = f"it is no {modality}, for which the model was made"
        skipped = skipped + [SkippedItem(str(path), reason) for path in other_paths]
    if matching.empty:
        first_reason = ""
        if skipped:
            first_reason = f"; {len(skipped)} files were skipped, the first because: {skipped[0].reason}"
        raise ConsiliumError(f"{folder} holds no scan that can be read{first_reason}")
    return matching, skipped


def _normalise_modality(value: object) -> object:
    if isinstance(value, str):
        return value.strip().upper()
    return np.nan
