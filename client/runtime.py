"""What trains fastest on this centre's own machine: data type, memory format and threads, measured at its first round and remembered.

No rule holds everywhere: on a CPU with AMX bf16 halves the time of dense convolutions and lengthens depthwise ones, and channels-last likewise. So
with `stage.runtime=auto` every pair takes a few steps of the real training on a real batch; then the best pair with fewer threads.
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

from client.dataset import Scans, batches
from client.site import Site
from client.trainer import train
from common.compose import to_dict
from common.files import write_whole
from common.model import make_model
from common.schema import Config, Precision, Stage, Task

log = logging.getLogger("consilium.centre")


class Choice(NamedTuple):
    """How to train; of several, the fastest."""

    precision: Precision
    channels_last: bool
    threads: int


def fastest(site: Site, config: Config, stage: Stage, tasks: Mapping[str, Task], scans: Scans, folder: Path) -> Choice:
    """The fastest choice for this model, stage and machine: from `folder`/runtime.json, else measured now (some ten steps) and written there.

    `site.threads` is not questioned. Delete the file to have it measured again.
    """
    device = site.torch_device()
    cores = len(os.sched_getaffinity(0))
    counts = [site.threads] if site.threads else sorted({1, max(1, cores // 2), cores}, reverse=True)
    asked = [to_dict(config)["backbone"], sorted(tasks), stage.batch, stage.accumulate, stage.checkpointing, scans.slices[0].shape]
    machine = [torch.__version__, torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu", counts]
    key = hashlib.sha256(json.dumps([asked, machine]).encode()).hexdigest()[:16]
    known = _known(folder / "runtime.json")
    if key not in known:
        times: dict[Choice, float] = {}
        for precision in precisions(device):
            for channels_last in (True, False):
                times |= _timed(Choice(precision, channels_last, counts[0]), config, stage, tasks, scans, device)
        if not times:
            return Choice(stage.precision, stage.channels_last, counts[0])
        best = min(times, key=lambda c: times[c])
        for fewer in counts[1:]:
            times |= _timed(best._replace(threads=fewer), config, stage, tasks, scans, device)
        known[key] = [*min(times, key=lambda c: times[c])]
        shown = (f"{c.precision}{' channels-last' * c.channels_last} {c.threads} threads {1000 * t:.0f} ms" for c, t in times.items())
        log.info("a training step: %s", ", ".join(shown))
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(folder / "runtime.json", json.dumps(known, indent=1).encode())
    choice = Choice(*known[key])
    log.info("training in %s%s, %d threads", choice.precision, ", channels-last" * choice.channels_last, choice.threads)
    return choice


@contextlib.contextmanager
def threads(wanted: int) -> Iterator[None]:
    """PyTorch's thread count, 0 for its own choice; the same number gives the same bits."""
    before = torch.get_num_threads()
    if wanted:
        torch.set_num_threads(wanted)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def precisions(device: torch.device) -> list[Precision]:
    """Those worth a try: fp16 only on GPUs that know no bf16."""
    half: Precision = "bf16" if device.type != "cuda" or torch.cuda.is_bf16_supported() else "fp16"
    return ["fp32", half]


def _timed(
    choice: Choice, config: Config, stage: Stage, tasks: Mapping[str, Task], scans: Scans, device: torch.device
) -> dict[Choice, float]:
    """Seconds of a step, the shorter of two after one that warms up; nothing where it does not work at all."""
    trial = replace(stage, precision=choice.precision, channels_last=choice.channels_last)
    spent = []
    try:
        with threads(choice.threads):
            model = make_model(config.backbone, config.tasks, 0, trial.channels_last, trial.checkpointing)
            batch = next(batches(scans, tasks, trial, 1, 0))
            for _ in range(3):
                began = time.perf_counter()
                train(model, [batch], trial, tasks, {}, device=device)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                spent.append(time.perf_counter() - began)
    except RuntimeError as error:
        log.warning("%s%s does not run here: %s", choice.precision, " channels-last" * choice.channels_last, type(error).__name__)
        return {}
    return {choice: min(spent[1:])}


def _known(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        return {}  # none yet, or damaged: measured again
