"""A cohort's slices and masks: brought into the store where they are missing, and loaded from it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from client.imaging.jobs import PreprocessJob, compute_mask_key, find_stored_slices, make_jobs
from client.imaging.skipped import SkippedItem
from client.imaging.slice_store import SliceStore
from client.imaging.worker_pool import run_jobs
from common.config.schema import PreprocessConfig
from common.utils.errors import ConsiliumError

log = logging.getLogger(__name__)


class PreprocessedCohort(NamedTuple):
    """The keys of a cohort's slices, and what could not be used."""

    keys: list[str]  # one a row; "" where the scan cannot be read
    skipped: list[SkippedItem]  # scans, then masks


def preprocess_cohort(
    cohort: pd.DataFrame,
    base: Path,
    settings: PreprocessConfig,
    store: SliceStore,
    num_workers: int = 1,
    show_progress: bool = True,
    mask_columns: Sequence[str] = (),
) -> PreprocessedCohort:
    """Bring the cohort's slices, and the masks of `mask_columns`, into the store where they are missing.

    Relative paths start from `base`. A mask that cannot be used is listed, and its scan stays. With
    `num_workers` > 1, that many processes work; one that is killed costs no scan but the one that killed it.
    Reasons hold no path and no identifier. `load_slices` and `load_masks` give the result.
    """
    store.remove_stale()
    jobs = make_jobs(cohort, base, settings, store, mask_columns)
    keys = [_find_complete_entry(store, job) or "" for job in jobs]
    missing_rows = [row for row, key in enumerate(keys) if not key]
    skipped_scans: dict[int, SkippedItem] = {}
    skipped_masks: list[SkippedItem] = []
    with _progress_bar(len(jobs), show_progress) as advance:
        advance(len(jobs) - len(missing_rows))
        for row, outcome in run_jobs(jobs, missing_rows, min(num_workers, len(missing_rows))):
            keys[row] = outcome.slices_key
            if not outcome.slices_key:
                skipped_scans[row] = SkippedItem(str(jobs[row].path), outcome.reason)
            skipped_masks += outcome.skipped_masks
            advance(1)
    # The log holds numbers only; the caller shows at the centre which scans they are, and why.
    if skipped_scans:
        log.warning("%d of %d scans cannot be read and are left out", len(skipped_scans), len(jobs))
    if skipped_masks:
        log.warning("%d masks cannot be used; their scans count as without one", len(skipped_masks))
    in_order = [skipped_scans[row] for row in sorted(skipped_scans)]
    return PreprocessedCohort(keys, in_order + skipped_masks)


def load_slices(store: SliceStore, keys: Sequence[str]) -> list[NDArray[np.uint8]]:
    """Return the slices [S, H, W] of each key, memory-mapped.

    Raises:
        ConsiliumError: Some have left the store since they were preprocessed.
    """
    slices = [store.get(key, verify=False) for key in keys]
    available = [stack for stack in slices if stack is not None]
    missing = len(slices) - len(available)
    if missing:
        raise ConsiliumError(
            f"{missing} of {len(keys)} preprocessed scans are no longer in the store; "
            "preprocess the cohort again"
        )
    return available


def load_masks(
    store: SliceStore,
    cohort: pd.DataFrame,
    base: Path,
    keys: Sequence[str],
    column: str,
    settings: PreprocessConfig,
) -> list[NDArray[np.uint8] | None]:
    """Return the masks [S, size, size] of a column, memory-mapped, one a row; None where there is none.

    Values are 0 and 1; in the lungs of a CT 1 (right) and 2 (left). An empty mask that the cohort names is a
    mask; lungs that the segmentation did not find are None.
    """
    jobs = make_jobs(cohort, base, settings, store, [column])
    return [_load_mask(store, key, job) for key, job in zip(keys, jobs, strict=True)]


def _load_mask(store: SliceStore, slices_key: str, job: PreprocessJob) -> NDArray[np.uint8] | None:
    """Return the mask of a job that requests at most one."""
    if not slices_key or not job.mask_requests:
        return None
    try:
        key = compute_mask_key(store, slices_key, job.mask_requests[0], job, store.cached_hash)
    except OSError:
        return None
    if store.read_metadata(key).get("missing"):
        return None
    return store.get(key, verify=False)


def _find_complete_entry(store: SliceStore, job: PreprocessJob) -> str | None:
    """Return the key if slices and masks are in the store and no file looks changed; no file is read."""
    try:
        slices_key = find_stored_slices(store, job)
        if not slices_key:
            return None
        for request in job.mask_requests:
            mask_key = compute_mask_key(store, slices_key, request, job, store.cached_hash)
            if store.get(mask_key) is None:
                return None
    except OSError:
        return None
    return slices_key


@contextmanager
def _progress_bar(total: int, is_shown: bool) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on standard error; yields the function that advances it by a number of scans."""
    if not is_shown:
        yield lambda count: None
        return
    columns = (TextColumn("preprocess"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("", total=total)
        yield lambda count: progress.advance(task, count)
