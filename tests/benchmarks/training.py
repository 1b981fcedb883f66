"""Compare a training step with the multi-source paper's own model class and loop, in one process.

    git clone https://github.com/Purdue-M2/multisource-covid-ct PEER
    .venv/bin/python -m tests.benchmarks.training --peer PEER [--backbones resnet18:224,tf_efficientnet_b0:64]
    [--repeats 7] [--threads 1]

Prints images a CPU-second of both, which take turns, and their ratio. Theirs: eight passes of the backbone,
one a slice, in the data type and memory format of their code (on a CPU fp32), on slices ready in memory.
Ours: client/training/trainer.py with its augmentation, in what `stage.autotune=auto` chooses. Weights are
random, because only time is measured.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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
from tests.benchmarks.measuring import format_header, format_row, time_call

SCANS = 4
SLICES = 8
COVID_LABELS = [0.0, 1.0] * (SCANS // 2)
DEFAULT_BACKBONES = "test_resnet:96,resnet10t:64,resnet18:128,resnet18:224,tf_efficientnet_b0:64"
Step = Callable[[], object]


def load_peer_module(folder: Path, name: str) -> Any:
    """Load a module of the peer's package alone, because the package itself needs albumentations.

    Raises ConsiliumError if the folder is no clone of it.
    """
    path = folder / "source code" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"peer_{name}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ConsiliumError(
            f"{path} does not exist; give --peer a clone of github.com/Purdue-M2/multisource-covid-ct"
        )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make_peer_step(folder: Path, backbone: str, size: int) -> Step:
    """One batch through the peer's `train_one_epoch`."""
    model_module = load_peer_module(folder, "model")
    engine = load_peer_module(folder, "engine")
    losses = load_peer_module(folder, "losses")

    def create_backbone(_: str, pretrained: bool, num_classes: int) -> torch.nn.Module:
        return timm.create_model(backbone, num_classes=num_classes)

    model_module.timm = SimpleNamespace(create_model=create_backbone)
    engine.tqdm = lambda batches, **_: batches
    network = model_module.MultiTaskEfficientNet(pretrained=False, num_sources=4)
    covid_loss, source_loss = losses.build_criteria([0.25] * 4, "cpu")
    slices = torch.rand(SCANS, SLICES, 1, size, size).expand(-1, -1, 3, -1, -1).contiguous()
    dataset = TensorDataset(slices, torch.tensor(COVID_LABELS), torch.arange(SCANS) % 4)
    loader = DataLoader(dataset, batch_size=SCANS)
    optimiser = torch.optim.Adam(network.parameters(), lr=1e-4, weight_decay=5e-4)
    scaler = torch.cuda.amp.GradScaler()
    return lambda: engine.train_one_epoch(
        network, loader, optimiser, covid_loss, source_loss, scaler, "cpu", 0.5
    )


def draw_scans(size: int) -> ScanDataset:
    slices = []
    for seed in range(SCANS):
        rng = np.random.default_rng(seed)
        slices.append(rng.integers(0, 256, (SLICES, size, size), dtype=np.uint8))
    targets = {"covid": np.array(COVID_LABELS), "source": np.arange(SCANS) % 4.0}
    return ScanDataset(slices, targets, ["a"] * SCANS)


def make_our_step(backbone: str, size: int, threads: int) -> tuple[Step, str]:
    """One batch through our `train`, and the settings that were measured to be fastest for it."""
    overrides = [
        "federation=folder",
        "federation.centres=[a,b,c,d]",
        f"backbone.name={backbone}",
        f"preprocess.image_size={size}",
        f"stage.batch_size={SCANS}",
        "stage.optimiser.name=adam",
        "tasks.source.classes=[a,b,c,d]",
        "tasks.source.head_update=local",
    ]
    config = compose_config(overrides)
    tasks = config.tasks
    scans = draw_scans(size)
    site = Site(centre="a", device="cpu", threads=threads)
    with tempfile.TemporaryDirectory() as folder:
        settings = autotune(site, config, config.stages["main"], tasks, scans, Path(folder))
    stage = replace(config.stages["main"], precision=settings.precision, channels_last=settings.channels_last)
    model = make_model(config.backbone, tasks, 1, stage.channels_last)
    (batch,) = iterate_batches(scans, tasks, stage, 1, 0)
    description: str = settings.precision
    if settings.channels_last:
        description = f"{settings.precision}, channels-last"
    return lambda: train(model, [batch], TrainSpec(stage, tasks)), description


def compare_steps(peer_step: Step, our_step: Step, repeats: int) -> tuple[np.ndarray, np.ndarray]:
    """The CPU-seconds [repeats] of each, in turns; a first step of each is not counted."""
    peer_step()
    our_step()
    peer_seconds = np.empty(repeats)
    our_seconds = np.empty(repeats)
    for repeat in range(repeats):
        peer_seconds[repeat] = time_call(peer_step).cpu
        our_seconds[repeat] = time_call(our_step).cpu
    return peer_seconds, our_seconds


def main() -> None:
    """Run the command that the module's docstring describes."""
    parser = argparse.ArgumentParser(description="A training step against the multi-source paper's.")
    peer_help = "clone of github.com/Purdue-M2/multisource-covid-ct"
    parser.add_argument("--peer", type=Path, required=True, help=peer_help)
    parser.add_argument("--backbones", default=DEFAULT_BACKBONES, help="backbone:pixels, comma-separated")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")  # the peer's loop asks for CUDA's autocast
    torch.set_num_threads(arguments.threads)
    images = SCANS * SLICES
    titles = ["backbone:pixels", "theirs, images a CPU-second", "ours", "ours in", "ratio"]
    print(format_header(titles))
    for backbone_and_size in arguments.backbones.split(","):
        backbone, size = backbone_and_size.split(":")
        peer_step = make_peer_step(arguments.peer, backbone, int(size))
        our_step, settings = make_our_step(backbone, int(size), arguments.threads)
        peer_seconds, our_seconds = compare_steps(peer_step, our_step, arguments.repeats)
        peer_rate = f"{images / np.median(peer_seconds):.0f}"
        our_rate = f"{images / np.median(our_seconds):.0f}"
        ratio = f"{np.median(peer_seconds / our_seconds):.1f}"
        print(format_row([backbone_and_size, peer_rate, our_rate, settings, ratio]), flush=True)


if __name__ == "__main__":
    try:
        main()
    except ConsiliumError as error:
        sys.exit(f"error: {error}")
