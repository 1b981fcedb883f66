"""What privacy costs.

Time and memory of a step of `privacy=patient` against a plain one, the AUC on the phantom by epsilon, the
error of a reported AUC under `privacy.query_noise_multiplier`, and how loud `privacy=central` is.

    OMP_NUM_THREADS=1 .venv/bin/python -m tests.benchmarks.private [--steps | --auc | --figures] [--repeats
    15] [--scale .3] [--only epsilon]

A step is `client.training.trainer.train` on four patients of one scan of eight slices, on the same group-norm
model either way; plain and private take turns, and the ratio is that of the medians. Memory is the peak of a
process of its own less what it held before the step. The federations run in one process
(tests/in_process_federation.py); `none, group norm` shows what the change of architecture alone does.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from client.data.batch import Batch
from client.federation.noisy_counts import add_noise
from client.training.dp_sgd import DPParams
from client.training.trainer import TrainSpec, train
from common.config.compose import compose_config
from common.config.schema import BackboneConfig, Stage, Task
from common.learning.metrics import compute_binary_metrics, compute_score_histogram
from common.modeling.model import Model, make_model
from common.privacy.accountant import compute_epsilon, solve_noise_multiplier
from server.rounds.run_lifecycle import open_ledger, start_run
from tests.benchmarks import real_ct
from tests.in_process_federation import InProcess, sites

MODELS = [
    ("test_efficientnet", 64), ("test_efficientnet", 96), ("test_efficientnet", 224),
    ("resnet10t", 64), ("resnet10t", 96), ("resnet10t", 224),
    ("mobilenetv3_small_100", 64), ("mobilenetv3_small_100", 96), ("mobilenetv3_small_100", 224),
]  # fmt: skip
TASKS = {"covid": Task()}
STAGE = Stage(batch_size=4)


def made(backbone: str, size: int) -> tuple[Model, Batch]:
    """A model with group norms, and four scans."""
    rng = np.random.default_rng(1)
    slices = torch.from_numpy(rng.integers(0, 256, (4, 8, size, size), dtype=np.uint8))
    return make_model(BackboneConfig(backbone, norm="group"), TASKS, 1, channels_last=True), Batch(
        slices, {"covid": torch.tensor([0.0, 1, 1, 0])}
    )


def step(model: Model, batch: Batch, private: bool) -> None:
    if private:
        patients = {str(i): one for i, one in enumerate(batch.split_into(4))}
        train(model, [patients], TrainSpec(STAGE, TASKS, dp_params=DPParams(1.0, 1.0, 4.0)))
    else:
        train(model, [batch], TrainSpec(STAGE, TASKS))


def peak(backbone: str, size: int, private: bool) -> int:
    """Bytes that a step adds to the peak of this process (Linux counts it, and sets it back to the present on
    `clear_refs` 5).
    """
    torch.set_num_threads(1)
    model, batch = made(backbone, size)
    step(*made(backbone, 32), private)  # libraries are loaded
    Path("/proc/self/clear_refs").write_text("5")
    status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    step(model, batch, private)
    after = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * (int(after["VmHWM"].split()[0]) - int(status["VmRSS"].split()[0]))


def steps(repeats: int) -> None:
    print(
        f"{'backbone':24} {'px':>4} {'plain, ms':>10} {'private':>8} {'ratio':>6} {'plain, MB':>10} "
        f"{'private':>8} {'ratio':>6}"
    )
    fresh = multiprocessing.get_context("spawn")
    for backbone, size in MODELS:
        model, batch = made(backbone, size)
        taken: dict[bool, list[float]] = {False: [], True: []}
        for repeat in range(repeats + 1):  # the first is not counted
            for private in (False, True):
                began = time.perf_counter()
                step(model, batch, private)
                if repeat:
                    taken[private].append(1000 * (time.perf_counter() - began))
        plain, private_ = (statistics.median(taken[p]) for p in (False, True))
        with fresh.Pool(1, maxtasksperchild=1) as pool:
            memory = pool.starmap(peak, [(backbone, size, p) for p in (False, True)], chunksize=1)
        print(
            f"{backbone:24} {size:4} {plain:10.0f} {private_:8.0f} {private_ / plain:6.2f} "
            f"{memory[0] / 1e6:10.0f} {memory[1] / 1e6:8.0f} {memory[1] / max(memory[0], 1):6.2f}",
            flush=True,
        )


def figures() -> None:
    """How far a centre's reported AUC is off for the noise on its histogram, and the noise of `central`
    beside the clip: no training.
    """
    rng, config = (
        np.random.default_rng(1),
        compose_config(["privacy=patient", "privacy.query_noise_multiplier=1", "stage.tasks=[covid]"]),
    )
    print(
        "scans  bins  privacy.query_noise_multiplier  epsilon of 11 answers  true AUC  reported, mean "
        "and standard deviation"
    )
    for n, bins, noise in itertools.product((100, 1000, 10_000), (16, 256), (5.0, 15.0)):
        y = np.arange(n) % 2
        found, exact = [], []
        for _ in range(50):
            hist = compute_score_histogram(rng.normal(1.8 * y, 1.0) - 0.9, y.astype(float), bins)
            private = replace(config, privacy=replace(config.privacy, query_noise_multiplier=noise))
            found.append(
                compute_binary_metrics(
                    add_noise({"a/covid/hist": hist}, private, "scores", 1)["a/covid/hist"]
                )["auc"]
                or np.nan
            )
            exact.append(compute_binary_metrics(hist)["auc"])
        cost = compute_epsilon(((noise, 1.0, 11),), 1e-5)
        print(
            f"{n:5} {bins:5} {noise:10.0f} {cost:12.2f} {np.mean(exact):16.3f} {np.nanmean(found):12.3f} "
            f"± {np.nanstd(found):.3f}"
        )
    print(
        "\ncentres  epsilon  rounds  values  noise multiplier  norm of a round's noise, as a multiple of "
        "the clip"
    )
    for centres, target, values in itertools.product((4, 30, 1000), (8.0, 50.0), (380_000, 1_000)):
        noise = solve_noise_multiplier(target, 1e-5, ((1.0, 8),))
        print(
            f"{centres:7} {target:8.0f} {8:7} {values:8} {noise:12.2f} {noise / centres * values**0.5:16.2f}"
        )


def federation_of(data: str, folder: Path, scale: float) -> list[str]:
    """Overrides.

    Made-up hospitals, or the three real sources (real_ct.py), either way from ImageNet weights.
    """
    weights = [f"backbone.weights={real_ct.data_folder()}/weights/mobilenetv1_075_tfjs_imagenet.pth"]
    if data == "phantom":
        small = [
            "backbone=mobilenetv1_075",
            "preprocess.image_size=64",
            f"federation.phantom.scale={scale}",
            f"federation.data_root={folder}/data",
        ]
        return [*small, *weights, "evaluation.checkpoint_selection=last", "stage.local_steps_mode=equal"]
    return [
        *real_ct.BASE,
        *weights,
        f"federation.data_root={real_ct.prepared(real_ct.data_folder(), folder)}",
    ]


def auc(data: str, scale: float, seeds: int, only: str, more: list[str]) -> None:
    """Test AUC by epsilon.

    `more` comes last, and so says how: the whole network, or a head on a frozen one.
    """
    settings = {"none": ["backbone.norm=frozen"], "none, batch norm": []}
    settings |= {
        f"epsilon {e}": ["privacy=patient", f"privacy.epsilon={e}", "backbone.norm=frozen"] for e in (8, 3, 1)
    }
    with tempfile.TemporaryDirectory() as folder:
        base, runs = federation_of(data, Path(folder), scale), Path(folder) / "runs"
        print(f"{'':18} {'val.':>6} {'macro':>6} {'worst':>6}  epsilon spent  CPU seconds")
        for name, own in ((name, own) for name, own in settings.items() if only in name):
            for seed in range(1, seeds + 1):
                config = compose_config([*base, "stage.tasks=[covid]", *own, *more, f"seed={seed}"])
                for book in Path(folder).glob("**/.consilium/budget/*"):
                    book.unlink()  # so that what is said is this run's
                began = time.process_time()
                federation = InProcess(sites(len(config.federation.centres)))
                result = start_run(
                    config,
                    federation,
                    runs,
                    open_ledger(runs),
                    f"{name.replace(' ', '-').replace(',', '')}-{seed}",
                )
                scores, last = result.test["covid"], result.stages[-1].rounds[-1]
                spent = [centre.epsilon for centre in last.centres.values() if centre.epsilon is not None]
                said = f"{min(spent):.2f} to {max(spent):.2f}" if spent else "–"
                print(
                    f"{name:18} {last.validation['covid'].macro['auc']:6.3f} {scores.macro['auc']:6.3f} "
                    f"{scores.worst['auc'].value:6.3f}  "
                    f"{said:14} {time.process_time() - began:6.0f}  seed {seed}  "
                    + "  ".join(f"{c} {one.metrics['auc']:.3f}" for c, one in scores.centres.items()),
                    flush=True,
                )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", action="store_true")
    parser.add_argument("--auc", action="store_true")
    parser.add_argument("--figures", action="store_true")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument(
        "--data", choices=["phantom", "ct_multisource"], default="phantom", help="of the federations"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="of the phantom")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument(
        "--only", default="", help="of the federations: those with this in their name, e.g. epsilon"
    )
    given, more = parser.parse_known_args()  # more: overrides of the federations, e.g. stage.batch_size=32
    torch.set_num_threads(1)
    every = not (given.steps or given.auc or given.figures)
    if given.figures or every:
        figures()
    if given.steps or every:
        steps(given.repeats)
    if given.auc or every:
        auc(given.data, given.scale, given.seeds, given.only, more)


if __name__ == "__main__":
    main()
