"""Load a site's scans by split for a run's configuration: cohort, slices, masks, targets."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from client.data.cluster_label_store import load_cluster_labels
from client.data.cohort import filter_modality, load_cohort
from client.data.columns import SPLITS
from client.data.dataset import OptionalMask, ScanDataset, concat_datasets
from client.data.labels import task_targets
from client.data.phantom_check import require_phantom
from client.imaging.jobs import LUNGS_COLUMN
from client.imaging.preprocess import load_masks, load_slices, preprocess_cohort
from client.imaging.skipped import SkippedItem
from client.imaging.slice_store import SliceStore
from client.site.config import Site, cohort_state_dir, local_cohorts, state_dir
from common.config.schema import Config, FederationConfig, Task
from common.learning.losses import UNSUPERVISED_TYPES
from common.utils.errors import RefusalCode, Refused

log = logging.getLogger("consilium.centre")


class LoadedDatasets(NamedTuple):
    """A site's scans by split, and what could not be read."""

    by_split: dict[str, ScanDataset]
    skipped: list[SkippedItem]


class LoadedCohort(NamedTuple):
    """The scans of a cohort that could be read, their rows in its table, and what could not be read."""

    scans: ScanDataset
    rows: NDArray[np.int64]
    skipped: list[SkippedItem]


class DatasetCache:
    """The most recently used data sets of this process.

    A process answers many messages of one run, so that the files are looked at once. They are looked at
    again when the coordinator starts or resumes a run: a JoinRequest clears the cache.
    """

    def __init__(self, max_entries: int = 4) -> None:
        """Make an empty cache."""
        self.max_entries = max_entries
        self._entries: list[tuple[Site, Config, LoadedDatasets]] = []  # the least recently used first

    def load(self, site: Site, config: Config) -> LoadedDatasets:
        """Return the data sets of a site for a configuration, from memory if they are there."""
        for index, (known_site, known_config, datasets) in enumerate(self._entries):
            if known_site == site and known_config == config:
                self._entries.append(self._entries.pop(index))
                return datasets
        datasets = _load_from_files(site, config)
        self._entries.append((site, config, datasets))
        del self._entries[: -self.max_entries]
        return datasets

    def clear(self) -> None:
        """Forget everything, so that the files are looked at again."""
        self._entries.clear()


_cache = DatasetCache()


def load_datasets(site: Site, config: Config) -> LoadedDatasets:
    """Return this site's scans by split, preprocessed where the slice store lacks them, and what was skipped.

    Raises Refused when there is no cohort or none of its scans can be read.
    """
    return _cache.load(site, config)


def clear_dataset_cache() -> None:
    """Look at the files again the next time."""
    _cache.clear()


def _load_from_files(site: Site, config: Config) -> LoadedDatasets:
    parts: dict[str, list[ScanDataset]] = {split: [] for split in SPLITS}
    skipped: list[SkippedItem] = []
    for centre, path in local_cohorts(site, config).items():
        table = load_centre_cohort(site, config, centre, path)
        cohort = load_dataset(site, config, centre, path, table)
        skipped += cohort.skipped
        splits = assign_splits(table, config.federation, centre)[cohort.rows]
        for split in SPLITS:
            parts[split].append(cohort.scans.subset(np.flatnonzero(splits == split)))
        training_table = table.iloc[cohort.rows[splits == "train"]].reset_index(drop=True)
        parts["train"][-1].views = load_views(site, config, centre, path, training_table)
    by_split = {split: concat_datasets(datasets) for split, datasets in parts.items()}
    if not any(len(scans) for scans in by_split.values()):
        log.error("no scan could be read, %d were skipped", len(skipped))
        raise Refused(
            "no scan could be read; run `consilium-centre preprocess` there and read its list",
            RefusalCode.NO_DATA,
        )
    return LoadedDatasets(by_split, skipped)


def load_views(
    site: Site, config: Config, centre: str, path: Path, training_table: pd.DataFrame
) -> list[ScanDataset]:
    """Load the training scans again, with each of the `preprocess.num_views` random choices of slices."""
    views: list[ScanDataset] = []
    for view in range(1, config.preprocess.num_views + 1):
        view_config = replace(config, preprocess=replace(config.preprocess, view=view))
        cohort = load_dataset(site, view_config, centre, path, training_table)
        num_lost = len(training_table) - len(cohort.rows)
        if num_lost:
            log.error("%d training scans could be read once, but not again", num_lost)
            raise Refused(
                "some training scans could be read once, but not again; preprocess the cohort anew",
                RefusalCode.NO_DATA,
            )
        views.append(cohort.scans)
    return views


def load_centre_cohort(site: Site, config: Config, centre: str, path: Path) -> pd.DataFrame:
    """Load a cohort's table, scans of the recipe's modality only.

    Raises Refused when there are no data. A phantom federation's are not drawn here: `consilium-centre
    phantom` does.
    """
    if config.federation.phantom and not site.centre:
        require_phantom(path, centre, config.federation.phantom)
    if not path.exists():
        location = "the `data` of site.yaml"
        if not site.centre:
            location = f"federation.data_root/{centre}"
        raise Refused(
            f"centre '{centre}' has no data: {location} does not exist; "
            "write a cohort there with `consilium-centre cohort`",
            RefusalCode.NO_DATA,
        )
    return filter_modality(load_cohort(path, centre), config.preprocess.modality).reset_index(drop=True)


def assign_splits(table: pd.DataFrame, federation: FederationConfig, centre: str) -> NDArray[np.str_]:
    """Return [N], train, val or test.

    They are the cohort's own splits; in cross-validation they follow from the fold's number, all scans of a
    patient together; at a held-out centre all are test.
    """
    if centre in federation.held_out_centres:
        return np.full(len(table), "test")
    if federation.fold is None:
        return table["split"].to_numpy(dtype=str)
    patient_numbers = np.array([_hash_patient(patient) for patient in table["patient"]])
    folds_ahead = (patient_numbers - federation.fold) % federation.folds
    return np.select([folds_ahead == 0, folds_ahead == 1], ["test", "val"], "train")


def describe_divisions(table: pd.DataFrame, federation: FederationConfig) -> list[str]:
    """Return [N]: the parts of the table that `assign_splits` and a modality put together or leave out.

    They do not depend on the fold's number or on who is held out, which choose among these parts only.
    """
    parts = table["split"].astype(str)
    if federation.fold is not None:
        parts = table["patient"].map(lambda patient: str(_hash_patient(patient) % federation.folds))
    if "modality" in table:
        parts = parts + "/" + table["modality"].fillna("").astype(str)
    return [str(part) for part in parts]


def _hash_patient(patient: str) -> int:
    return int(hashlib.sha256(f"fold/{patient}".encode()).hexdigest()[:12], 16)


def list_mask_columns(config: Config) -> list[str]:
    """List the columns whose masks the tasks need; `lungs` for the affected share of the lungs."""
    columns: list[str] = []
    needs_lungs = False
    for name, task in config.tasks.items():
        if task.type == "segmentation":
            columns.append(task.label_column or name)
            needs_lungs = needs_lungs or bool(task.severity_column)
    if needs_lungs:
        columns.append(LUNGS_COLUMN)
    return list(dict.fromkeys(columns))


def load_dataset(site: Site, config: Config, centre: str, path: Path, table: pd.DataFrame) -> LoadedCohort:
    """Load the scans of one cohort's table with the targets of every task."""
    base = path if path.is_dir() else path.parent
    mask_columns = list_mask_columns(config)
    store = SliceStore(cohort_state_dir(site, path) / "slices")
    all_keys, skipped = preprocess_cohort(
        table,
        base,
        config.preprocess,
        store,
        site.num_workers,
        show_progress=False,
        mask_columns=mask_columns,
    )
    rows = np.flatnonzero(np.array(all_keys, dtype=object) != "")
    keys = [all_keys[row] for row in rows]
    table = table.iloc[rows].reset_index(drop=True)
    masks = {
        column: load_masks(store, table, base, keys, column, config.preprocess) for column in mask_columns
    }
    scans = ScanDataset(
        slices=load_slices(store, keys),
        targets={},
        centres=[centre] * len(keys),
        store_keys=keys,
        lung_masks=masks.get(LUNGS_COLUMN, []),
        patient_ids=(f"{centre}/" + table["patient"].astype(str)).tolist(),
        scan_ids=(f"{centre}/" + table["scan"].astype(str)).tolist(),
        divisions=describe_divisions(table, config.federation),
    )
    for name, task in config.tasks.items():
        if task.type == "segmentation":
            _add_segmentation(scans, name, task, table, masks)
        elif task.num_clusters:
            _add_clustering(scans, name, task, table)
            clustering_id = task.clustering_id
            if centre in config.federation.held_out_centres:
                clustering_id = ""  # it took no part in the clustering
            scans.targets[name] = load_cluster_labels(state_dir(site, config), clustering_id, keys)
        else:
            scans.targets[name] = _load_table_targets(table, name, task)
    return LoadedCohort(scans, rows, skipped)


def _add_segmentation(
    scans: ScanDataset,
    name: str,
    task: Task,
    table: pd.DataFrame,
    masks: Mapping[str, Sequence[OptionalMask]],
) -> None:
    """Add a task's masks, which scans have one, and the known severity."""
    task_masks = list(masks[task.label_column or name])
    scans.masks[name] = task_masks
    has_no_mask = [mask is None for mask in task_masks]
    scans.targets[name] = np.where(has_no_mask, np.nan, 1.0)
    if not task.severity_column:
        return
    scans.extra_targets[name] = np.full(len(scans), np.nan)
    if task.severity_column in table:
        severity = pd.to_numeric(table[task.severity_column], errors="coerce")
        scans.extra_targets[name] = severity.to_numpy(float)


def _add_clustering(scans: ScanDataset, name: str, task: Task, table: pd.DataFrame) -> None:
    """Add which scans take part in a task's clustering: those with a value in its column, if it has one."""
    takes_part = np.full(len(scans), not task.label_column)
    if task.label_column in table:
        takes_part = table[task.label_column].notna().to_numpy()
    scans.extra_targets[name] = np.where(takes_part, 1.0, np.nan)


def _load_table_targets(table: pd.DataFrame, name: str, task: Task) -> NDArray[np.float64]:
    """Return the targets of a task whose labels are the table's, or the scans themselves."""
    if task.type in UNSUPERVISED_TYPES:
        return np.zeros(len(table))
    if task.type == "multiclass" and not task.classes:  # sources, before the coordinator knows them all
        return np.full(len(table), np.nan)
    if (task.label_column or name) == "source":  # a source that the federation does not know is no label
        is_known = table["source"].isin(task.classes)
        table = table.assign(source=table["source"].where(is_known, np.nan))
    return task_targets(table, name, task)
