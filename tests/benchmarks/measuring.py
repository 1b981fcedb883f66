"""Clocks, memory and Markdown tables that several benchmarks share. Memory is read from Linux's /proc."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

SAMPLING_INTERVAL = 0.001  # s between two looks at the process's memory


@dataclass(frozen=True)
class Timing:
    """The seconds that a call took."""

    wall: float
    cpu: float  # user and system time of all threads of this process


def time_call(function: Callable[[], object]) -> Timing:
    """Call the function and measure how long it takes."""
    _, timing = time_result(function)
    return timing


def time_result(function: Callable[[], T]) -> tuple[T, Timing]:
    """Call the function; return its result, and how long it took."""
    wall_start = time.perf_counter()
    cpu_start = time.process_time()
    result = function()
    return result, Timing(wall=time.perf_counter() - wall_start, cpu=time.process_time() - cpu_start)


def read_memory(entry: str) -> int:
    """Bytes of this process under an entry of /proc/self/status, such as VmRSS, VmHWM or RssAnon."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{entry}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(entry)


def measure_peak_growth(function: Callable[[], object]) -> int:
    """Call the function; return the bytes that it adds to this process's peak memory.

    Linux counts the peak, and sets it back to the present on `clear_refs` 5.
    """
    Path("/proc/self/clear_refs").write_text("5")
    before = read_memory("VmRSS")
    function()
    return read_memory("VmHWM") - before


class AnonymousMemoryPeak:
    """The most anonymous memory (not a file's) that the process holds inside the `with`, beyond the start."""

    def __enter__(self) -> AnonymousMemoryPeak:
        gc.collect()  # what earlier measurements left
        self.start_bytes = read_memory("RssAnon")
        self.peak_bytes = 0
        self._is_over = False
        self._sampler = threading.Thread(target=self._sample)
        self._sampler.start()
        return self

    def _sample(self) -> None:
        while not self._is_over:
            self.peak_bytes = max(self.peak_bytes, read_memory("RssAnon") - self.start_bytes)
            time.sleep(SAMPLING_INTERVAL)

    def __exit__(self, *_: object) -> None:
        self._is_over = True
        self._sampler.join()


def format_row(cells: Sequence[object]) -> str:
    """A row of a Markdown table."""
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def format_header(titles: Sequence[str]) -> str:
    """The two lines with which a Markdown table begins."""
    return f"{format_row(titles)}\n{'|---' * len(titles)}|"
