"""Measure which data type, memory format and thread count train fastest on this machine, and remember it.

No rule holds everywhere: on a CPU with AMX, bf16 halves the time of dense convolutions and lengthens
depthwise ones, and so does channels-last. With `stage.autotune=true` every pair of data type and memory
format takes a few steps of the real training on a real batch; then the fastest pair is tried with fewer
threads.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from client.data.dataset import ScanDataset, iterate_batches
from client.site.config import Site
from client.training.trainer import TrainSpec, train
from common.config.parse import config_to_dict
from common.config.schema import Config, Precision, Stage, Task
from common.modeling.model import make_model
from common.utils.atomic_files import atomic_write

log = logging.getLogger("consilium.centre")
MEASUREMENTS_FILENAME = "runtime.json"


class RuntimeSettings(NamedTuple):
    """How to compute a training step."""

    precision: Precision
    channels_last: bool
    num_threads: int

    def __str__(self) -> str:
        """Describe the settings in words."""
        memory_format = ""
        if self.channels_last:
            memory_format = " channels-last"
        return f"{self.precision}{memory_format} {self.num_threads} threads"


@dataclass(frozen=True)
class TrainingSample:
    """The training whose steps are measured."""

    config: Config
    stage: Stage
    tasks: Mapping[str, Task]
    scans: ScanDataset
    device: torch.device


def autotune(
    site: Site, config: Config, stage: Stage, tasks: Mapping[str, Task], scans: ScanDataset, folder: Path
) -> RuntimeSettings:
    """Return the fastest settings for this model, stage and machine.

    They come from `folder`/runtime.json, or are measured now in some ten steps and written there; delete the
    file to have them measured again. A thread count set in site.yaml is not changed.
    """
    sample = TrainingSample(config, stage, tasks, scans, site.resolve_device())
    thread_counts = _candidate_thread_counts(site)
    key = _measurement_key(sample, thread_counts)
    path = folder / MEASUREMENTS_FILENAME
    measurements = _read_measurements(path)
    if key not in measurements:
        fastest = _find_fastest(sample, thread_counts)
        if fastest is None:
            return RuntimeSettings(stage.precision, stage.channels_last, thread_counts[0])
        measurements[key] = list(fastest)
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(measurements, indent=1).encode())
    settings = RuntimeSettings(*measurements[key])
    log.info("training in %s", settings)
    return settings


def _candidate_thread_counts(site: Site) -> list[int]:
    """List the thread counts worth trying, the largest first."""
    if site.threads:
        return [site.threads]
    cores = len(os.sched_getaffinity(0))
    return sorted({1, max(1, cores // 2), cores}, reverse=True)


def _measurement_key(sample: TrainingSample, thread_counts: Sequence[int]) -> str:
    """Hash what the speed depends on: model, tasks, batch and machine."""
    stage = sample.stage
    workload = [
        config_to_dict(sample.config)["backbone"],
        sorted(sample.tasks),
        stage.batch_size,
        stage.grad_accum_steps,
        stage.grad_checkpointing,
        sample.scans.slices[0].shape,
    ]
    processor = "cpu"
    if sample.device.type == "cuda":
        processor = torch.cuda.get_device_name(sample.device)
    machine = [torch.__version__, processor, thread_counts]
    return hashlib.sha256(json.dumps([workload, machine]).encode()).hexdigest()[:16]


def _find_fastest(sample: TrainingSample, thread_counts: Sequence[int]) -> RuntimeSettings | None:
    """Measure every pair of data type and memory format, then the fastest pair with fewer threads.

    Returns None when no settings run here.
    """
    seconds: dict[RuntimeSettings, float] = {}
    for precision in candidate_precisions(sample.device):
        for channels_last in (True, False):
            settings = RuntimeSettings(precision, channels_last, thread_counts[0])
            seconds |= _measure_step(settings, sample)
    if not seconds:
        return None
    fastest = min(seconds, key=seconds.__getitem__)
    for num_threads in thread_counts[1:]:
        seconds |= _measure_step(fastest._replace(num_threads=num_threads), sample)
    for settings, step_seconds in seconds.items():
        log.info("a training step in %s takes %.0f ms", settings, 1000 * step_seconds)
    return min(seconds, key=seconds.__getitem__)


@contextlib.contextmanager
def use_threads(num_threads: int) -> Iterator[None]:
    """Set PyTorch's thread count within the block; 0 keeps it. The same number gives the same bits."""
    threads_before = torch.get_num_threads()
    if num_threads:
        torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads_before)


def candidate_precisions(device: torch.device) -> list[Precision]:
    """List the data types worth trying: fp16 only on GPUs that lack bf16."""
    if device.type == "cuda" and not torch.cuda.is_bf16_supported():
        return ["fp32", "fp16"]
    return ["fp32", "bf16"]


def _measure_step(settings: RuntimeSettings, sample: TrainingSample) -> dict[RuntimeSettings, float]:
    """Measure the seconds of a step: the shorter of two after a warm-up step.

    Returns {settings: seconds}, empty when these settings do not run here.
    """
    stage = replace(sample.stage, precision=settings.precision, channels_last=settings.channels_last)
    spec = TrainSpec(stage, sample.tasks, device=sample.device)
    seconds: list[float] = []
    try:
        with use_threads(settings.num_threads):
            model = make_model(
                sample.config.backbone, sample.config.tasks, 0, stage.channels_last, stage.grad_checkpointing
            )
            batch = next(iterate_batches(sample.scans, sample.tasks, stage, 1, 0))
            for _ in range(3):
                start = time.perf_counter()
                train(model, [batch], spec)
                if sample.device.type == "cuda":
                    torch.cuda.synchronize(sample.device)
                seconds.append(time.perf_counter() - start)
    except RuntimeError as error:
        log.warning("training in %s does not run on this machine (%s)", settings, type(error).__name__)
        return {}
    return {settings: min(seconds[1:])}


def _read_measurements(path: Path) -> dict[str, Any]:
    """Read earlier measurements; none when the file is missing or damaged, so that they are repeated."""
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}
