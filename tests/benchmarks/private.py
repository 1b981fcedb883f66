"""Measure what privacy costs: time, memory, accuracy.

    OMP_NUM_THREADS=1 .venv/bin/python -m tests.benchmarks.private [--steps | --auc | --figures] [--repeats
    15] [--data phantom|ct_multisource] [--scale .3] [--seeds 1] [--only epsilon] [overrides ...]

--steps: time and memory of a step of `privacy=patient` against a plain one, on the same group-norm model with
four patients of one scan of eight slices; the two take turns, and the ratio is that of the medians. Memory is
the peak of a process of its own less what it held before the step. --auc: test AUC by epsilon, of federations
in one process (tests/in_process_federation.py). --figures: the error of a reported AUC under
`privacy.query_noise_multiplier`, and how loud `privacy=central` is. Without any of them, all three.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import torch

from client.data.batch import Batch
from client.federation.noisy_counts import add_score_noise
from client.training.dp_sgd import DPParams
from client.training.trainer import TrainSpec, train
from common.config.compose import compose_config
from common.config.schema import BackboneConfig, Config, Stage, Task
from common.learning.metrics import compute_binary_metrics, compute_score_histogram
from common.modeling.model import Model, make_model
from common.privacy.accountant import compute_epsilon, solve_noise_multiplier
from common.protocol.sum_key import SumKey
from server.rounds.run_lifecycle import open_ledger, start_run
from server.run.records import RunResult
from tests.benchmarks import real_ct_data
from tests.benchmarks.measuring import measure_peak_growth, time_call, time_result
from tests.benchmarks.real_ct_settings import BASE
from tests.in_process_federation import InProcess, sites

MODELS = list(itertools.product(("test_efficientnet", "resnet10t", "mobilenetv3_small_100"), (64, 96, 224)))
TASKS = {"covid": Task()}
STAGE = Stage(batch_size=4)
DELTA = 1e-5


# --- steps


def make_model_and_batch(backbone: str, size: int) -> tuple[Model, Batch]:
    """A model with group norms, and four scans."""
    rng = np.random.default_rng(1)
    slices = torch.from_numpy(rng.integers(0, 256, (4, 8, size, size), dtype=np.uint8))
    model = make_model(BackboneConfig(backbone, norm="group"), TASKS, 1, channels_last=True)
    return model, Batch(slices, {"covid": torch.tensor([0.0, 1, 1, 0])})


def train_step(model: Model, batch: Batch, is_private: bool) -> None:
    if not is_private:
        train(model, [batch], TrainSpec(STAGE, TASKS))
        return
    patients = {str(number): scan for number, scan in enumerate(batch.split_into(4))}
    train(model, [patients], TrainSpec(STAGE, TASKS, dp_params=DPParams(1.0, 1.0, 4.0)))


def measure_step_memory(backbone: str, size: int, is_private: bool) -> int:
    """The bytes that a step adds to the peak of this process."""
    torch.set_num_threads(1)
    model, batch = make_model_and_batch(backbone, size)
    train_step(*make_model_and_batch(backbone, 32), is_private)  # libraries are loaded
    return measure_peak_growth(partial(train_step, model, batch, is_private))


def measure_step_time(backbone: str, size: int, repeats: int) -> tuple[float, float]:
    """The median milliseconds of a plain and of a private step."""
    model, batch = make_model_and_batch(backbone, size)
    milliseconds: dict[bool, list[float]] = {False: [], True: []}
    for repeat in range(repeats + 1):
        for is_private in (False, True):
            timing = time_call(partial(train_step, model, batch, is_private))
            if repeat:  # the first is not counted
                milliseconds[is_private].append(1000 * timing.wall)
    return float(np.median(milliseconds[False])), float(np.median(milliseconds[True]))


def print_steps(repeats: int) -> None:
    print(
        f"{'backbone':24} {'px':>4} {'plain, ms':>10} {'private':>8} {'ratio':>6} {'plain, MB':>10} "
        f"{'private':>8} {'ratio':>6}"
    )
    context = multiprocessing.get_context("spawn")
    for backbone, size in MODELS:
        plain_time, private_time = measure_step_time(backbone, size, repeats)
        with context.Pool(1, maxtasksperchild=1) as pool:
            calls = [(backbone, size, False), (backbone, size, True)]
            plain_memory, private_memory = pool.starmap(measure_step_memory, calls, chunksize=1)
        print(
            f"{backbone:24} {size:4} {plain_time:10.0f} {private_time:8.0f} "
            f"{private_time / plain_time:6.2f} {plain_memory / 1e6:10.0f} {private_memory / 1e6:8.0f} "
            f"{private_memory / max(plain_memory, 1):6.2f}",
            flush=True,
        )


# --- figures


def draw_aucs(
    rng: np.random.Generator, config: Config, num_scans: int, num_bins: int
) -> tuple[list[float], list[float]]:
    """The AUCs of 50 draws of scores, exact and with noise on their histograms; NaN where undefined."""
    key = str(SumKey("a", "covid", "hist"))
    labels = np.arange(num_scans) % 2
    exact_aucs = []
    noisy_aucs = []
    for _ in range(50):
        scores = rng.normal(1.8 * labels, 1.0) - 0.9
        histogram = compute_score_histogram(scores, labels.astype(float), num_bins)
        noisy_histogram = add_score_noise({key: histogram}, config)[key]
        exact_aucs.append(compute_binary_metrics(histogram)["auc"] or np.nan)
        noisy_aucs.append(compute_binary_metrics(noisy_histogram)["auc"] or np.nan)
    return exact_aucs, noisy_aucs


def print_query_noise() -> None:
    """Print how far a centre's reported AUC is off because of the noise on its histogram."""
    rng = np.random.default_rng(1)
    config = compose_config(["privacy=patient", "privacy.query_noise_multiplier=1", "stage.tasks=[covid]"])
    print(
        "scans  bins  privacy.query_noise_multiplier  epsilon of 11 answers  true AUC  reported, mean "
        "and standard deviation"
    )
    for num_scans, num_bins, noise in itertools.product((100, 1000, 10_000), (16, 256), (5.0, 15.0)):
        privacy = replace(config.privacy, query_noise_multiplier=noise)
        exact, noisy = draw_aucs(rng, replace(config, privacy=privacy), num_scans, num_bins)
        epsilon = compute_epsilon(((noise, 1.0, 11),), DELTA)
        print(
            f"{num_scans:5} {num_bins:5} {noise:10.0f} {epsilon:12.2f} {np.mean(exact):16.3f} "
            f"{np.nanmean(noisy):12.3f} ± {np.nanstd(noisy):.3f}"
        )


def print_central_noise(num_rounds: int = 8) -> None:
    """Print how loud the noise of `privacy=central` is beside the clip norm."""
    print(
        "\ncentres  epsilon  rounds  values  noise multiplier  norm of a round's noise, as a multiple of "
        "the clip"
    )
    for num_centres, epsilon, num_values in itertools.product((4, 30, 1000), (8.0, 50.0), (380_000, 1_000)):
        noise = solve_noise_multiplier(epsilon, DELTA, ((1.0, num_rounds),))
        noise_norm = noise / num_centres * num_values**0.5
        print(
            f"{num_centres:7} {epsilon:8.0f} {num_rounds:7} {num_values:8} {noise:12.2f} {noise_norm:16.2f}"
        )


# --- AUC by epsilon

AUC_SETTINGS = {
    "none": ["backbone.norm=frozen"],
    "none, batch norm": [],
    "epsilon 8": ["privacy=patient", "privacy.epsilon=8", "backbone.norm=frozen"],
    "epsilon 3": ["privacy=patient", "privacy.epsilon=3", "backbone.norm=frozen"],
    "epsilon 1": ["privacy=patient", "privacy.epsilon=1", "backbone.norm=frozen"],
}


def prepare_federation(data: str, folder: Path, scale: float) -> list[str]:
    """Return the overrides of a phantom's federation, or of the three real sources (real_ct_data.py).

    Both start from ImageNet's weights.
    """
    data_folder = real_ct_data.find_data_folder()
    weights = real_ct_data.imagenet_override(data_folder)
    if data == "phantom":
        return [
            "backbone=mobilenetv1_075",
            "preprocess.image_size=64",
            f"federation.phantom.scale={scale}",
            f"federation.data_root={folder}/data",
            weights,
            "evaluation.checkpoint_selection=last",
            "stage.local_steps_mode=equal",
        ]
    root = real_ct_data.prepare_federation(data_folder, folder)
    return [*BASE, weights, f"federation.data_root={root}"]


def print_aucs(data: str, scale: float, num_seeds: int, name_part: str, extra_overrides: list[str]) -> None:
    """Print the test AUC of the settings whose name contains `name_part`.

    `extra_overrides` come last and so decide how to train: the whole network, or a head on a frozen one.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = prepare_federation(data, folder, scale)
        print(f"{'':18} {'val.':>6} {'macro':>6} {'worst':>6}  epsilon spent  CPU seconds")
        for name, overrides in AUC_SETTINGS.items():
            if name_part not in name:
                continue
            for seed in range(1, num_seeds + 1):
                all_overrides = [*base, "stage.tasks=[covid]", *overrides, *extra_overrides, f"seed={seed}"]
                config = compose_config(all_overrides)
                run_id = f"{name.replace(' ', '-').replace(',', '')}-{seed}"
                for budget_file in folder.glob("**/.consilium/budget/*"):
                    budget_file.unlink()  # so that the epsilon spent is this run's
                run = partial(run_federation, config, folder / "runs", run_id)
                result, timing = time_result(run)
                print(f"{name:18} {describe_result(result, timing.cpu, seed)}", flush=True)


def run_federation(config: Config, runs_dir: Path, run_id: str) -> RunResult:
    transport = InProcess(sites(len(config.federation.centres)))
    return start_run(config, transport, runs_dir, open_ledger(runs_dir), run_id)


def describe_result(result: RunResult, cpu_seconds: float, seed: int) -> str:
    """One run's columns: AUCs, epsilon spent, CPU-seconds, and each centre's AUC."""
    scores = result.test["covid"]
    last_round = result.stages[-1].rounds[-1]
    epsilons = [centre.epsilon for centre in last_round.centres.values() if centre.epsilon is not None]
    spent = f"{min(epsilons):.2f} to {max(epsilons):.2f}" if epsilons else "–"
    by_centre = [f"{centre} {own.metrics['auc']:.3f}" for centre, own in scores.centres.items()]
    return (
        f"{last_round.validation['covid'].macro['auc']:6.3f} {scores.macro['auc']:6.3f} "
        f"{scores.worst['auc'].value:6.3f}  {spent:14} {cpu_seconds:6.0f}  seed {seed}  "
        f"{'  '.join(by_centre)}"
    )


def main() -> None:
    """Run the command that the module's docstring describes."""
    parser = argparse.ArgumentParser(
        description="What privacy costs. Overrides of the federations' configuration may follow the options."
    )
    parser.add_argument("--steps", action="store_true", help="time and memory of a step")
    parser.add_argument("--auc", action="store_true", help="test AUC by epsilon")
    parser.add_argument("--figures", action="store_true", help="noise in figures, without training")
    parser.add_argument("--repeats", type=int, default=15, help="steps to time")
    parser.add_argument(
        "--data", choices=["phantom", "ct_multisource"], default="phantom", help="the federations' data"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="size of the phantom")
    parser.add_argument("--seeds", type=int, default=1, help="number of seeds of the federations")
    parser.add_argument(
        "--only", default="", help="run only the federations with this in their name, such as epsilon"
    )
    arguments, overrides = parser.parse_known_args()  # overrides such as stage.batch_size=32
    torch.set_num_threads(1)
    is_all = not (arguments.steps or arguments.auc or arguments.figures)
    if arguments.figures or is_all:
        print_query_noise()
        print_central_noise()
    if arguments.steps or is_all:
        print_steps(arguments.repeats)
    if arguments.auc or is_all:
        print_aucs(arguments.data, arguments.scale, arguments.seeds, arguments.only, overrides)


if __name__ == "__main__":
    main()
