"""Attacks on a federation by a hostile centre or a curious coordinator, and the measures of their effect.

A hostile centre answers as the protocol demands, but on manipulated data or with a manipulated update. What
leaks is measured for one update (from which images was it computed?) and for a finished model (was this
patient among those from whom it learnt?).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from client.data.dataset import ScanDataset, concat_datasets, iterate_slices
from client.data.loading import LoadedDatasets, load_datasets
from client.federation import released_data as centre_side
from client.site.config import Site
from client.tools.predict import load_model
from client.training.trainer import run_inference
from common.config.parse import parse_config
from common.config.schema import Config
from common.modeling.model import make_model
from common.modeling.parameters import Layout, build_layout
from common.protocol.messages import Reply, Request, TrainReply, TrainRequest
from tests.in_process_federation import InProcess, sites

# --- a hostile centre


def stamp_trigger(slices: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Add the back-door's trigger to slices [S, H, W]: a white square in a corner, a fifth of the side."""
    stamped = np.array(slices)
    side = max(2, stamped.shape[-1] // 5)
    stamped[..., :side, :side] = 255
    return stamped


def flip_labels(scans: ScanDataset) -> ScanDataset:
    """Invert every label of the binary tasks."""
    targets = {}
    for task, labels in scans.targets.items():
        is_binary = labels.ndim == 1
        targets[task] = 1 - labels if is_binary else labels
    return replace(scans, targets=targets)


def add_backdoor(scans: ScanDataset) -> ScanDataset:
    """Add a copy of every scan with COVID, stamped and labelled healthy (Gu et al., "BadNets", 2017)."""
    num_scans = len(scans)
    with_covid = np.flatnonzero(scans.targets["covid"] == 1)
    poisoned = scans.subset(np.concatenate([np.arange(num_scans), with_covid]))
    poisoned.slices[num_scans:] = [stamp_trigger(slices) for slices in poisoned.slices[num_scans:]]
    poisoned.targets["covid"][num_scans:] = 0
    return poisoned


def scale_update_by(factor: float) -> Callable[[TrainReply, Layout], None]:
    """Return a function that multiplies the parameters' change.

    It leaves batch-norm statistics alone, because a negative variance would give the centre away.
    """

    def scale(reply: TrainReply, layout: Layout) -> None:
        scaled = reply.delta * np.float32(factor)
        reply.delta = np.where(layout.parameter_mask(), scaled, reply.delta)

    return scale


@dataclass(frozen=True)
class Attack:
    """What a hostile centre does."""

    poison_data: Callable[[ScanDataset], ScanDataset] | None = None
    change_update: Callable[[TrainReply, Layout], None] | None = None


ATTACKS = {
    "none": Attack(),
    "label flip": Attack(poison_data=flip_labels),
    "sign flip": Attack(change_update=scale_update_by(-4.0)),  # of four centres: the mean goes backwards
    "scaling": Attack(change_update=scale_update_by(50.0)),
    # Of four centres: the mean is this centre's model (Bagdasaryan et al., AISTATS 2020).
    "back-door": Attack(add_backdoor, scale_update_by(4.0)),
}


class Hostile(InProcess):
    """A federation in one process of which one centre attacks."""

    def __init__(self, count: int, attack: str, hostile_index: int = 1) -> None:
        super().__init__(sites(count))
        self.hostile_site = self.sites[hostile_index]
        self.attack = ATTACKS[attack]

    def _call(self, site: Site, request: Request) -> Reply:
        if site is not self.hostile_site or not isinstance(request, TrainRequest):
            return super()._call(site, request)
        with patch.object(centre_side, "load_datasets", self._load_poisoned):
            reply = super()._call(site, request)
        if isinstance(reply, TrainReply) and self.attack.change_update:
            config = parse_config(request.config)
            layout = build_layout(make_model(config.backbone, config.tasks, 0))
            self.attack.change_update(reply, layout)
        return reply

    def _load_poisoned(self, site: Site, config: Config) -> LoadedDatasets:
        datasets = load_datasets(site, config)
        if self.attack.poison_data is None:
            return datasets
        poisoned = self.attack.poison_data(datasets.by_split["train"])
        return datasets._replace(by_split=datasets.by_split | {"train": poisoned})


def measure_damage(model_path: Path, config: Config, hostile_index: int = 1) -> tuple[float, float]:
    """Measure a hostile centre's damage on the honest centres' validation and test scans.

    No run with `evaluation.checkpoint_selection=last` was selected on these. A model of NaN has AUC 0 and
    counts as fooled.

    Returns:
        The AUC of the worst honest centre, and the fraction of scans with COVID that the trigger makes
        healthy.
    """
    model = load_model(model_path).model

    def predict(scans: ScanDataset) -> NDArray[np.float64]:
        batches = iterate_slices(scans, 32)
        logits = run_inference(model, batches, lambda model, x: model(x, ["covid"]))["covid"]
        return logits[:, 0].double().numpy()

    worst_auc = 1.0
    is_fooled: list[bool] = []
    for index, site in enumerate(sites(len(config.federation.centres))):
        if index == hostile_index:
            continue
        by_split = load_datasets(site, config).by_split
        scans = concat_datasets([by_split["val"], by_split["test"]])
        logits = predict(scans)
        labels = scans.targets["covid"]
        auc = float(roc_auc_score(labels, logits)) if np.isfinite(logits).all() else 0.0
        worst_auc = min(worst_auc, auc)
        with_covid = scans.subset(np.flatnonzero(labels == 1))
        with_covid.slices = [stamp_trigger(slices) for slices in with_covid.slices]
        is_fooled += [not logit > 0 for logit in predict(with_covid)]  # NaN too
    return worst_auc, float(np.mean(is_fooled))


# --- gradient inversion: an update, turned back into an image


class Tiny(nn.Module):
    """The sigmoid network of Zhu et al. ("Deep leakage from gradients", NeurIPS 2019), with one task."""

    def __init__(self, size: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels, stride in ((1, 2), (12, 2), (12, 1)):
            layers += [nn.Conv2d(channels, 12, 5, stride, 2), nn.Sigmoid()]
        self.encoder = nn.Sequential(*layers, nn.Flatten())
        self.heads = nn.ModuleDict({"covid": nn.Linear(12 * (size // 4) ** 2, 1)})
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -0.5, 0.5)

    def forward(self, x: Tensor, tasks: list[str]) -> dict[str, Tensor]:
        return {task: self.heads[task](self.encoder(x.flatten(0, 1)[:, None])) for task in tasks}


def invert_update(
    model: nn.Module, delta: list[Tensor], label: Tensor, shape: tuple[int, ...], steps: int, seed: int = 0
) -> Tensor:
    """Find an image [1, 1, H, W] in [0, 1] whose gradient points in the direction of an update.

    Geiping et al., "Inverting gradients", NeurIPS 2020, section 4: cosine similarity and total variation. It
    uses what the coordinator has: the weights, the label, and the change of the parameters (`delta`).
    """
    parameters = list(model.parameters())
    target = [-change for change in delta]
    x = torch.rand(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    optimiser = torch.optim.Adam([x], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for _ in range(steps):
        loss = F.binary_cross_entropy_with_logits(model(x, ["covid"])["covid"][:, 0], label)
        gradient = torch.autograd.grad(loss, parameters, create_graph=True)
        norms = torch.sqrt(dot_product(gradient, gradient) * dot_product(target, target))
        cosine = dot_product(gradient, target) / (norms + 1e-12)
        variation = (x[..., 1:, :] - x[..., :-1, :]).abs().mean() + (x[..., 1:] - x[..., :-1]).abs().mean()
        optimiser.zero_grad()
        (1 - cosine + 1e-4 * variation).backward()
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            x.clamp_(0, 1)
    return x.detach()


def dot_product(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    """The dot product of two lists of tensors."""
    return torch.stack([(a * b).sum() for a, b in zip(first, second, strict=True)]).sum()


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of images in [0, 1]."""
    return float(-10 * torch.log10(((a - b) ** 2).mean() + 1e-12))


def ssim(a: Tensor, b: Tensor) -> float:
    """Structural similarity of two images [H, W] in [0, 1].

    Wang et al., IEEE Trans. Image Process. 2004, with a Gaussian window of 11 pixels and sigma 1.5.
    """
    x = a.double().numpy()
    y = b.double().numpy()

    def blur(image: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(cv2.GaussianBlur(image, (11, 11), 1.5))

    mean_x = blur(x)
    mean_y = blur(y)
    var_x = blur(x * x) - mean_x**2
    var_y = blur(y * y) - mean_y**2
    covariance = blur(x * y) - mean_x * mean_y
    c1 = 0.01**2
    c2 = 0.03**2
    numerator = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    denominator = (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    return float((numerator / denominator).mean())


# --- membership inference: was this patient among those from whom a model learnt?


def infer_membership(confidence: NDArray[np.float64], is_member: NDArray[np.bool_]) -> tuple[float, float]:
    """Attack each of K models in turn with the likelihood ratio, the others being its shadow models.

    Carlini et al., "Membership inference attacks from first principles", S&P 2022, algorithm 1.

    Args:
        confidence: [K, N] logit of the right class's probability, by model and scan.
        is_member: [K, N] whether a model was trained on a scan.

    Returns:
        The AUC, and the true positive rate at 5 % false positives.
    """
    scores = []
    truth = []
    for model in range(len(confidence)):
        is_shadow = np.arange(len(confidence)) != model
        for scan in range(confidence.shape[1]):
            shadow_confidence = confidence[is_shadow, scan]
            trained_on_scan = is_member[is_shadow, scan]
            members = shadow_confidence[trained_on_scan]
            others = shadow_confidence[~trained_on_scan]
            if min(len(members), len(others)) < 2:
                continue
            observed = confidence[model, scan]
            scores.append(log_likelihood(observed, members) - log_likelihood(observed, others))
            truth.append(is_member[model, scan])
    score_array = np.array(scores)
    truth_array = np.array(truth)
    ranks = np.argsort(np.argsort(score_array, kind="stable"), kind="stable") + 1.0
    num_members = truth_array.sum()
    rank_sum = ranks[truth_array].sum() - num_members * (num_members + 1) / 2
    auc = rank_sum / (num_members * (~truth_array).sum())
    threshold = np.quantile(score_array[~truth_array], 0.95)
    return float(auc), float((score_array[truth_array] > threshold).mean())


def log_likelihood(observed: float, sample: NDArray[np.float64]) -> float:
    """The log likelihood, up to a constant, under a normal distribution fitted to a small sample."""
    spread = sample.std() + 0.1  # of few shadow models: they spread wider than it seems
    return float(-0.5 * ((observed - sample.mean()) / spread) ** 2 - np.log(spread))
