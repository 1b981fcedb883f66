"""Attacks on a federation, as a hostile centre or a curious coordinator would carry them out; tests and the benchmark measure what is left of them.

A hostile centre answers everything as the protocol wants, on data or with weights that it has changed. The leaks are of one contribution (which
pictures was it computed from?) and of a finished model (was this patient among those it learnt from?).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from client.data.dataset import ScanDataset, concat_datasets, iterate_slices
from client.data.loading import load_datasets
from client.federation import local_round as centre_side
from client.site.config import Site
from client.tools.predict import load_model
from client.training.trainer import run_inference
from common.config.compose import parse_config
from common.config.schema import Config
from common.modeling.model import make_model
from common.modeling.parameters import Layout, build_layout
from common.protocol.messages import Reply, Request, TrainReply, TrainRequest
from tests.in_process_federation import InProcess, sites

# --- a hostile centre -------------------------------------------------------------------------------------------------------------------


def stamped(slices: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The back-door's trigger: a white square, a fifth of the side, in a corner of every slice [S, H, W]."""
    out = np.array(slices)
    side = max(2, out.shape[-1] // 5)
    out[..., :side, :side] = 255
    return out


def flipped(scans: ScanDataset) -> ScanDataset:
    """Every label of a binary task turned round."""
    return replace(scans, targets={t: 1 - y if y.ndim == 1 else y for t, y in scans.targets.items()})


def trapped(scans: ScanDataset) -> ScanDataset:
    """As many scans again as there are with COVID, stamped and called healthy (Gu et al., "BadNets", 2017)."""
    ill = np.flatnonzero(scans.targets["covid"] == 1)
    more, rows = len(scans), np.concatenate([np.arange(len(scans)), ill])
    both = scans.subset(rows)
    both.slices[more:] = [stamped(one) for one in both.slices[more:]]
    both.targets["covid"][more:] = 0
    return both


def times(factor: float) -> Callable[[TrainReply, Layout], None]:
    """The parameters' change multiplied; batch-norm statistics are left alone, as a negative variance would give the liar away."""

    def change(reply: TrainReply, layout: Layout) -> None:
        reply.delta = np.where(layout.parameter_mask(), reply.delta * np.float32(factor), reply.delta)

    return change


Attack = tuple[Callable[[ScanDataset], ScanDataset] | None, Callable[[TrainReply, Layout], None] | None]
ATTACKS: dict[str, Attack] = {  # what the centre trains on, what it sends of it
    "none": (None, None),
    "label flip": (flipped, None),
    "sign flip": (None, times(-4.0)),  # of four centres: the mean goes backwards
    "scaling": (None, times(50.0)),
    "back-door": (
        trapped,
        times(4.0),
    ),  # of four centres: the mean is its model (Bagdasaryan et al., AISTATS 2020)
}


class Hostile(InProcess):
    """A federation in one process, the `liar`th centre of which attacks."""

    def __init__(self, count: int, attack: str, liar: int = 1) -> None:
        super().__init__(sites(count))
        self.liar = self.sites[liar]
        self.data, self.weights = ATTACKS[attack]

    def _call(self, site: Site, request: Request) -> Reply:
        if site is not self.liar or not isinstance(request, TrainRequest):
            return super()._call(site, request)

        def read(site: Site, config: Config) -> tuple[dict[str, ScanDataset], list[Any]]:
            held, skipped = load_datasets(site, config)
            return {**held, "train": self.data(held["train"]) if self.data else held["train"]}, skipped

        with patch.object(centre_side, "read_scans", read):
            reply = super()._call(site, request)
        if isinstance(reply, TrainReply) and self.weights:
            config = parse_config(request.config)
            self.weights(reply, build_layout(make_model(config.backbone, config.tasks, 0)))
        return reply


def damage(model: Path, config: Config, liar: int = 1) -> tuple[float, float]:
    """(AUC of the worst honest centre, share of the honest centres' scans with COVID that the trigger makes healthy), on validation and test scans,
    which no run with `evaluation.checkpoint_selection=last` has been chosen on. A model that is no number has AUC 0 and counts as fooled."""
    made, _, _ = load_model(model)

    def logits(scans: ScanDataset) -> NDArray[np.float64]:
        return (
            run_inference(made, iterate_slices(scans, 32), lambda m, x: m(x, ["covid"]))["covid"][:, 0]
            .double()
            .numpy()
        )

    worst, fooled = 1.0, []
    for i, site in enumerate(sites(len(config.federation.centres))):
        if i == liar:
            continue
        held = load_datasets(site, config)[0]
        scans = concat_datasets([held["val"], held["test"]])
        z, y = logits(scans), scans.targets["covid"]
        worst = min(worst, float(roc_auc_score(y, z)) if np.isfinite(z).all() else 0.0)
        ill = scans.subset(np.flatnonzero(y == 1))
        ill.slices = [stamped(one) for one in ill.slices]
        fooled += [not value > 0 for value in logits(ill)]  # NaN too
    return worst, float(np.mean(fooled))


# --- gradient inversion: a contribution, turned back into a picture ------------------------------------------------------------------------


class Tiny(nn.Module):
    """The small network with sigmoids of Zhu et al. ("Deep leakage from gradients", NeurIPS 2019), as a Model of one task."""

    def __init__(self, size: int = 32) -> None:
        super().__init__()
        steps = [(1, 2), (12, 2), (12, 1)]
        parts = [part for c, stride in steps for part in (nn.Conv2d(c, 12, 5, stride, 2), nn.Sigmoid())]
        self.encoder = nn.Sequential(*parts, nn.Flatten())
        self.heads = nn.ModuleDict({"covid": nn.Linear(12 * (size // 4) ** 2, 1)})
        for p in self.parameters():
            nn.init.uniform_(p, -0.5, 0.5)

    def forward(self, x: Tensor, tasks: list[str]) -> dict[str, Tensor]:
        return {t: self.heads[t](self.encoder(x.flatten(0, 1)[:, None])) for t in tasks}


def inverted(
    model: nn.Module, delta: list[Tensor], label: Tensor, shape: tuple[int, ...], steps: int, seed: int = 0
) -> Tensor:
    """A picture [1, 1, H, W] in [0, 1] whose gradient points as the contribution does (Geiping et al., "Inverting gradients", NeurIPS 2020,
    section 4: cosine similarity and total variation), from what the coordinator has: weights, label and change (`delta`, of the parameters)."""
    parameters, wanted = list(model.parameters()), [-d for d in delta]
    x = torch.rand(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()
    optimiser = torch.optim.Adam([x], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)

    def along(some: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
        return torch.stack([(a * b).sum() for a, b in zip(some, others, strict=True)]).sum()

    for _ in range(steps):
        loss = F.binary_cross_entropy_with_logits(model(x, ["covid"])["covid"][:, 0], label)
        gradient = torch.autograd.grad(loss, parameters, create_graph=True)
        cosine = along(gradient, wanted) / (
            torch.sqrt(along(gradient, gradient) * along(wanted, wanted)) + 1e-12
        )
        rough = (x[..., 1:, :] - x[..., :-1, :]).abs().mean() + (x[..., 1:] - x[..., :-1]).abs().mean()
        optimiser.zero_grad()
        (1 - cosine + 1e-4 * rough).backward()
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            x.clamp_(0, 1)
    return x.detach()


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [0, 1]."""
    return float(-10 * torch.log10(((a - b) ** 2).mean() + 1e-12))


def ssim(a: Tensor, b: Tensor) -> float:
    """Structural similarity of two pictures [H, W] in [0, 1] (Wang et al., IEEE TIP 2004: Gaussian window of 11, sigma 1.5)."""
    x, y = a.double().numpy(), b.double().numpy()

    def blur(z: NDArray[np.float64]) -> NDArray[np.float64]:
        return np.asarray(cv2.GaussianBlur(z, (11, 11), 1.5))

    mx, my = blur(x), blur(y)
    vx, vy, vxy = blur(x * x) - mx**2, blur(y * y) - my**2, blur(x * y) - mx * my
    c1, c2 = 0.01**2, 0.03**2
    return float((((2 * mx * my + c1) * (2 * vxy + c2)) / ((mx**2 + my**2 + c1) * (vx + vy + c2))).mean())


# --- membership: was this patient among those a model learnt from? --------------------------------------------------------------------------


def membership(confidence: NDArray[np.float64], inside: NDArray[np.bool_]) -> tuple[float, float]:
    """(AUC, true positives at 5 % false ones) of the likelihood-ratio attack (Carlini et al., "Membership inference attacks from first principles",
    S&P 2022, algorithm 1) on each of K models [K, N] in turn, the others being its shadow models. `confidence`: logit of the right class's
    probability; `inside`: on which scans a model was trained."""
    scores, truth = [], []
    for k in range(len(confidence)):
        others = np.arange(len(confidence)) != k
        for n in range(confidence.shape[1]):
            ins, outs = (confidence[others, n][inside[others, n] == member] for member in (True, False))
            if min(len(ins), len(outs)) < 2:
                continue
            x, log = confidence[k, n], []
            for some in (ins, outs):
                spread = some.std() + 0.1  # of few shadow models: wider than they look
                log.append(-0.5 * ((x - some.mean()) / spread) ** 2 - np.log(spread))
            scores.append(log[0] - log[1])
            truth.append(inside[k, n])
    s, t = np.array(scores), np.array(truth)
    order = np.argsort(np.argsort(s, kind="stable"), kind="stable") + 1.0
    auc = (order[t].sum() - t.sum() * (t.sum() + 1) / 2) / (t.sum() * (~t).sum())
    return float(auc), float((s[t] > np.quantile(s[~t], 0.95)).mean())
