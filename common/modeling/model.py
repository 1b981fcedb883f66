"""The model: a timm encoder on every slice alone, the slices pooled, one head a task; a decoder where a task reads a map.

slices [B, S, H, W] in [0, 1]  ->  normalised, three equal channels [B*S, 3, H, W]  ->  features [B*S, D]
                               ->  pooled over S [B, D]  ->  heads: {task: [B, 1 or K or R]}
the encoder's levels           ->  decoder's map [B, S, C, H, W]  ->  dense heads: {task: [B, S, H, W]}
                               ->  585 cells of it [B, 585 C]     ->  heads that read the map: {task: [B, 1 or K or R]}
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, GroupNormAct, freeze_batch_norm_2d  # type: ignore[attr-defined]
from torch import Tensor, nn

from common.config.schema import BackboneConfig, Config, Task
from common.learning.losses import DENSE_TYPES, needs_decoder, output_dim, uses_feature_map
from common.modeling.backbones import PAPER_BACKBONES
from common.modeling.decoder import Decoder, make_decoder
from common.modeling.parameters import Layout, build_layout
from common.modeling.pyramid_pooling import NUM_CELLS, pyramid_pool
from common.utils.errors import ConsiliumError, suggest

RARE_CLASS_BIAS = -3.0  # a mask's pixels are few: a head that says so from the start need not learn it first (Lin et al., ICCV 2017, section 4.1)


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
    """`encoder`, `decoder` (or None), `heads.<task>`; see the module docstring for shapes."""

    mean: Tensor
    std: Tensor

    def __init__(self, backbone: BackboneConfig, tasks: Mapping[str, Task]) -> None:
        super().__init__()
        self.encoder = make_encoder(backbone)
        self.decoder: Decoder | None = None
        if needs_decoder(tasks):
            self.decoder = make_decoder(self.encoder, backbone.name, backbone.decoder)
            if backbone.norm != "batch":  # nobody has its statistics to keep
                replace_batch_norms(self.decoder, backbone.num_groups)
        self.slice_pooling = backbone.slice_pooling
        self.task_types = {name: task.type for name, task in tasks.items()}
        self.head_inputs = {name: resolve_head_input(task) for name, task in tasks.items()}
        self.grad_scales = {name: task.grad_scale for name, task in tasks.items()}
        channels = self.decoder.out_channels if self.decoder is not None else 0
        widths = {"features": feature_dim(self.encoder), "map": channels, "cells": channels * NUM_CELLS}
        self.heads = nn.ModuleDict(
            {name: make_head(task, widths[self.head_inputs[name]]) for name, task in tasks.items()}
        )
        # Constants of the configuration, not weights: they do not travel.
        self.register_buffer("mean", torch.tensor(backbone.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(backbone.std).view(1, 3, 1, 1), persistent=False)

    def extract_features(self, slices: Tensor) -> Tensor:
        """Pooled features [B, D] of slices [B, S, H, W] in [0, 1]."""
        return self._pool_slices(self.encoder(self._normalise_slices(slices)), slices)

    def compute_head_inputs(self, slices: Tensor, wanted: set[str]) -> dict[str, Tensor]:
        """What heads read, of one pass through the encoder: `features` [B, D], `map` [B, S, C, H, W], `cells` [B, 585 C]."""
        if wanted == {"features"}:
            return {"features": self.extract_features(slices)}
        assert self.decoder is not None, "no task of this model reads a map"
        x = self._normalise_slices(slices)
        deepest, levels = self.encoder.forward_intermediates(x)  # type: ignore[operator]
        read = {"map": self.decoder(levels, x.shape[-2:]).unflatten(0, slices.shape[:2])}
        if "features" in wanted:
            read["features"] = self._pool_slices(self.encoder.forward_head(deepest), slices)  # type: ignore[operator]
        if "cells" in wanted:
            read["cells"] = pyramid_pool(read["map"]).float()
        return read

    def forward(self, slices: Tensor, tasks: list[str] | None = None) -> dict[str, Tensor]:
        """{task: output} of the named tasks (all by default), with the shapes of the table in common/learning/losses.py."""
        named = tasks or list(self.heads)
        read = self.compute_head_inputs(slices, {self.head_inputs[t] for t in named})
        return {
            t: self._apply_head(t, _ScaleGradient.apply(read[self.head_inputs[t]], self.grad_scales[t]))
            for t in named
        }

    def _normalise_slices(self, slices: Tensor) -> Tensor:
        """What the encoder sees: [B*S, 3, H, W], normalised."""
        x = (slices.flatten(0, 1).unsqueeze(1) - self.mean) / self.std  # broadcasts to three channels
        return (
            x.contiguous(memory_format=torch.channels_last)
            if self.encoder_memory_format is torch.channels_last
            else x
        )

    def _pool_slices(self, f: Tensor, slices: Tensor) -> Tensor:
        """[B, D] of the encoder's features [B*S, D]."""
        f = f.float().view(*slices.shape[:2], -1)
        return f.mean(1) if self.slice_pooling == "mean" else f.amax(1)

    def _apply_head(self, task: str, x: Tensor) -> Tensor:
        """A head's output on what it reads."""
        if self.head_inputs[task] == "map":
            return self.heads[task](x.flatten(0, 1)).view(x.shape[0], x.shape[1], *x.shape[3:])  # type: ignore[no-any-return]
        out: Tensor = self.heads[task](x)
        return F.normalize(out.float(), dim=1) if self.task_types[task] == "contrastive" else out

    encoder_memory_format: torch.memory_format = torch.contiguous_format


def resolve_head_input(task: Task) -> str:
    """`features`; `map` for a dense task; `cells` of the map for any other task that reads it."""
    return "features" if not uses_feature_map(task) else "map" if task.type in DENSE_TYPES else "cells"


def make_head(task: Task, width: int) -> nn.Sequential:
    """(ReLU) -> dropout -> [layer -> ReLU -> dropout] for each hidden width -> layer; a layer is linear, of a dense task a 1 x 1 convolution."""
    parts: list[nn.Module] = [nn.ReLU()] if task.input_relu else []
    parts.append(nn.Dropout(task.dropout))
    widths = [width, *task.hidden_dims, output_dim(task)]
    for i, (ins, outs) in enumerate(itertools.pairwise(widths)):
        layer: nn.Linear | nn.Conv2d = (
            nn.Conv2d(ins, outs, 1) if task.type in DENSE_TYPES else nn.Linear(ins, outs)
        )
        if task.xavier_init:
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        parts.append(layer)
        if i < len(task.hidden_dims):
            parts += [nn.ReLU(), nn.Dropout(task.dropout)]
    if task.type == "segmentation" and not task.xavier_init:
        nn.init.constant_(parts[-1].bias, RARE_CLASS_BIAS)  # type: ignore[arg-type]
    return nn.Sequential(*parts)


def shallow_parameter_names(model: Model, fraction: float) -> set[str]:
    """Names (as in the model's state dict) of the parameters and buffers of the encoder's shallower `share` of convolutions and linear layers.

    In the order of definition, with all that stands before the first layer that is left out: norms, attention weights. 1 is the whole encoder.
    """
    modules = [(name, m) for name, m in model.encoder.named_modules(prefix="encoder")]
    keep = round(fraction * sum(isinstance(m, nn.Conv2d | nn.Linear) for _, m in modules))
    names: set[str] = set()
    if not keep:
        return names
    for name, m in modules:
        keep -= isinstance(m, nn.Conv2d | nn.Linear)
        if keep < 0:
            break
        names.update(
            f"{name}.{own}"
            for own, _ in (*m.named_parameters(recurse=False), *m.named_buffers(recurse=False))
        )
    return names


def check_backbone(backbone: BackboneConfig) -> None:
    """Raises ConsiliumError for a name timm does not know, with the nearest that it does; a paper's name with the one that stands for it."""
    name = backbone.name
    if not timm.is_model(name):
        hint = (
            f"; it is '{PAPER_BACKBONES[name]}' here (common/modeling/backbones.py)"
            if name in PAPER_BACKBONES
            else suggest(name, timm.list_models())
        )
        raise ConsiliumError(f"backbone.name '{name}' is not a timm model{hint}")


def make_encoder(backbone: BackboneConfig) -> nn.Module:
    """The timm encoder without its classifier, weights random. Raises ConsiliumError for a name timm does not know."""
    check_backbone(backbone)
    options: dict[str, Any] = {"drop_path_rate": backbone.drop_path_rate} if backbone.drop_path_rate else {}
    encoder: nn.Module = timm.create_model(
        backbone.name, pretrained=False, num_classes=0, in_chans=3, **options
    )
    return apply_norm_policy(encoder, backbone)


def apply_norm_policy(encoder: nn.Module, backbone: BackboneConfig) -> nn.Module:
    """The encoder with its batch norms as `backbone.norm` wants them; frozen ones are a fixed scale and shift of every channel."""
    if backbone.norm == "group":
        return replace_batch_norms(encoder, backbone.num_groups)
    return freeze_batch_norm_2d(encoder) if backbone.norm == "frozen" else encoder  # type: ignore[no-untyped-call]


def feature_dim(encoder: nn.Module) -> int:
    """D of the encoder's features. MobileNetV3, LCNet and GhostNet widen them behind the pooling."""
    return int(getattr(encoder, "head_hidden_size", None) or encoder.num_features)  # type: ignore[arg-type]


def replace_batch_norms(module: nn.Module, max_groups: int = 32) -> nn.Module:
    """Every batch norm replaced by a group norm of at most `most` groups with the same affine weights (timm's fused ones too)."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            groups = math.gcd(child.num_features, max_groups)
            new: nn.Module
            if isinstance(child, BatchNormAct2d):
                new = GroupNormAct(child.num_features, num_groups=groups, eps=child.eps)
                new.drop, new.act = child.drop, child.act
            else:
                new = nn.GroupNorm(groups, child.num_features, eps=child.eps)
            new.load_state_dict({"weight": child.weight.data, "bias": child.bias.data}, strict=False)
            setattr(module, name, new)
        else:
            replace_batch_norms(child, max_groups)
    return module


def check_no_batch_norm(model: nn.Module) -> None:
    """Raises ConsiliumError when a layer is left in which one patient's output depends on the others of the batch: no gradient is theirs alone."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ConsiliumError(
                f"privacy=patient: the backbone has a {type(module).__name__} that backbone.norm can neither replace nor freeze; choose another"
            )


def make_model(
    backbone: BackboneConfig,
    tasks: Mapping[str, Task],
    seed: int,
    channels_last: bool = False,
    grad_checkpointing: bool = False,
) -> Model:
    """A model with weights drawn from `seed`, whatever was drawn before."""
    with fork_seeded_rng(seed):
        model = Model(backbone, tasks)
    if channels_last:
        model.encoder = model.encoder.to(memory_format=torch.channels_last)
        model.encoder_memory_format = torch.channels_last
        if model.decoder is not None:
            model.decoder.to(memory_format=torch.channels_last)
    if grad_checkpointing:
        model.encoder.set_grad_checkpointing(True)  # type: ignore[operator]
        if model.decoder is not None:
            model.decoder.grad_checkpointing = True
    return model


@contextlib.contextmanager
def fork_seeded_rng(seed: int) -> Iterator[None]:
    """torch's generators set to `seed` inside, as they were outside."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def parameter_layout(config: Config) -> Layout:
    """The layout of the run's model, without a weight of it."""
    with torch.device("meta"):
        return build_layout(make_model(config.backbone, config.tasks, 0))
