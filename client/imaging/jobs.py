"""Preprocessing jobs: one scan each, with the masks to be stored beside its slices, and the keys of both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from client.imaging.skipped import SkippedItem
from client.imaging.slice_pipeline import Window
from client.imaging.slice_store import SliceStore
from common.config.schema import PreprocessConfig

LUNGS_COLUMN = "lungs"  # the cohort's column of lung masks


@dataclass(frozen=True)
class MaskRequest:
    """A mask to be stored beside a scan's slices."""

    column: str
    path: Path | None  # None, in the column of lung masks only: the lungs are segmented


@dataclass(frozen=True)
class PreprocessJob:
    """One scan to bring into the store, with its masks."""

    path: Path
    window: Window | None
    series_uid: str | None
    settings: PreprocessConfig
    store_dir: Path
    modality: str = ""  # CT | XR where it is known; a single picture may be a slice of a CT
    lung_mask_path: Path | None = None  # the cohort's own lung mask
    mask_requests: tuple[MaskRequest, ...] = ()


class JobOutcome(NamedTuple):
    """The result of a job: a key, or the reason why there is none."""

    slices_key: str  # "" where the scan cannot be used
    reason: str  # "" where it can
    skipped_masks: list[SkippedItem]


def make_jobs(
    cohort: pd.DataFrame,
    base: Path,
    settings: PreprocessConfig,
    store: SliceStore,
    mask_columns: Sequence[str] = (),
) -> list[PreprocessJob]:
    """Make one job for each row of a cohort; relative paths start from `base`."""
    jobs = []
    for row in cohort.to_dict("records"):
        window = (float(row.get("window_low", np.nan)), float(row.get("window_high", np.nan)))
        requests = []
        for column in dict.fromkeys(mask_columns):
            mask_path = _resolve_path(base, row.get(column))
            if mask_path or column == LUNGS_COLUMN:
                requests.append(MaskRequest(column, mask_path))
        jobs.append(
            PreprocessJob(
                path=Path(base) / str(row["path"]),
                window=None if np.isnan(window).any() else window,
                series_uid=_get_text(row.get("series")),
                settings=settings,
                store_dir=store.folder,
                modality=_get_modality(row.get("modality"), settings),
                lung_mask_path=_resolve_path(base, row.get(LUNGS_COLUMN)),
                mask_requests=tuple(requests),
            )
        )
    return jobs


def compute_slices_key(store: SliceStore, job: PreprocessJob) -> str:
    """Return the key of a job's slices; files that changed since the last call are read.

    Raises:
        OSError: The scan, or its lung mask, is not there.
    """
    lung_source = _describe_lung_source(job, store.hash_content)
    return store.compute_key(job.path, job.settings, job.window, job.series_uid, lung_source)


def find_stored_slices(store: SliceStore, job: PreprocessJob) -> str | None:
    """Return the key of a job's slices if they are in the store and no file looks changed; no file is read.

    Raises:
        OSError: The lung mask has not been hashed yet, or is not there.
    """
    lung_source = _describe_lung_source(job, store.cached_hash)
    return store.cached_key(job.path, job.settings, job.window, job.series_uid, lung_source)


def compute_mask_key(
    store: SliceStore,
    slices_key: str,
    request: MaskRequest,
    job: PreprocessJob,
    hash_file: Callable[[Path], str],
) -> str:
    """Return the key of a mask of the scan whose slices have `slices_key`.

    `hash_file` is `store.hash_content`, or `store.cached_hash`, which raises OSError rather than read a file.
    """
    source = "found" if request.path is None else hash_file(request.path)
    if request.column == LUNGS_COLUMN:
        return store.compute_mask_key(slices_key, f"lungs {job.modality} {source}")
    return store.compute_mask_key(slices_key, f"mask {source}")


def _describe_lung_source(job: PreprocessJob, hash_file: Callable[[Path], str]) -> str:
    """Return what a crop to the lungs goes by: a file's content, or the modality's segmentation."""
    if job.settings.crop != "lungs":
        return ""
    if job.lung_mask_path and job.lung_mask_path.exists():
        return hash_file(job.lung_mask_path)
    return f"found {job.modality}"


def _get_text(value: object) -> str | None:
    """Return a cell's text, None where it is empty or missing."""
    if isinstance(value, str) and value:
        return value
    return None


def _get_modality(value: object, settings: PreprocessConfig) -> str:
    """Return the cohort's word, else the one modality that the settings take, else ""."""
    if isinstance(value, str):
        return value
    if settings.modality == "any":
        return ""
    return settings.modality


def _resolve_path(base: Path, value: object) -> Path | None:
    """Return the path in a cell, None where it is empty or missing."""
    if isinstance(value, str) and value.strip():
        return Path(base) / value.strip()
    return None
