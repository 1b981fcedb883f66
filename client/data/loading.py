"""From a site and a run's configuration to the site's scans by split: cohort, slices, masks, targets."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from client.federation import cluster_labels
from client.data.cohort import load_cohort, filter_modality
from client.data.dataset import ScanDataset, concat_datasets
from client.data.discovery import SkippedItem
from client.phantom.federation import write_centre
from client.imaging.preprocess import preprocess_cohort, load_slices, load_masks
from client.site.config import Site, resolve_data_root, local_cohorts, state_dir, cohort_state_dir
from client.imaging.slice_store import SliceStore
from client.data.labels import task_targets
from common.config.compose import parse_config, config_to_dict
from common.utils.errors import Refused
from common.config.schema import Config, FederationConfig
from common.learning.losses import UNSUPERVISED_TYPES

SPLITS = ("train", "val", "test")


def load_datasets(site: Site, config: Config) -> tuple[dict[str, ScanDataset], list[SkippedItem]]:
    """This site's scans by split, preprocessed where the store lacks them; and those that could not be read."""
    return _load_datasets_cached(site, json.dumps(config_to_dict(config), sort_keys=True))


def clear_dataset_cache() -> None:
    """Look at the files again the next time."""
    _load_datasets_cached.cache_clear()


@lru_cache(maxsize=4)  # a process answers many messages of one run: the files are looked at once, again at the next Hello
def _load_datasets_cached(site: Site, config_json: str) -> tuple[dict[str, ScanDataset], list[SkippedItem]]:
    config = parse_config(json.loads(config_json))
    parts: dict[str, list[ScanDataset]] = {split: [] for split in SPLITS}
    skipped: list[SkippedItem] = []
    for centre, path in local_cohorts(site, config).items():
        table = load_centre_cohort(site, config, centre, path)
        scans, read, failed = load_dataset(site, config, centre, path, table)
        skipped += failed
        splits = assign_splits(table, config.federation, centre)[read]
        for split in SPLITS:
            parts[split].append(scans.subset(np.flatnonzero(splits == split)))
        teaching = table.iloc[read[splits == "train"]].reset_index(drop=True)
        parts["train"][-1].views = load_views(site, config, centre, path, teaching)
    found = {split: concat_datasets(some) for split, some in parts.items()}
    if not any(len(scans) for scans in found.values()):
        raise Refused(f"no scan could be read ({len(skipped)} were skipped); run `consilium-centre preprocess` there and read its list")
    return found, skipped


def load_views(site: Site, config: Config, centre: str, path: Path, table: pd.DataFrame) -> list[ScanDataset]:
    """The training scans again, with each of the random choices of slices that `preprocess.num_views` asks for."""
    found = []
    for draw in range(1, config.preprocess.num_views + 1):
        chosen = replace(config.preprocess, view=draw)
        scans, read, _ = load_dataset(site, replace(config, preprocess=chosen), centre, path, table)
        if len(read) < len(table):
            raise Refused(f"{len(table) - len(read)} training scans could be read once, but not again; preprocess the cohort anew")
        found.append(scans)
    return found


def load_centre_cohort(site: Site, config: Config, centre: str, path: Path) -> pd.DataFrame:
    """The cohort's scans of the recipe's modality; a phantom federation's is written when it is not there yet."""
    if config.federation.phantom and not site.centre:
        write_centre(resolve_data_root(config), centre, config.federation.phantom, config.federation.centres.index(centre))
    if not path.exists():
        where = f"federation.data_root/{centre}" if not site.centre else "the `data` of site.yaml"
        raise Refused(f"centre '{centre}' has no data: {where} does not exist; write a cohort there with `consilium-centre cohort`")
    return filter_modality(load_cohort(path, centre), config.preprocess.modality).reset_index(drop=True)


def assign_splits(table: pd.DataFrame, federation: FederationConfig, centre: str) -> NDArray[np.str_]:
    """[N] train | val | test: the cohort's own; or by the fold's number (all scans of a patient together); or all test at an unseen centre."""
    if centre in federation.held_out_centres:
        return np.full(len(table), "test")
    if federation.fold is None:
        return table["split"].to_numpy(dtype=str)
    place = [int(hashlib.sha256(f"fold/{patient}".encode()).hexdigest()[:12], 16) for patient in table["patient"]]
    turn = (np.array(place) - federation.fold) % federation.folds
    return np.where(turn == 0, "test", np.where(turn == 1, "val", "train"))


def list_mask_columns(config: Config) -> list[str]:
    """The columns whose masks the tasks need; `lungs` for an affected share of the lungs."""
    dense = {name: task for name, task in config.tasks.items() if task.type == "segmentation"}
    wanted = [task.label_column or name for name, task in dense.items()] + (["lungs"] if any(task.severity_column for task in dense.values()) else [])
    return list(dict.fromkeys(wanted))


def load_dataset(site: Site, config: Config, centre: str, path: Path, table: pd.DataFrame) -> tuple[ScanDataset, NDArray[np.int64], list[SkippedItem]]:
    """One cohort's scans that could be read, which rows of the table they are, and what was skipped."""
    base, wanted = path if path.is_dir() else path.parent, list_mask_columns(config)
    store = SliceStore(cohort_state_dir(site, path) / "slices")
    keys, skipped = preprocess_cohort(table, base, config.preprocess, store, site.num_workers, show_progress=False, mask_columns=wanted)
    read = np.flatnonzero(np.array([key != "" for key in keys]))
    table, keys = table.iloc[read].reset_index(drop=True), [keys[i] for i in read]
    maps = {column: load_masks(store, table, base, keys, column, config.preprocess) for column in wanted}
    scans = ScanDataset(load_slices(store, keys), {}, [centre] * len(keys), store_keys=keys, lung_masks=maps.get("lungs", []))
    scans.patient_ids = [f"{centre}/{patient}" for patient in table["patient"]]
    missing = np.full(len(keys), np.nan)
    for name, task in config.tasks.items():
        if task.type == "segmentation":
            scans.masks[name] = maps[task.label_column or name]
            scans.targets[name] = np.array([np.nan if mask is None else 1.0 for mask in scans.masks[name]])
            if task.severity_column:
                scans.extra_targets[name] = pd.to_numeric(table[task.severity_column], errors="coerce").to_numpy(float) if task.severity_column in table else missing
        elif task.type in UNSUPERVISED_TYPES:
            scans.targets[name] = np.zeros(len(keys))
        elif task.num_clusters:
            part = table[task.label_column].notna().to_numpy() if task.label_column in table else np.full(len(keys), not task.label_column)
            scans.extra_targets[name] = np.where(part, 1.0, np.nan)
            unseen = centre in config.federation.held_out_centres  # it had no part in the clustering
            scans.targets[name] = cluster_labels.load_cluster_labels(state_dir(site, config), "" if unseen else task.clustering_id, keys)
        elif task.type == "multiclass" and not task.classes:  # sources, before the coordinator has heard of them all
            scans.targets[name] = missing
        elif (task.label_column or name) == "source":  # one that the federation does not know has no number: unlabelled
            known = table.assign(source=table["source"].where(table["source"].isin(task.classes), np.nan))
            scans.targets[name] = task_targets(known, name, task)
        else:
            scans.targets[name] = task_targets(table, name, task)
    return scans, read, skipped
