"""The model: a timm encoder applied to every slice, pooling over slices, and one head per task.

Tasks that need a feature map add a decoder:

    slices [B, S, H, W] in [0, 1]    -> normalised, three equal channels [B*S, 3, H, W] -> features [B*S, D]
                                     -> pooled over S [B, D]  -> heads: {task: [B, 1 or K or R]}
    levels of the encoder            -> decoder's feature map [B, S, C, H, W] -> dense heads: {task: [B, S, H,
    W]}
                                     -> 585 cells of it [B, 585 C] -> heads that read it: {task: [B, 1 or K or
                                     R]}
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Set
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.config.schema import BackboneConfig, Config, Task
from common.learning.losses import needs_decoder
from common.modeling.decoder import Decoder, make_decoder
from common.modeling.encoder import feature_dim, make_encoder, replace_batch_norms
from common.modeling.heads import HeadInput, make_head, resolve_head_input
from common.modeling.parameters import Layout, build_layout
from common.modeling.pyramid_pooling import NUM_CELLS, pyramid_pool


class _ScaleGradient(torch.autograd.Function):
    """Identity that multiplies its gradient.

    With a negative factor the features learn not to reveal the head's target (gradient reversal).
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: float) -> Tensor:
        ctx.scale = scale
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.scale * grad, None


class Model(nn.Module):
    """`encoder`, `decoder` (or None) and `heads.<task>`, with the shapes of the module's docstring.

    The names of submodules, parameters and buffers are the names of tensors in saved models.
    """

    mean: Tensor
    std: Tensor
    encoder_memory_format: torch.memory_format = torch.contiguous_format

    def __init__(self, backbone: BackboneConfig, tasks: Mapping[str, Task]) -> None:
        """Create a model with weights from torch's current random state."""
        super().__init__()
        self.encoder = make_encoder(backbone)
        self.decoder: Decoder | None = None
        map_channels = 0
        if needs_decoder(tasks):
            self.decoder = make_decoder(self.encoder, backbone.name, backbone.decoder)
            map_channels = self.decoder.out_channels
            if backbone.norm != "batch":  # a new decoder has no batch-norm statistics worth keeping
                replace_batch_norms(self.decoder, backbone.num_groups)
        self.slice_pooling = backbone.slice_pooling
        self.task_types = {name: task.type for name, task in tasks.items()}
        self.head_inputs = {name: resolve_head_input(task) for name, task in tasks.items()}
        self.grad_scales = {name: task.grad_scale for name, task in tasks.items()}
        input_widths = {
            HeadInput.FEATURES: feature_dim(self.encoder),
            HeadInput.MAP: map_channels,
            HeadInput.CELLS: map_channels * NUM_CELLS,
        }
        self.heads = nn.ModuleDict()
        for name, task in tasks.items():
            self.heads[name] = make_head(task, input_widths[self.head_inputs[name]])
        # Not persistent: they are constants of the configuration, not weights that are exchanged.
        self.register_buffer("mean", torch.tensor(backbone.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(backbone.std).view(1, 3, 1, 1), persistent=False)

    def extract_features(self, slices: Tensor) -> Tensor:
        """Return pooled features [B, D] of slices [B, S, H, W] in [0, 1]."""
        return self._pool_slices(self.encoder(self._normalise_slices(slices)), slices)

    def compute_head_inputs(self, slices: Tensor, needed: Set[str]) -> dict[str, Tensor]:
        """Return the needed inputs of heads (keys of HeadInput) from one pass through the encoder."""
        if needed == {HeadInput.FEATURES}:
            return {HeadInput.FEATURES: self.extract_features(slices)}
        assert self.decoder is not None, "no task of this model uses a feature map"
        images = self._normalise_slices(slices)
        deepest, levels = self.encoder.forward_intermediates(images)  # type: ignore[operator]
        feature_map = self.decoder(levels, images.shape[-2:]).unflatten(0, slices.shape[:2])
        inputs: dict[str, Tensor] = {HeadInput.MAP: feature_map}
        if HeadInput.FEATURES in needed:
            features = self.encoder.forward_head(deepest)  # type: ignore[operator]
            inputs[HeadInput.FEATURES] = self._pool_slices(features, slices)
        if HeadInput.CELLS in needed:
            inputs[HeadInput.CELLS] = pyramid_pool(feature_map).float()
        return inputs

    def forward(self, slices: Tensor, tasks: list[str] | None = None) -> dict[str, Tensor]:
        """Return {task: output}, shaped as in common/learning/losses.py.

        Args:
            slices: [B, S, H, W] in [0, 1].
            tasks: the tasks to compute; all if None or empty.
        """
        names = tasks or list(self.heads)
        inputs = self.compute_head_inputs(slices, {self.head_inputs[name] for name in names})
        outputs: dict[str, Tensor] = {}
        for name in names:
            head_input = _ScaleGradient.apply(inputs[self.head_inputs[name]], self.grad_scales[name])
            outputs[name] = self._apply_head(name, head_input)
        return outputs

    def _normalise_slices(self, slices: Tensor) -> Tensor:
        """Return the encoder's input [B*S, 3, H, W], normalised."""
        images = (slices.flatten(0, 1).unsqueeze(1) - self.mean) / self.std  # broadcast to three channels
        if self.encoder_memory_format is torch.channels_last:
            return images.contiguous(memory_format=torch.channels_last)
        return images

    def _pool_slices(self, features: Tensor, slices: Tensor) -> Tensor:
        """Return [B, D] from the features [B*S, D] of single slices."""
        by_scan = features.float().view(*slices.shape[:2], -1)
        return by_scan.mean(1) if self.slice_pooling == "mean" else by_scan.amax(1)

    def _apply_head(self, task: str, head_input: Tensor) -> Tensor:
        """Return the output of a task's head."""
        head = self.heads[task]
        if self.head_inputs[task] == HeadInput.MAP:
            batch_size, num_slices, _, height, width = head_input.shape
            dense: Tensor = head(head_input.flatten(0, 1))
            return dense.view(batch_size, num_slices, height, width)
        output: Tensor = head(head_input)
        return F.normalize(output.float(), dim=1) if self.task_types[task] == "contrastive" else output


def make_model(
    backbone: BackboneConfig,
    tasks: Mapping[str, Task],
    seed: int,
    channels_last: bool = False,
    grad_checkpointing: bool = False,
) -> Model:
    """Return a model with weights drawn from `seed`, whatever was drawn before."""
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


def shallow_parameter_names(model: Model, fraction: float) -> set[str]:
    """Return the state-dict names of the parameters and buffers in the shallower part of the encoder.

    Layers count in the order of their definition. The part includes everything defined before the first layer
    that is left out, such as norms and attention weights.

    Args:
        model: the model.
        fraction: the part's share of the encoder's convolutions and linear layers; 1 is the whole encoder.
    """
    modules = list(model.encoder.named_modules(prefix="encoder"))
    num_layers = sum(isinstance(module, nn.Conv2d | nn.Linear) for _, module in modules)
    layers_left = round(fraction * num_layers)
    names: set[str] = set()
    if layers_left == 0:
        return names
    for module_name, module in modules:
        if isinstance(module, nn.Conv2d | nn.Linear):
            layers_left -= 1
        if layers_left < 0:
            break
        for name, _ in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
            names.add(f"{module_name}.{name}")
    return names


@contextlib.contextmanager
def fork_seeded_rng(seed: int) -> Iterator[None]:
    """Set torch's random generators to `seed` within the block, and restore them afterwards."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        yield


def parameter_layout(config: Config) -> Layout:
    """Return the layout of a run's model without allocating its weights."""
    with torch.device("meta"):
        return build_layout(make_model(config.backbone, config.tasks, 0))
