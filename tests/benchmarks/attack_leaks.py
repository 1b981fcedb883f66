"""Measure what one update (gradient inversion) and a finished model (membership inference) give away.

The commands are in tests/benchmarks/attacks.py; tests/attacks.py says how each attack works.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch

from client.data.batch import Batch
from client.data.dataset import ScanDataset, concat_datasets, iterate_batches, iterate_slices
from client.data.loading import load_datasets
from client.phantom.chest_ct import draw_chest
from client.phantom.federation import write_federation
from client.phantom.profiles import CENTRE_PROFILES
from client.site.config import resolve_data_root
from client.training.dp_sgd import DPParams, poisson_batches, rows_by_patient
from client.training.trainer import TrainSpec, run_inference, train
from common.config.compose import compose_config
from common.config.schema import AugmentConfig, Compression, Config, OptimiserConfig, Stage, Task
from common.modeling.model import Model
from common.modeling.parameters import build_layout, get_model_weights
from common.privacy.accountant import solve_noise_multiplier
from common.protocol.update_codec import decode_update, encode_update
from server.run.initial_model import build_initial_model
from tests.attacks import Tiny, infer_membership, invert_update, psnr, ssim
from tests.benchmarks import real_ct_data
from tests.benchmarks.real_ct_settings import BASE
from tests.in_process_federation import sites

SMALL_FEDERATION = [
    "federation.phantom.scale=0.1",
    "stage.rounds=8",
    "stage.tasks=[covid]",
    "evaluation.checkpoint_selection=last",
    "aggregation.compression=fp32",
    "federation.round_retries=0",
    "federation.quorum=0.5",
]
INVERSION_DEFENCES = ["none", "int8", "int4", "five steps", "eight scans a step", "patient, epsilon 8"]
PRIVATE_INVERSION = "patient, epsilon 8"


@dataclass(frozen=True)
class MembershipDefence:
    """How the attacked models are trained."""

    epsilon: float | None = None  # of each patient; None: without noise
    private_norms: bool = False  # the normalisation layers that private training needs


MEMBERSHIP_DEFENCES = {
    "none": MembershipDefence(),
    "none, their norms": MembershipDefence(private_norms=True),
    "patient, epsilon 8": MembershipDefence(epsilon=8.0, private_norms=True),
    "patient, epsilon 1": MembershipDefence(epsilon=1.0, private_norms=True),
}


def compose_small_config(out: Path, *overrides: str) -> Config:
    """The configuration of a small phantom federation whose data lie in `out`."""
    return compose_config([*SMALL_FEDERATION, f"federation.data_root={out}/data", *overrides])


# --- gradient inversion


def measure_inversion(seed: int, defence: str, size: int = 32, attack_steps: int = 400) -> dict[str, Any]:
    """Turn one update back into a picture, and compare it with the picture behind the update.

    The update is of one picture (or eight) in one step of SGD (or five), as it would leave the centre under
    the defence.

    Returns:
        `psnr` and `ssim` of the attack's picture, and `flat`: the PSNR of an evenly grey one.
    """
    torch.manual_seed(seed)
    model = Tiny(size)
    layout = build_layout(model)
    num_pictures = 8 if defence == "eight scans a step" else 1
    pictures = torch.stack([draw_picture(seed, index, size) for index in range(num_pictures)])
    delta = compute_update(model, pictures, seed, defence)
    if defence in ("int8", "int4"):
        codec = cast(Compression, defence)
        delta = decode_update(encode_update(delta, layout, codec).arrays, layout, codec)
    tensors = [torch.from_numpy(delta[slot.span].reshape(slot.shape).copy()) for slot in layout.floats]
    inverted = invert_update(model, tensors, torch.ones(1), (1, 1, size, size), attack_steps, seed)[0, 0]
    best_match = max((picture[0] / 255 for picture in pictures), key=lambda truth: psnr(inverted, truth))
    flat_picture = torch.full_like(best_match, float(best_match.mean()))
    return {
        "psnr": psnr(inverted, best_match),
        "ssim": ssim(inverted, best_match),
        "flat": psnr(flat_picture, best_match),
    }


def draw_picture(seed: int, index: int, size: int) -> torch.Tensor:
    """A slice of a phantom as uint8 [1, size, size]."""
    patient_rng = np.random.default_rng(seed + index)
    visit_rng = np.random.default_rng(index)
    voxels, _ = draw_chest(patient_rng, visit_rng, CENTRE_PROFILES["north"].scanner, True, 10, 64)
    grey = np.clip((voxels[4:5] + 1000) / 1300 * 255, 0, 255)
    picture = torch.from_numpy(np.array(grey))[None].float()
    return torch.nn.functional.interpolate(picture, (size, size), mode="area")[0].round().byte()


def compute_update(model: Tiny, pictures: torch.Tensor, seed: int, defence: str) -> np.ndarray:
    """The change [P] of the model by training on the pictures [B, 1, H, W]; the model itself stays."""
    tasks = {"covid": Task()}
    stage = Stage(
        batch_size=8,
        optimiser=OptimiserConfig("sgd", lr=0.001, momentum=0.0, weight_decay=0.0, schedule="constant"),
        augment=AugmentConfig(p_flip=0, p_affine=0, p_brightness=0, p_hsv_value=0, p_cutout=0),
        channels_last=False,
    )
    trained = copy.deepcopy(model)
    as_model = cast(Model, trained)
    batch = Batch(pictures, {"covid": torch.ones(len(pictures))})
    if defence == PRIVATE_INVERSION:
        # As loud as one step of all patients needs.
        dp_params = DPParams(1.0, solve_noise_multiplier(8.0, 1e-5, ((1.0, 1),)), 1.0)
        train(as_model, [{"patient": batch}], TrainSpec(stage, tasks, seed=seed, dp_params=dp_params))
    else:
        num_steps = 5 if defence == "five steps" else 1
        train(as_model, [batch] * num_steps, TrainSpec(stage, tasks, seed=seed))
    layout = build_layout(model)
    return get_model_weights(trained, layout).floats - get_model_weights(model, layout).floats


# --- membership inference


def load_one_scan_per_patient(out: Path, data: str, num_scans: int = 96) -> tuple[Config, ScanDataset]:
    """Pool the training scans of all centres, one a patient."""
    if data == "phantom":
        config = compose_small_config(out)
        assert config.federation.phantom is not None
        write_federation(resolve_data_root(config), config.federation.phantom, config.federation.centres)
    else:
        data_folder = real_ct_data.find_data_folder()
        overrides = [
            *BASE,
            "stage.tasks=[covid]",
            real_ct_data.imagenet_override(data_folder),
            f"federation.data_root={real_ct_data.prepare_federation(data_folder, out)}",
        ]
        config = compose_config(overrides)
    datasets: list[ScanDataset] = []
    for site in sites(len(config.federation.centres)):
        datasets += load_datasets(site, config).by_split.values()
    pooled = concat_datasets(datasets)
    first_scans = np.array([rows[0] for rows in rows_by_patient(pooled).values()])
    return config, pooled.subset(np.random.default_rng(1).permutation(first_scans)[:num_scans])


@dataclass(frozen=True)
class ShadowTraining:
    """How each of the attacked models is trained."""

    config: Config
    stage: Stage
    epsilon: float | None
    epochs: int

    def train_model(self, scans: ScanDataset, seed: int) -> Model:
        """Train a new model on these scans."""
        model = build_initial_model(replace(self.config, seed=seed))
        tasks = self.config.tasks
        batch_size = self.stage.batch_size
        num_steps = self.epochs * -(-len(scans) // batch_size)
        if self.epsilon is None:
            batches = iterate_batches(scans, tasks, self.stage, num_steps, seed)
            train(model, batches, TrainSpec(self.stage, tasks, num_steps=num_steps, seed=seed))
            return model
        sample_rate = batch_size / len(scans)
        noise_multiplier = solve_noise_multiplier(self.epsilon, 1e-5, ((sample_rate, num_steps),))
        dp_params = DPParams(1.0, noise_multiplier, batch_size)
        patients = poisson_batches(scans, tasks, sample_rate, num_steps, seed)
        spec = TrainSpec(self.stage, tasks, num_steps=num_steps, seed=seed, dp_params=dp_params)
        train(model, patients, spec)
        return model


def plan_shadow_training(
    config: Config, data: str, defence: MembershipDefence, epochs: int
) -> ShadowTraining:
    """The real slices' models begin from ImageNet's weights and keep their batch norms' statistics."""
    is_phantom = data == "phantom"
    norm: Literal["batch", "group", "frozen"] = "batch"
    if defence.private_norms:
        norm = "group" if is_phantom else "frozen"
    stage = Stage(
        batch_size=12,
        precision="bf16" if is_phantom else "fp32",
        optimiser=OptimiserConfig(lr=2e-3 if is_phantom else 3e-4),
    )
    backbone = replace(config.backbone, norm=norm)
    covid_only = replace(config, backbone=backbone, tasks={"covid": config.tasks["covid"]})
    return ShadowTraining(covid_only, stage, defence.epsilon, epochs)


def measure_membership(
    out: Path, data: str, seed: int, defence: MembershipDefence, num_models: int = 8, epochs: int = 20
) -> dict[str, Any]:
    """Run the likelihood-ratio attack on models that were trained on one half of the scans each."""
    config, scans = load_one_scan_per_patient(out, data)
    training = plan_shadow_training(config, data, defence, epochs)
    rng = np.random.default_rng(seed)
    # Each scan is in half of the models: the likelihood ratio needs both kinds of shadow model.
    memberships = [rng.permutation(num_models) < num_models // 2 for _ in range(len(scans))]
    is_member = np.stack(memberships, axis=1)
    labels = scans.targets["covid"]
    confidence = np.zeros((num_models, len(scans)))
    accuracies_inside = []
    accuracies_outside = []
    for index in range(num_models):
        model = training.train_model(scans.subset(np.flatnonzero(is_member[index])), index)
        logits = predict_covid(model, scans)
        confidence[index] = np.where(labels == 1, logits, -logits)
        is_right = confidence[index] > 0
        accuracies_inside.append(np.mean(is_right[is_member[index]]))
        accuracies_outside.append(np.mean(is_right[~is_member[index]]))
    auc, true_positive_rate = infer_membership(confidence, is_member)
    return {
        "auc": auc,
        "tpr": true_positive_rate,
        "right inside": float(np.mean(accuracies_inside)),
        "right outside": float(np.mean(accuracies_outside)),
    }


def predict_covid(model: Model, scans: ScanDataset) -> np.ndarray:
    """The logits [N] of the covid task."""
    batches = iterate_slices(scans, 32)
    outputs = run_inference(model, batches, lambda model, slices: model(slices, ["covid"]))
    return outputs["covid"][:, 0].double().numpy()
