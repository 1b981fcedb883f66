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

from client import masks
from client.gather import Skipped
from client.readers import Unread, Volume, read_scan
from client.readers.nifti import NIFTI
from client.slices import keep
from client.store import Store
from common.errors import ConsiliumError
from common.schema import Preprocess

log = logging.getLogger(__name__)
LUNGS = "lungs"  # the cohort's column of lung masks
KILLED = "the process that read it was killed, perhaps for lack of memory; read it on a machine with more, or remove it"


@dataclass(frozen=True)
class Job:
    """One scan to bring into the store, with the masks that are wanted of it."""

    path: Path
    window: tuple[float, float] | None
    series: str | None
    settings: Preprocess
    store: Path
    modality: str = ""  # CT | XR where it is known; a single picture may be a slice of a CT
    lungs: Path | None = None  # the cohort's own lung mask
    masks: tuple[tuple[str, Path | None], ...] = ()  # (column, file); a column `lungs` without a file: our finder's


Outcome = tuple[str, str, list[Skipped]]  # the slices' key, else why there are none; and the masks that cannot be used


def run_job(job: Job) -> Outcome:
    """(key, "", masks left out) once the scan's slices are in the store, or ("", why it cannot be read, [])."""
    try:
        store = Store(job.store)
        key = _slices_key(store.key, store.content, job)
        volume = None
        if store.get(key) is None:
            notes: list[str] = []
            kept, scan = keep(job.path, job.series, job.settings, job.window, lambda scan: _crop_lungs(job, scan, notes))
            facts = {
                "indices": np.asarray(kept.indices).tolist(),
                "areas": kept.areas[kept.indices].round().astype(int).tolist(),  # mm2 of lung air
                "box": list(map(int, kept.box)),
                "notes": [*kept.notes, *dict.fromkeys(notes)],
                **_of_scan(scan),
            }
            volume = scan if isinstance(scan, Volume) else None
            if _slices_key(store.key, store.content, job) != key:
                return "", "its files were changed while it was read; preprocess again once they are complete", []
            store.put(key, kept.slices, facts)
        return key, "", _bring_masks(store, key, job, volume)
    except Exception as error:  # a reader's surprise is one scan's misfortune, not the cohort's
        return "", _reason(error, job.path, job.series), []


def _of_scan(scan: Volume | Unread) -> dict[str, Any]:
    """What a mask of the scan must fit, and what its measures are."""
    return {"scan": list(scan.shape), "spacing": list(map(float, scan.spacing)), "modality": scan.modality}


def _slices_key(find: Callable[..., Any], content: Callable[[Path], str], job: Job) -> Any:
    """The key (`Store.key`) or the key where it is ready (`Store.ready`) of the job's slices."""
    return find(job.path, job.settings, job.window, job.series, _lungs_from(job, content) if job.settings.crop == "lungs" else "")


def _lungs_from(job: Job, content: Callable[[Path], str]) -> str:
    """What lungs are made from, for a key: a file's content, or our finder for this modality. Raises OSError as `content` does."""
    return content(job.lungs) if job.lungs and job.lungs.exists() else f"found {job.modality}"


def _crop_lungs(job: Job, scan: Volume | Unread, notes: list[str]) -> NDArray[np.uint8] | None:
    """The lung mask that a crop to the lungs goes by, where the finder that suits the volume is not to look for itself."""
    if job.settings.crop != "lungs":
        return None
    if job.lungs:
        try:
            return masks.fitted(masks.read_lungs(job.lungs, False), scan.shape, not _is_nifti(job.lungs))
        except Exception:  # readers fail in ways of their own, and a mask must not cost its scan
            notes.append("The lung mask that the cohort names cannot be used: the lungs were looked for.")
    return masks.find_lungs(scan, True) if isinstance(scan, Volume) and job.modality == "CT" and scan.modality == "XR" else None


def _bring_masks(store: Store, key: str, job: Job, volume: Volume | None) -> list[Skipped]:
    """Put the wanted masks into the store where they are missing; those that cannot be used, and why."""
    left_out: list[Skipped] = []
    facts = store.facts(key)
    for column, path in job.masks:
        try:
            own = _mask_key(store, key, column, path, job, store.content)
            if store.get(own) is not None:
                continue
            if volume is None and (path is None or "scan" not in facts):  # slices of an earlier version do not say how large their scan was
                volume = read_scan(job.path, job.series)
            about = facts if volume is None else _of_scan(volume)
            ct = (job.modality or about["modality"]) == "CT"
            if path is None:
                assert volume is not None
                mask = masks.find_lungs(volume, ct)
            else:
                mask = masks.read_lungs(path, ct) if column == LUNGS else masks.read_mask(path)
                mask = masks.fitted(mask, _shape(about["scan"]), not _is_nifti(path))
            cut = masks.cut(mask, facts["indices"], tuple(facts["box"]), job.settings.size)
            if _mask_key(store, key, column, path, job, store.content) == own:
                store.put(own, cut, {"missing": path is None and not mask.any()})
        except Exception as error:  # the scan stays, its label is missing
            left_out.append(
                Skipped(str(path or job.path), f"the mask in column '{column}': {_reason(error, path or job.path, job.series)}")
            )
    return left_out


def _mask_key(store: Store, key: str, column: str, path: Path | None, job: Job, content: Callable[[Path], str]) -> str:
    if column == LUNGS:
        return store.mask_key(key, f"lungs {job.modality} {content(path) if path else 'found'}")
    assert path is not None
    return store.mask_key(key, f"mask {content(path)}")


def _shape(sizes: Sequence[int]) -> tuple[int, int, int]:
    Z, H, W = sizes
    return Z, H, W


def _is_nifti(path: Path) -> bool:
    return path.name.lower().endswith(NIFTI)


def _reason(error: Exception, path: Path, series: str | None) -> str:
    """Why something at `path` cannot be used, in words that hold no path."""
    if isinstance(error, FileNotFoundError):
        return "it is not there"
    if isinstance(error, ConsiliumError):
        return _nameless(str(error), path, series)
    if isinstance(error, MemoryError):
        return KILLED
    if isinstance(error, OSError):  # of the disk, not of the scan, when the store is full or read-only
        return f"it or the store cannot be used ({error.strerror or type(error).__name__})"
    return f"it cannot be read ({type(error).__name__})"


def _nameless(sentence: str, path: Path, series: str | None) -> str:
    """A reader's sentence with "it" for the scan's path and series: reasons are counted for the coordinator, paths hold names."""
    places = [str(place) for root in {path, path.resolve()} for place in (root, *(root.rglob("*") if root.is_dir() else ()))]
    for name in sorted([*places, *([series] if series else [])], key=len, reverse=True):
        sentence = sentence.replace(name, "it")
    return "it cannot be read; read it alone at the centre to see why" if os.sep in sentence else sentence


def _start() -> None:
    """One thread a worker: the processes are the parallelism."""
    cv2.setNumThreads(1)


def jobs_of(cohort: pd.DataFrame, base: Path, settings: Preprocess, store: Store, wanted: Sequence[str] = ()) -> list[Job]:
    """One job a row, with the masks of the `wanted` columns."""
    jobs = []
    for row in cohort.to_dict("records"):
        window = (float(row.get("window_low", np.nan)), float(row.get("window_high", np.nan)))
        series, modality = row.get("series"), row.get("modality")
        own = None if np.isnan(window).any() else window
        files = {column: _file(base, row.get(column)) for column in {*wanted, LUNGS}}
        jobs.append(
            Job(
                Path(base) / str(row["path"]),
                own,
                series if isinstance(series, str) and series else None,
                settings,
                store.folder,
                modality if isinstance(modality, str) else "" if settings.modality == "any" else settings.modality,
                files[LUNGS],
                tuple((column, files[column]) for column in dict.fromkeys(wanted) if files[column] or column == LUNGS),
            )
        )
    return jobs


def _file(base: Path, value: object) -> Path | None:
    """A cell that names a file, from the cohort's folder on."""
    return Path(base) / value.strip() if isinstance(value, str) and value.strip() else None


def preprocess(
    cohort: pd.DataFrame, base: Path, settings: Preprocess, store: Store, workers: int = 1, progress: bool = True, masks: Sequence[str] = ()
) -> tuple[list[str], list[Skipped]]:
    """Bring every scan's slices into the store; returns the key of each row ("" when it cannot be read) and what was skipped, and why.

    `base` is the folder that relative paths start from. `masks` are the columns whose masks are wanted too (`stack_masks` gives them);
    one that cannot be used is listed, its scan stays. Only what is missing is computed. With `workers` > 1, that many processes; one
    that is killed costs no scan but the one that killed it. Reasons hold no path and no identifier.
    """
    store.sweep()
    jobs = jobs_of(cohort, base, settings, store, masks)
    keys, reasons = [""] * len(jobs), [""] * len(jobs)
    without: list[Skipped] = []
    columns = (TextColumn("preprocess"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar: AbstractContextManager[Any] = Progress(*columns, console=Console(stderr=True)) if progress else nullcontext()
    with bar as shown:
        task = shown.add_task("", total=len(jobs)) if shown else None
        done = {row: key for row, job in enumerate(jobs) if (key := _ready(store, job))}
        for row, key in done.items():
            keys[row] = key
        if shown:
            shown.advance(task, len(done))
        missing = [row for row in range(len(jobs)) if row not in done]
        workers = min(workers, len(missing))
        for row, (key, reason, left_out) in _alone(jobs, missing) if workers <= 1 else _together(jobs, missing, workers, run_job):
            keys[row], reasons[row] = key, reason
            without += left_out
            if shown:
                shown.advance(task)
    skipped = [Skipped(str(job.path), why) for job, key, why in zip(jobs, keys, reasons, strict=True) if not key]
    if skipped:  # how many; which ones and why is for the caller to show at the centre
        log.warning("%d of %d scans cannot be read and are left out", len(skipped), len(jobs))
    if without:
        log.warning("%d masks cannot be used; their scans count as without one", len(without))
    return keys, skipped + without


def _ready(store: Store, job: Job) -> str | None:
    """The key when slices and masks are in the store and no file looks changed; else None. Cheap."""
    try:
        key: str | None = _slices_key(store.ready, store.noted, job)
        whole = key and all(store.get(_mask_key(store, key, *wanted, job, store.noted)) is not None for wanted in job.masks)
        return key if whole else None
    except OSError:
        return None


def _alone(jobs: Sequence[Job], rows: Sequence[int]) -> Iterator[tuple[int, Outcome]]:
    yield from ((row, run_job(jobs[row])) for row in rows)


def _together(jobs: Sequence[Job], rows: Sequence[int], workers: int, work: Callable[[Job], Outcome]) -> Iterator[tuple[int, Outcome]]:
    """(row, outcome) as they come. When a worker dies, its pool goes with it: what was under way is tried again at the end, one scan at a
    time, so that only the one that kills is lost."""
    todo, suspects = deque(rows), deque[int]()
    while todo or suspects:
        queue, width = (todo, workers) if todo else (suspects, 1)
        with ProcessPoolExecutor(width, mp_context=multiprocessing.get_context("spawn"), initializer=_start) as pool:
            running: dict[Future[Outcome], int] = {}
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
            yield from ((row, ("", KILLED, [])) for row in lost)
        else:
            suspects.extend(lost)


def stack(store: Store, keys: Sequence[str]) -> list[NDArray[np.uint8]]:
    """The slices `[S, H, W]` of each key, memory-mapped. Raises ConsiliumError when some are gone since they were preprocessed."""
    found = [store.get(key, verify=False) for key in keys]
    gone = sum(slices is None for slices in found)
    if gone:
        raise ConsiliumError(f"{gone} of {len(keys)} preprocessed scans are no longer in the store; preprocess the cohort again")
    return [slices for slices in found if slices is not None]


def stack_masks(
    store: Store, cohort: pd.DataFrame, base: Path, keys: Sequence[str], column: str, settings: Preprocess
) -> list[NDArray[np.uint8] | None]:
    """The masks `[S, size, size]` of a column, memory-mapped, of every row whose `keys` preprocessing gave; None where there is none.

    0 or 1; `lungs` of a CT 1 (right) and 2 (left). Lungs that our finder did not find are None, an empty mask that was given is a mask.
    """
    return [_stacked_mask(store, key, job) for key, job in zip(keys, jobs_of(cohort, base, settings, store, [column]), strict=True)]


def _stacked_mask(store: Store, key: str, job: Job) -> NDArray[np.uint8] | None:
    if not key or not job.masks:
        return None
    try:
        own = _mask_key(store, key, *job.masks[0], job, store.noted)
    except OSError:
        return None
    return None if store.facts(own).get("missing") else store.get(own, verify=False)
