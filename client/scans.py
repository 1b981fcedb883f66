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

from client import soft_labels
from client.cohort import load_cohort, of_modality
from client.dataset import Scans, joined
from client.gather import Skipped
from client.phantom import write_centre
from client.preprocess import preprocess, stack, stack_masks
from client.site import Site, data_root, holdings, home, state_folder
from client.store import Store
from client.targets import targets_of
from common.compose import config_from, to_dict
from common.errors import Refused
from common.schema import Config, Federation
from common.tasks import UNSUPERVISED

SPLITS = ("train", "val", "test")


def read_scans(site: Site, config: Config) -> tuple[dict[str, Scans], list[Skipped]]:
    """This site's scans by split, preprocessed where the store lacks them; and those that could not be read."""
    return _read_scans(site, json.dumps(to_dict(config), sort_keys=True))


def forget() -> None:
    """Look at the files again the next time."""
    _read_scans.cache_clear()


@lru_cache(maxsize=4)  # a process answers many messages of one run: the files are looked at once, again at the next Hello
def _read_scans(site: Site, config_json: str) -> tuple[dict[str, Scans], list[Skipped]]:
    config = config_from(json.loads(config_json))
    parts: dict[str, list[Scans]] = {split: [] for split in SPLITS}
    skipped: list[Skipped] = []
    for centre, path in holdings(site, config).items():
        table = cohort_of(site, config, centre, path)
        scans, read, failed = scans_of(site, config, centre, path, table)
        skipped += failed
        splits = splits_of(table, config.federation, centre)[read]
        for split in SPLITS:
            parts[split].append(scans.take(np.flatnonzero(splits == split)))
        teaching = table.iloc[read[splits == "train"]].reset_index(drop=True)
        parts["train"][-1].draws = drawn(site, config, centre, path, teaching)
    found = {split: joined(some) for split, some in parts.items()}
    if not any(len(scans) for scans in found.values()):
        raise Refused(f"no scan could be read ({len(skipped)} were skipped); run `consilium-centre preprocess` there and read its list")
    return found, skipped


def drawn(site: Site, config: Config, centre: str, path: Path, table: pd.DataFrame) -> list[Scans]:
    """The training scans again, with each of the random choices of slices that `preprocess.draws` asks for."""
    found = []
    for draw in range(1, config.preprocess.draws + 1):
        chosen = replace(config.preprocess, draw=draw)
        scans, read, _ = scans_of(site, replace(config, preprocess=chosen), centre, path, table)
        if len(read) < len(table):
            raise Refused(f"{len(table) - len(read)} training scans could be read once, but not again; preprocess the cohort anew")
        found.append(scans)
    return found


def cohort_of(site: Site, config: Config, centre: str, path: Path) -> pd.DataFrame:
    """The cohort's scans of the recipe's modality; a phantom federation's is written when it is not there yet."""
    if config.federation.phantom and not site.centre:
        write_centre(data_root(config), centre, config.federation.phantom, config.federation.centres.index(centre))
    if not path.exists():
        where = f"federation.root/{centre}" if not site.centre else "the `data` of site.yaml"
        raise Refused(f"centre '{centre}' has no data: {where} does not exist; write a cohort there with `consilium-centre cohort`")
    return of_modality(load_cohort(path, centre), config.preprocess.modality).reset_index(drop=True)


def splits_of(table: pd.DataFrame, federation: Federation, centre: str) -> NDArray[np.str_]:
    """[N] train | val | test: the cohort's own; or by the fold's number (all scans of a patient together); or all test at an unseen centre."""
    if centre in federation.unseen:
        return np.full(len(table), "test")
    if federation.fold is None:
        return table["split"].to_numpy(dtype=str)
    place = [int(hashlib.sha256(f"fold/{patient}".encode()).hexdigest()[:12], 16) for patient in table["patient"]]
    turn = (np.array(place) - federation.fold) % federation.folds
    return np.where(turn == 0, "test", np.where(turn == 1, "val", "train"))


def masks_wanted(config: Config) -> list[str]:
    """The columns whose masks the tasks need; `lungs` for an affected share of the lungs."""
    dense = {name: task for name, task in config.tasks.items() if task.kind == "segmentation"}
    wanted = [task.label or name for name, task in dense.items()] + (["lungs"] if any(task.burden for task in dense.values()) else [])
    return list(dict.fromkeys(wanted))


def scans_of(site: Site, config: Config, centre: str, path: Path, table: pd.DataFrame) -> tuple[Scans, NDArray[np.int64], list[Skipped]]:
    """One cohort's scans that could be read, which rows of the table they are, and what was skipped."""
    base, wanted = path if path.is_dir() else path.parent, masks_wanted(config)
    store = Store(state_folder(site, path) / "slices")
    keys, skipped = preprocess(table, base, config.preprocess, store, site.workers, progress=False, masks=wanted)
    read = np.flatnonzero(np.array([key != "" for key in keys]))
    table, keys = table.iloc[read].reset_index(drop=True), [keys[i] for i in read]
    maps = {column: stack_masks(store, table, base, keys, column, config.preprocess) for column in wanted}
    scans = Scans(stack(store, keys), {}, [centre] * len(keys), keys=keys, lungs=maps.get("lungs", []))
    scans.patients = [f"{centre}/{patient}" for patient in table["patient"]]
    missing = np.full(len(keys), np.nan)
    for name, task in config.tasks.items():
        if task.kind == "segmentation":
            scans.masks[name] = maps[task.label or name]
            scans.targets[name] = np.array([np.nan if mask is None else 1.0 for mask in scans.masks[name]])
            if task.burden:
                scans.extra[name] = pd.to_numeric(table[task.burden], errors="coerce").to_numpy(float) if task.burden in table else missing
        elif task.kind in UNSUPERVISED:
            scans.targets[name] = np.zeros(len(keys))
        elif task.clusters:
            part = table[task.label].notna().to_numpy() if task.label in table else np.full(len(keys), not task.label)
            scans.extra[name] = np.where(part, 1.0, np.nan)
            unseen = centre in config.federation.unseen  # it had no part in the clustering
            scans.targets[name] = soft_labels.read(home(site, config), "" if unseen else task.clustering, keys)
        elif task.kind == "multiclass" and not task.classes:  # sources, before the coordinator has heard of them all
            scans.targets[name] = missing
        elif (task.label or name) == "source":  # one that the federation does not know has no number: unlabelled
            known = table.assign(source=table["source"].where(table["source"].isin(task.classes), np.nan))
            scans.targets[name] = targets_of(known, name, task)
        else:
            scans.targets[name] = targets_of(table, name, task)
    return scans, read, skipped
