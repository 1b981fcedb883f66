"""From a cohort's scans to slices, and their masks, in the store, in several processes, computing only what is missing."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pandas as pd
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from client.data.discovery import SkippedItem
from client.imaging import masks
from client.imaging.readers import LazyVolume, Volume, read_scan
from client.imaging.readers.nifti import NIFTI_SUFFIXES
from client.imaging.slice_pipeline import extract_slices
from client.imaging.slice_store import SliceStore
from common.config.schema import PreprocessConfig
from common.utils.errors import ConsiliumError

log = logging.getLogger(__name__)
LUNGS_COLUMN = "lungs"  # the cohort's column of lung masks
KILLED_REASON = "the process that read it was killed, perhaps for lack of memory; read it on a machine with more, or remove it"


@dataclass(frozen=True)
class PreprocessJob:
    """One scan to bring into the store, with the masks that are wanted of it."""

    path: Path
    window: tuple[float, float] | None
    series_uid: str | None
    settings: PreprocessConfig
    store_dir: Path
    modality: str = ""  # CT | XR where it is known; a single picture may be a slice of a CT
    lung_mask_path: Path | None = None  # the cohort's own lung mask
    mask_files: tuple[
        tuple[str, Path | None], ...
    ] = ()  # (column, file); a column `lungs` without a file: our finder's


JobOutcome = tuple[
    str, str, list[SkippedItem]
]  # the slices' key, else why there are none; and the masks that cannot be used


def run_job(job: PreprocessJob) -> JobOutcome:
    """(key, "", masks left out) once the scan's slices are in the store, or ("", why it cannot be read, [])."""
    try:
        store = SliceStore(job.store_dir)
        key = _compute_slices_key(store.compute_key, store.hash_content, job)
        volume = None
        if store.get(key) is None:
            notes: list[str] = []
            kept, scan = extract_slices(
                job.path,
                job.series_uid,
                job.settings,
                job.window,
                lambda scan: _load_crop_mask(job, scan, notes),
            )
            facts = {
                "indices": np.asarray(kept.indices).tolist(),
                "areas": kept.areas[kept.indices].round().astype(int).tolist(),  # mm2 of lung air
                "box": list(map(int, kept.crop_box)),
                "notes": [*kept.notes, *dict.fromkeys(notes)],
                **_collect_scan_metadata(scan),
            }
            volume = scan if isinstance(scan, Volume) else None
            if _compute_slices_key(store.compute_key, store.hash_content, job) != key:
                return (
                    "",
                    "its files were changed while it was read; preprocess again once they are complete",
                    [],
                )
            store.put(key, kept.slices, facts)
        return key, "", _store_masks(store, key, job, volume)
    except Exception as error:  # a reader's surprise is one scan's misfortune, not the cohort's
        return "", _explain_failure(error, job.path, job.series_uid), []


def _collect_scan_metadata(scan: Volume | LazyVolume) -> dict[str, Any]:
    """What a mask of the scan must fit, and what its measures are."""
    return {"scan": list(scan.shape), "spacing": list(map(float, scan.spacing)), "modality": scan.modality}


def _compute_slices_key(
    lookup: Callable[..., Any], hash_content: Callable[[Path], str], job: PreprocessJob
) -> Any:
    """The key (`Store.key`) or the key where it is ready (`Store.ready`) of the job's slices."""
    return lookup(
        job.path,
        job.settings,
        job.window,
        job.series_uid,
        _describe_lung_source(job, hash_content) if job.settings.crop == "lungs" else "",
    )


def _describe_lung_source(job: PreprocessJob, hash_content: Callable[[Path], str]) -> str:
    """What lungs are made from, for a key: a file's content, or our finder for this modality. Raises OSError as `content` does."""
    return (
        hash_content(job.lung_mask_path)
        if job.lung_mask_path and job.lung_mask_path.exists()
        else f"found {job.modality}"
    )


def _load_crop_mask(
    job: PreprocessJob, scan: Volume | LazyVolume, notes: list[str]
) -> NDArray[np.uint8] | None:
    """The lung mask that a crop to the lungs goes by, where the finder that suits the volume is not to look for itself."""
    if job.settings.crop != "lungs":
        return None
    if job.lung_mask_path:
        try:
            return masks.resize_to_scan(
                masks.read_lung_mask(job.lung_mask_path, False),
                scan.shape,
                not _is_nifti_file(job.lung_mask_path),
            )
        except Exception:  # readers fail in ways of their own, and a mask must not cost its scan
            notes.append("The lung mask that the cohort names cannot be used: the lungs were looked for.")
    return (
        masks.find_lung_mask(scan, True)
        if isinstance(scan, Volume) and job.modality == "CT" and scan.modality == "XR"
        else None
    )


def _store_masks(store: SliceStore, key: str, job: PreprocessJob, volume: Volume | None) -> list[SkippedItem]:
    """Put the wanted masks into the store where they are missing; those that cannot be used, and why."""
    left_out: list[SkippedItem] = []
    facts = store.read_metadata(key)
    for column, path in job.mask_files:
        try:
            own = _compute_mask_key(store, key, column, path, job, store.hash_content)
            if store.get(own) is not None:
                continue
            if volume is None and (
                path is None or "scan" not in facts
            ):  # slices of an earlier version do not say how large their scan was
                volume = read_scan(job.path, job.series_uid)
            about = facts if volume is None else _collect_scan_metadata(volume)
            ct = (job.modality or about["modality"]) == "CT"
            if path is None:
                assert volume is not None
                mask = masks.find_lung_mask(volume, ct)
            else:
                mask = masks.read_lung_mask(path, ct) if column == LUNGS_COLUMN else masks.read_mask(path)
                mask = masks.resize_to_scan(mask, _to_shape(about["scan"]), not _is_nifti_file(path))
            cut = masks.crop_to_slices(mask, facts["indices"], tuple(facts["box"]), job.settings.image_size)
            if _compute_mask_key(store, key, column, path, job, store.hash_content) == own:
                store.put(own, cut, {"missing": path is None and not mask.any()})
        except Exception as error:  # the scan stays, its label is missing
            left_out.append(
                SkippedItem(
                    str(path or job.path),
                    f"the mask in column '{column}': {_explain_failure(error, path or job.path, job.series_uid)}",
                )
            )
    return left_out


def _compute_mask_key(
    store: SliceStore,
    key: str,
    column: str,
    path: Path | None,
    job: PreprocessJob,
    hash_content: Callable[[Path], str],
) -> str:
    if column == LUNGS_COLUMN:
        return store.compute_mask_key(key, f"lungs {job.modality} {hash_content(path) if path else 'found'}")
    assert path is not None
    return store.compute_mask_key(key, f"mask {hash_content(path)}")


def _to_shape(sizes: Sequence[int]) -> tuple[int, int, int]:
    Z, H, W = sizes
    return Z, H, W


def _is_nifti_file(path: Path) -> bool:
    return path.name.lower().endswith(NIFTI_SUFFIXES)


def _explain_failure(error: Exception, path: Path, series_uid: str | None) -> str:
    """Why something at `path` cannot be used, in words that hold no path."""
    if isinstance(error, FileNotFoundError):
        return "it is not there"
    if isinstance(error, ConsiliumError):
        return _remove_paths(str(error), path, series_uid)
    if isinstance(error, MemoryError):
        return KILLED_REASON
    if isinstance(error, OSError):  # of the disk, not of the scan, when the store is full or read-only
        return f"it or the store cannot be used ({error.strerror or type(error).__name__})"
    return f"it cannot be read ({type(error).__name__})"


def _remove_paths(sentence: str, path: Path, series_uid: str | None) -> str:
    """A reader's sentence with "it" for the scan's path and series: reasons are counted for the coordinator, paths hold names."""
    places = [
        str(place)
        for root in {path, path.resolve()}
        for place in (root, *(root.rglob("*") if root.is_dir() else ()))
    ]
    for name in sorted([*places, *([series_uid] if series_uid else [])], key=len, reverse=True):
        sentence = sentence.replace(name, "it")
    return "it cannot be read; read it alone at the centre to see why" if os.sep in sentence else sentence


def _init_worker() -> None:
    """One thread a worker: the processes are the parallelism."""
    cv2.setNumThreads(1)


def make_jobs(
    cohort: pd.DataFrame,
    base: Path,
    settings: PreprocessConfig,
    store: SliceStore,
    mask_columns: Sequence[str] = (),
) -> list[PreprocessJob]:
    """One job a row, with the masks of the `wanted` columns."""
    jobs = []
    for row in cohort.to_dict("records"):
        window = (float(row.get("window_low", np.nan)), float(row.get("window_high", np.nan)))
        series, modality = row.get("series"), row.get("modality")
        own = None if np.isnan(window).any() else window
        files = {column: _resolve_path(base, row.get(column)) for column in {*mask_columns, LUNGS_COLUMN}}
        jobs.append(
            PreprocessJob(
                Path(base) / str(row["path"]),
                own,
                series if isinstance(series, str) and series else None,
                settings,
                store.folder,
                modality
                if isinstance(modality, str)
                else ""
                if settings.modality == "any"
                else settings.modality,
                files[LUNGS_COLUMN],
                tuple(
                    (column, files[column])
                    for column in dict.fromkeys(mask_columns)
                    if files[column] or column == LUNGS_COLUMN
                ),
            )
        )
    return jobs


def _resolve_path(base: Path, value: object) -> Path | None:
    """A cell that names a file, from the cohort's folder on."""
    return Path(base) / value.strip() if isinstance(value, str) and value.strip() else None


def preprocess_cohort(
    cohort: pd.DataFrame,
    base: Path,
    settings: PreprocessConfig,
    store: SliceStore,
    num_workers: int = 1,
    show_progress: bool = True,
    mask_columns: Sequence[str] = (),
) -> tuple[list[str], list[SkippedItem]]:
    """Bring every scan's slices into the store; returns the key of each row ("" when it cannot be read) and what was skipped, and why.

    `base` is the folder that relative paths start from. `masks` are the columns whose masks are wanted too (`stack_masks` gives them);
    one that cannot be used is listed, its scan stays. Only what is missing is computed. With `workers` > 1, that many processes; one
    that is killed costs no scan but the one that killed it. Reasons hold no path and no identifier.
    """
    store.remove_stale()
    jobs = make_jobs(cohort, base, settings, store, mask_columns)
    keys, reasons = [""] * len(jobs), [""] * len(jobs)
    without: list[SkippedItem] = []
    columns = (TextColumn("preprocess"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar: AbstractContextManager[Any] = (
        Progress(*columns, console=Console(stderr=True)) if show_progress else nullcontext()
    )
    with bar as shown:
        task = shown.add_task("", total=len(jobs)) if shown else None
        done = {row: key for row, job in enumerate(jobs) if (key := _find_ready_key(store, job))}
        for row, key in done.items():
            keys[row] = key
        if shown:
            shown.advance(task, len(done))
        missing = [row for row in range(len(jobs)) if row not in done]
        num_workers = min(num_workers, len(missing))
        for row, (key, reason, left_out) in (
            _run_serially(jobs, missing)
            if num_workers <= 1
            else _run_in_pool(jobs, missing, num_workers, run_job)
        ):
            keys[row], reasons[row] = key, reason
            without += left_out
            if shown:
                shown.advance(task)
    skipped = [
        SkippedItem(str(job.path), why) for job, key, why in zip(jobs, keys, reasons, strict=True) if not key
    ]
    if skipped:  # how many; which ones and why is for the caller to show at the centre
        log.warning("%d of %d scans cannot be read and are left out", len(skipped), len(jobs))
    if without:
        log.warning("%d masks cannot be used; their scans count as without one", len(without))
    return keys, skipped + without


def _find_ready_key(store: SliceStore, job: PreprocessJob) -> str | None:
    """The key when slices and masks are in the store and no file looks changed; else None. Cheap."""
    try:
        key: str | None = _compute_slices_key(store.cached_key, store.cached_hash, job)
        whole = key and all(
            store.get(_compute_mask_key(store, key, *wanted, job, store.cached_hash)) is not None
            for wanted in job.mask_files
        )
        return key if whole else None
    except OSError:
        return None


def _run_serially(jobs: Sequence[PreprocessJob], rows: Sequence[int]) -> Iterator[tuple[int, JobOutcome]]:
    yield from ((row, run_job(jobs[row])) for row in rows)


def _run_in_pool(
    jobs: Sequence[PreprocessJob],
    rows: Sequence[int],
    num_workers: int,
    work: Callable[[PreprocessJob], JobOutcome],
) -> Iterator[tuple[int, JobOutcome]]:
    """(row, outcome) as they come. When a worker dies, its pool goes with it: what was under way is tried again at the end, one scan at a
    time, so that only the one that kills is lost."""
    todo, suspects = deque(rows), deque[int]()
    while todo or suspects:
        queue, width = (todo, num_workers) if todo else (suspects, 1)
        with ProcessPoolExecutor(
            width, mp_context=multiprocessing.get_context("spawn"), initializer=_init_worker
        ) as pool:
            running: dict[Future[JobOutcome], int] = {}
            lost: list[int] = []
            while (queue and not lost) or running:
                while queue and not lost and len(running) < width:
                    row = queue.popleft()
                    try:
                        running[pool.submit(work, jobs[row])] = row
                    except BrokenProcessPool:
                        lost.append(row)
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    row = running.pop(future)
                    try:
                        yield row, future.result()
                    except BrokenProcessPool:
                        lost.append(row)
        if queue is suspects:
            yield from ((row, ("", KILLED_REASON, [])) for row in lost)
        else:
            suspects.extend(lost)


def load_slices(store: SliceStore, keys: Sequence[str]) -> list[NDArray[np.uint8]]:
    """The slices `[S, H, W]` of each key, memory-mapped. Raises ConsiliumError when some are gone since they were preprocessed."""
    found = [store.get(key, verify=False) for key in keys]
    gone = sum(slices is None for slices in found)
    if gone:
        raise ConsiliumError(
            f"{gone} of {len(keys)} preprocessed scans are no longer in the store; preprocess the cohort again"
        )
    return [slices for slices in found if slices is not None]


def load_masks(
    store: SliceStore,
    cohort: pd.DataFrame,
    base: Path,
    keys: Sequence[str],
    column: str,
    settings: PreprocessConfig,
) -> list[NDArray[np.uint8] | None]:
    """The masks `[S, size, size]` of a column, memory-mapped, of every row whose `keys` preprocessing gave; None where there is none.

    0 or 1; `lungs` of a CT 1 (right) and 2 (left). Lungs that our finder did not find are None, an empty mask that was given is a mask.
    """
    return [
        _load_mask(store, key, job)
        for key, job in zip(keys, make_jobs(cohort, base, settings, store, [column]), strict=True)
    ]


def _load_mask(store: SliceStore, key: str, job: PreprocessJob) -> NDArray[np.uint8] | None:
    if not key or not job.mask_files:
        return None
    try:
        own = _compute_mask_key(store, key, *job.mask_files[0], job, store.cached_hash)
    except OSError:
        return None
    return None if store.read_metadata(own).get("missing") else store.get(own, verify=False)
