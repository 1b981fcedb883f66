"""A training step of ours against the paper's own model class and loop, interleaved in one process.

Images a CPU-second, and their ratio.

    git clone https://github.com/Purdue-M2/multisource-covid-ct PEER
    .venv/bin/python -m tests.benchmarks.training --peer PEER [--backbones resnet18:224,tf_efficientnet_b0:64]
    [--repeats 7] [--threads 1]

Theirs: eight passes of the backbone, one a slice, in the data type and memory format of its code (on a CPU
fp32), on slices ready in memory. Ours: client/training/trainer.py, its augmentation included, with what
`stage.autotune=true` chooses. Weights are random: only time is looked at.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import timm
import torch
from torch.utils.data import DataLoader, TensorDataset

from client.data.dataset import ScanDataset, iterate_batches
from client.site.config import Site
from client.training.autotune import autotune
from client.training.trainer import TrainSpec, train
from common.config.compose import compose_config
from common.modeling.model import make_model
from common.utils.errors import ConsiliumError

SCANS, SLICES = 4, 8


def peers(folder: Path, name: str) -> ModuleType:
    """A module of the peer's package, on its own.

    Its package wants albumentations. Raises ConsiliumError where it is not there.
    """
    path = folder / "source code" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"peer_{name}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ConsiliumError(
            f"{path} is not there; give --peer a clone of github.com/Purdue-M2/multisource-covid-ct"
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def their_step(folder: Path, backbone: str, size: int) -> Callable[[], object]:
    """One batch through the peer's `train_one_epoch`."""
    model, engine, losses = (peers(folder, name) for name in ("model", "engine", "losses"))
    model.timm = SimpleNamespace(
        create_model=lambda _, pretrained, num_classes: timm.create_model(backbone, num_classes=num_classes)
    )
    network = model.MultiTaskEfficientNet(pretrained=False, num_sources=4)
    covid, source = losses.build_criteria([0.25] * 4, "cpu")
    slices = torch.rand(SCANS, SLICES, 1, size, size).expand(-1, -1, 3, -1, -1).contiguous()
    loader = DataLoader(
        TensorDataset(slices, torch.tensor([0.0, 1.0] * (SCANS // 2)), torch.arange(SCANS) % 4),
        batch_size=SCANS,
    )
    engine.tqdm = lambda batches, **_: batches
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-4, weight_decay=5e-4)
    scaler = torch.cuda.amp.GradScaler()
    return lambda: engine.train_one_epoch(network, loader, optimiser, covid, source, scaler, "cpu", 0.5)


def our_step(backbone: str, size: int, threads: int) -> tuple[Callable[[], object], str]:
    """One batch through our `train`, and what was chosen for it."""
    config = compose_config(
        [
            "federation=folder",
            "federation.centres=[a,b,c,d]",
            f"backbone.name={backbone}",
            f"preprocess.image_size={size}",
            f"stage.batch_size={SCANS}",
            "stage.optimiser.name=adam",
            "tasks.source.classes=[a,b,c,d]",
            "tasks.source.head_update=local",
        ]
    )
    stage, tasks = config.stages["main"], config.tasks
    pictures = [
        np.random.default_rng(k).integers(0, 256, (SLICES, size, size), dtype=np.uint8) for k in range(SCANS)
    ]
    targets = {"covid": np.array([0.0, 1.0] * (SCANS // 2)), "source": np.arange(SCANS) % 4.0}
    scans = ScanDataset(pictures, targets, ["a"] * SCANS)
    with tempfile.TemporaryDirectory() as folder:
        choice = autotune(
            Site(centre="a", device="cpu", threads=threads), config, stage, tasks, scans, Path(folder)
        )
    stage = replace(stage, precision=choice.precision, channels_last=choice.channels_last)
    model = make_model(config.backbone, tasks, 1, stage.channels_last)
    (batch,) = iterate_batches(scans, tasks, stage, 1, 0)
    return lambda: train(
        model, [batch], TrainSpec(stage, tasks)
    ), f"{choice.precision}{', channels-last' * choice.channels_last}"


def cpu_seconds(step: Callable[[], object]) -> float:
    """CPU-seconds of all threads."""
    began = time.process_time()
    step()
    return time.process_time() - began


def main() -> None:
    """The command; see the module docstring."""
    parser = argparse.ArgumentParser(description="A training step against the multi-source paper's.")
    parser.add_argument(
        "--peer", type=Path, required=True, help="clone of github.com/Purdue-M2/multisource-covid-ct"
    )
    parser.add_argument(
        "--backbones", default="test_resnet:96,resnet10t:64,resnet18:128,resnet18:224,tf_efficientnet_b0:64"
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    warnings.filterwarnings("ignore")  # the peer's loop asks for CUDA's autocast
    torch.set_num_threads(given.threads)
    images = SCANS * SLICES
    print(f"| backbone:pixels | theirs, images a CPU-second | ours | ours in | ratio |\n{'|---' * 5}|")
    for named in given.backbones.split(","):
        backbone, size = named.split(":")
        theirs, (ours, chosen) = (
            their_step(given.peer, backbone, int(size)),
            our_step(backbone, int(size), given.threads),
        )
        theirs(), ours()
        pairs = [(cpu_seconds(theirs), cpu_seconds(ours)) for _ in range(given.repeats)]
        a, b = (statistics.median(p[k] for p in pairs) for k in (0, 1))
        ratio = statistics.median(p[0] / p[1] for p in pairs)
        print(f"| {named} | {images / a:.0f} | {images / b:.0f} | {chosen} | {ratio:.1f} |", flush=True)


if __name__ == "__main__":
    try:
        main()
    except ConsiliumError as error:
        sys.exit(f"error: {error}")
