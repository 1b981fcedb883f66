"""Preprocessing jobs run one after another, or in several processes of which any may be killed."""

from __future__ import annotations

import multiprocessing
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

import cv2

from client.imaging.failure_reasons import KILLED_REASON
from client.imaging.job_execution import run_job
from client.imaging.jobs import JobOutcome, PreprocessJob
from common.utils.error_reports import withhold_texts


def run_jobs(
    jobs: Sequence[PreprocessJob], rows: Sequence[int], num_workers: int
) -> Iterator[tuple[int, JobOutcome]]:
    """Yield (row, outcome) of the jobs in `rows` as they end; with more than one worker, in processes."""
    if num_workers > 1:
        yield from run_in_pool(jobs, rows, num_workers, run_job)
        return
    for row in rows:
        yield row, run_job(jobs[row])


def run_in_pool(
    jobs: Sequence[PreprocessJob],
    rows: Sequence[int],
    num_workers: int,
    work: Callable[[PreprocessJob], JobOutcome],
) -> Iterator[tuple[int, JobOutcome]]:
    """Yield (row, outcome) of the jobs in `rows` as they end, in `num_workers` processes.

    A worker that is killed (for lack of memory, say) takes its pool with it. The scans under way are then
    tried again at the end, one at a time, so that only the one that kills its worker is lost.
    """
    remaining = deque(rows)
    suspects: deque[int] = deque()
    while remaining:
        suspects += yield from _run_until_killed(jobs, remaining, num_workers, work)
    while suspects:
        killers = yield from _run_until_killed(jobs, suspects, 1, work)
        for row in killers:
            yield row, JobOutcome("", KILLED_REASON, [])


def _run_until_killed(
    jobs: Sequence[PreprocessJob],
    queue: deque[int],
    num_workers: int,
    work: Callable[[PreprocessJob], JobOutcome],
) -> Generator[tuple[int, JobOutcome], None, list[int]]:
    """Run the queue in one pool until it is empty or a worker dies; return the rows that this cost."""
    interrupted: list[int] = []
    running: dict[Future[JobOutcome], int] = {}
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(num_workers, mp_context=spawn, initializer=_prepare_worker) as pool:
        while (queue and not interrupted) or running:
            while queue and not interrupted and len(running) < num_workers:
                row = queue.popleft()
                try:
                    running[pool.submit(work, jobs[row])] = row
                except BrokenProcessPool:
                    interrupted.append(row)
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                row = running.pop(future)
                try:
                    yield row, future.result()
                except BrokenProcessPool:
                    interrupted.append(row)
    return interrupted


def _prepare_worker() -> None:
    """Withhold texts about scans, and keep OpenCV to one thread: the processes are the parallelism."""
    withhold_texts()
    cv2.setNumThreads(1)
