"""What trains fastest on this centre's own machine: data type, memory format and threads, measured at its first round and remembered.

No rule holds everywhere: on a CPU with AMX bf16 halves the time of dense convolutions and lengthens depthwise ones, and channels-last likewise. So
with `stage.autotune=true` every pair takes a few steps of the real training on a real batch; then the best pair with fewer threads.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from client.data.dataset import ScanDataset, iterate_batches
from client.site.config import Site
from client.training.trainer import train
from common.config.compose import config_to_dict
from common.config.schema import Config, Precision, Stage, Task
from common.modeling.model import make_model
from common.utils.atomic_files import atomic_write

log = logging.getLogger("consilium.centre")


class RuntimeSettings(NamedTuple):
    """How to train; of several, the fastest."""

    precision: Precision
    channels_last: bool
    num_threads: int


def autotune(
    site: Site, config: Config, stage: Stage, tasks: Mapping[str, Task], scans: ScanDataset, folder: Path
) -> RuntimeSettings:
    """The fastest choice for this model, stage and machine: from `folder`/runtime.json, else measured now (some ten steps) and written there.

    `site.threads` is not questioned. Delete the file to have it measured again.
    """
    device = site.resolve_device()
    cores = len(os.sched_getaffinity(0))
    counts = [site.threads] if site.threads else sorted({1, max(1, cores // 2), cores}, reverse=True)
    asked = [
        config_to_dict(config)["backbone"],
        sorted(tasks),
        stage.batch_size,
        stage.grad_accum_steps,
        stage.grad_checkpointing,
        scans.slices[0].shape,
    ]
    machine = [
        torch.__version__,
        torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        counts,
    ]
    key = hashlib.sha256(json.dumps([asked, machine]).encode()).hexdigest()[:16]
    known = _read_measurements(folder / "runtime.json")
    if key not in known:
        times: dict[RuntimeSettings, float] = {}
        for precision in candidate_precisions(device):
            for channels_last in (True, False):
                times |= _measure_step(
                    RuntimeSettings(precision, channels_last, counts[0]), config, stage, tasks, scans, device
                )
        if not times:
            return RuntimeSettings(stage.precision, stage.channels_last, counts[0])
        best = min(times, key=lambda c: times[c])
        for fewer in counts[1:]:
            times |= _measure_step(best._replace(num_threads=fewer), config, stage, tasks, scans, device)
        known[key] = [*min(times, key=lambda c: times[c])]
        shown = (
            f"{c.precision}{' channels-last' * c.channels_last} {c.num_threads} threads {1000 * t:.0f} ms"
            for c, t in times.items()
        )
        log.info("a training step: %s", ", ".join(shown))
        folder.mkdir(parents=True, exist_ok=True)
        atomic_write(folder / "runtime.json", json.dumps(known, indent=1).encode())
    choice = RuntimeSettings(*known[key])
    log.info(
        "training in %s%s, %d threads",
        choice.precision,
        ", channels-last" * choice.channels_last,
        choice.num_threads,
    )
    return choice


@contextlib.contextmanager
def use_threads(num_threads: int) -> Iterator[None]:
    """PyTorch's thread count, 0 for its own choice; the same number gives the same bits."""
    before = torch.get_num_threads()
    if num_threads:
        torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def candidate_precisions(device: torch.device) -> list[Precision]:
    """Those worth a try: fp16 only on GPUs that know no bf16."""
    half: Precision = "bf16" if device.type != "cuda" or torch.cuda.is_bf16_supported() else "fp16"
    return ["fp32", half]


def _measure_step(
    choice: RuntimeSettings,
    config: Config,
    stage: Stage,
    tasks: Mapping[str, Task],
    scans: ScanDataset,
    device: torch.device,
) -> dict[RuntimeSettings, float]:
    """Seconds of a step, the shorter of two after one that warms up; nothing where it does not work at all."""
    trial = replace(stage, precision=choice.precision, channels_last=choice.channels_last)
    spent = []
    try:
        with use_threads(choice.num_threads):
            model = make_model(
                config.backbone, config.tasks, 0, trial.channels_last, trial.grad_checkpointing
            )
            batch = next(iterate_batches(scans, tasks, trial, 1, 0))
            for _ in range(3):
                began = time.perf_counter()
                train(model, [batch], trial, tasks, {}, device=device)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                spent.append(time.perf_counter() - began)
    except RuntimeError as error:
        log.warning(
            "%s%s does not run here: %s",
            choice.precision,
            " channels-last" * choice.channels_last,
            type(error).__name__,
        )
        return {}
    return {choice: min(spent[1:])}


def _read_measurements(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}  # none yet, or damaged: measured again
