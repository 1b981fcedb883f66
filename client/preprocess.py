"""From a cohort's scans to slices in the store, in several processes, computing only what is missing."""

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

from client.gather import Skipped
from client.readers import read_scan
from client.slices import slices_of
from client.store import Store
from common.errors import ConsiliumError
from common.schema import Preprocess

log = logging.getLogger(__name__)
KILLED = "the process that read it was killed, perhaps for lack of memory; read it on a machine with more, or remove it"


@dataclass(frozen=True)
class Job:
    """One scan to bring into the store."""

    path: Path
    window: tuple[float, float] | None
    series: str | None
    settings: Preprocess
    store: Path


def run_job(job: Job) -> tuple[str, str]:
    """(key, "") once the scan's slices are in the store, or ("", why it cannot be read)."""
    try:
        store = Store(job.store)
        key = store.key(job.path, job.settings, job.window, job.series)
        if store.get(key) is None:
            kept = slices_of(read_scan(job.path, job.series), job.settings, job.window)
            facts = {"indices": np.asarray(kept.indices).tolist(), "box": list(map(int, kept.box)), "notes": list(kept.notes)}
            if store.key(job.path, job.settings, job.window, job.series) != key:
                return "", "its files were changed while it was read; preprocess again once they are complete"
            store.put(key, kept.slices, facts)
        return key, ""
    except FileNotFoundError:
        return "", "it is not there"
    except ConsiliumError as error:
        return "", _nameless(str(error), job)
    except MemoryError:
        return "", KILLED
    except OSError as error:  # of the disk, not of the scan, when the store is full or read-only
        return "", f"it or the store cannot be used ({error.strerror or type(error).__name__})"
    except Exception as error:  # a reader's surprise is one scan's misfortune, not the cohort's
        return "", f"it cannot be read ({type(error).__name__})"


def _nameless(sentence: str, job: Job) -> str:
    """A reader's sentence with "it" for the scan's path and series: reasons are counted for the coordinator, paths hold names."""
    places = [str(place) for root in {job.path, job.path.resolve()} for place in (root, *(root.rglob("*") if root.is_dir() else ()))]
    for name in sorted([*places, *([job.series] if job.series else [])], key=len, reverse=True):
        sentence = sentence.replace(name, "it")
    return "it cannot be read; read it alone at the centre to see why" if os.sep in sentence else sentence


def _start() -> None:
    """One thread a worker: the processes are the parallelism."""
    cv2.setNumThreads(1)


def jobs_of(cohort: pd.DataFrame, base: Path, settings: Preprocess, store: Store) -> list[Job]:
    """One job a row."""
    jobs = []
    for row in cohort.to_dict("records"):
        window = (float(row.get("window_low", np.nan)), float(row.get("window_high", np.nan)))
        series = row.get("series")
        own = None if np.isnan(window).any() else window
        jobs.append(Job(Path(base) / str(row["path"]), own, series if isinstance(series, str) and series else None, settings, store.folder))
    return jobs


def preprocess(
    cohort: pd.DataFrame, base: Path, settings: Preprocess, store: Store, workers: int = 1, progress: bool = True
) -> tuple[list[str], list[Skipped]]:
    """Bring every scan's slices into the store; returns the key of each row ("" when it cannot be read) and what was skipped, and why.

    `base` is the folder that relative paths start from. Only what is missing is computed. With `workers` > 1, that many processes; one
    that is killed costs no scan but the one that killed it. Reasons hold no path and no identifier.
    """
    store.sweep()
    jobs = jobs_of(cohort, base, settings, store)
    keys, reasons = [""] * len(jobs), [""] * len(jobs)
    columns = (TextColumn("preprocess"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    bar: AbstractContextManager[Any] = Progress(*columns, console=Console(stderr=True)) if progress else nullcontext()
    with bar as shown:
        task = shown.add_task("", total=len(jobs)) if shown else None
        done = {row: key for row, job in enumerate(jobs) if (key := store.ready(job.path, job.settings, job.window, job.series))}
        for row, key in done.items():
            keys[row] = key
        if shown:
            shown.advance(task, len(done))
        missing = [row for row in range(len(jobs)) if row not in done]
        workers = min(workers, len(missing))
        for row, (key, reason) in _alone(jobs, missing) if workers <= 1 else _together(jobs, missing, workers, run_job):
            keys[row], reasons[row] = key, reason
            if shown:
                shown.advance(task)
    skipped = [Skipped(str(job.path), why) for job, key, why in zip(jobs, keys, reasons, strict=True) if not key]
    if skipped:  # how many; which ones and why is for the caller to show at the centre
        log.warning("%d of %d scans cannot be read and are left out", len(skipped), len(jobs))
    return keys, skipped


def _alone(jobs: Sequence[Job], rows: Sequence[int]) -> Iterator[tuple[int, tuple[str, str]]]:
    yield from ((row, run_job(jobs[row])) for row in rows)


def _together(
    jobs: Sequence[Job], rows: Sequence[int], workers: int, work: Callable[[Job], tuple[str, str]]
) -> Iterator[tuple[int, tuple[str, str]]]:
    """(row, outcome) as they come. When a worker dies, its pool goes with it: what was under way is tried again at the end, one scan at a
    time, so that only the one that kills is lost."""
    todo, suspects = deque(rows), deque[int]()
    while todo or suspects:
        queue, width = (todo, workers) if todo else (suspects, 1)
        with ProcessPoolExecutor(width, mp_context=multiprocessing.get_context("spawn"), initializer=_start) as pool:
            running: dict[Future[tuple[str, str]], int] = {}
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
            yield from ((row, ("", KILLED)) for row in lost)
        else:
            suspects.extend(lost)


def stack(store: Store, keys: Sequence[str]) -> list[NDArray[np.uint8]]:
    """The slices `[S, H, W]` of each key, memory-mapped. Raises ConsiliumError when some are gone since they were preprocessed."""
    found = [store.get(key, verify=False) for key in keys]
    gone = sum(slices is None for slices in found)
    if gone:
        raise ConsiliumError(f"{gone} of {len(keys)} preprocessed scans are no longer in the store; preprocess the cohort again")
    return [slices for slices in found if slices is not None]
