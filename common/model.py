"""The model: a timm encoder on every slice alone, the slices pooled, one head a task.

slices [B, S, H, W] in [0, 1]  ->  normalised, three equal channels [B*S, 3, H, W]  ->  features [B*S, D]
                               ->  pooled over S [B, D]  ->  {task: logits [B, 1 or K]}
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import timm
import torch
from timm.layers import BatchNormAct2d, GroupNormAct  # type: ignore[attr-defined]
from torch import Tensor, nn

import common.backbones  # noqa: F401  (registers our encoders with timm)
from common.errors import ConsiliumError, nearest
from common.schema import Backbone, Task
from common.tasks import outputs_of


class _ScaleGradient(torch.autograd.Function):
    """Identity whose gradient is multiplied: a head with a negative scale makes features that do *not* tell its target."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.scale * grad, None


class Model(nn.Module):
    """`encoder`, `heads.<task>`; see the module docstring for shapes."""

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: Backbone, tasks: Mapping[str, Task]) -> None:
        super().__init__()
        self.encoder = make_encoder(backbone)
        self.pool = backbone.pool
        self.grad_scale = {name: task.grad_scale for name, task in tasks.items()}
        width = int(self.encoder.num_features)  # type: ignore[arg-type]
        self.heads = nn.ModuleDict(
            {name: nn.Sequential(nn.Dropout(t.dropout), nn.Linear(width, outputs_of(t))) for name, t in tasks.items()}
        )
        # Constants of the configuration, not weights: they do not travel.
        self.register_buffer("mean", torch.tensor(backbone.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(backbone.std).view(1, 3, 1, 1), persistent=False)

    def features(self, slices: Tensor) -> Tensor:
        """Pooled features [B, D] of slices [B, S, H, W] in [0, 1]."""
        b, s, h, w = slices.shape
        x = (slices.reshape(b * s, 1, h, w) - self.mean) / self.std  # broadcasts to three channels
        if self.encoder_format is torch.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        f = self.encoder(x).float().view(b, s, -1)
        pooled: Tensor = f.mean(1) if self.pool == "mean" else f.amax(1)
        return pooled

    def forward(self, slices: Tensor, tasks: list[str] | None = None) -> dict[str, Tensor]:
        """Logits of the named tasks (all by default)."""
        f = self.features(slices)
        return {t: self.heads[t](_ScaleGradient.apply(f, self.grad_scale[t])) for t in (tasks or list(self.heads))}

    encoder_format: torch.memory_format = torch.contiguous_format


def known(backbone: Backbone) -> None:
    """Raises ConsiliumError for a name timm does not know, with the nearest that it does."""
    if not timm.is_model(backbone.name):
        raise ConsiliumError(f"backbone.name '{backbone.name}' is not a timm model{nearest(backbone.name, timm.list_models())}")


def make_encoder(backbone: Backbone) -> nn.Module:
    """The timm encoder without its classifier, weights random. Raises ConsiliumError for a name timm does not know."""
    known(backbone)
    options: dict[str, Any] = {"drop_path_rate": backbone.drop_path} if backbone.drop_path else {}
    encoder: nn.Module = timm.create_model(backbone.name, pretrained=False, num_classes=0, in_chans=3, **options)
    return group_norm(encoder) if backbone.norm == "group" else encoder


def group_norm(module: nn.Module) -> nn.Module:
    """Every batch norm replaced by a group norm of at most 32 groups with the same affine weights (timm's fused ones too)."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            groups = math.gcd(child.num_features, 32)
            new: nn.Module
            if isinstance(child, BatchNormAct2d):
                new = GroupNormAct(child.num_features, num_groups=groups, eps=child.eps)
                new.drop, new.act = child.drop, child.act
            else:
                new = nn.GroupNorm(groups, child.num_features, eps=child.eps)
            new.load_state_dict({"weight": child.weight.data, "bias": child.bias.data}, strict=False)
            setattr(module, name, new)
        else:
            group_norm(child)
    return module


def make_model(backbone: Backbone, tasks: Mapping[str, Task], seed: int, channels_last: bool = False, checkpointing: bool = False) -> Model:
    """A model with weights drawn from `seed`, whatever was drawn before."""
    with seeded(seed):
        model = Model(backbone, tasks)
    if channels_last:
        model.encoder = model.encoder.to(memory_format=torch.channels_last)
        model.encoder_format = torch.channels_last
    if checkpointing:
        model.encoder.set_grad_checkpointing(True)  # type: ignore[operator]
    return model


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch's generators set to `seed` inside, as they were outside."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield
