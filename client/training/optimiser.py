"""The optimiser of local training: parameter groups, learning rate, FedProx, clipping and loss scaling."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from common.config.schema import OptimiserConfig, Stage


class LocalOptimiser:
    """A stage's optimiser with FedProx's pull, gradient clipping and fp16's loss scaling.

    FedProx (Li et al., "Federated optimization in heterogeneous networks", MLSys 2020) adds mu/2 |w -
    w_received|^2 to the loss.
    """

    def __init__(
        self,
        trainable: Sequence[tuple[str, nn.Parameter]],
        anchored: Sequence[nn.Parameter],
        stage: Stage,
        device: torch.device,
    ) -> None:
        """Prepare to move the `trainable` parameters; `anchored` ones only have their gradients unscaled."""
        self.stage = stage
        self.parameters = [parameter for _, parameter in trainable]
        self.received: list[Tensor] = []
        if stage.fedprox_mu:
            self.received = [parameter.detach().clone() for parameter in self.parameters]
        self._optimiser = make_optimiser(trainable, stage.optimiser, anchored)
        uses_scaling = stage.precision == "fp16" and device.type == "cuda"
        self._scaler = torch.amp.GradScaler(device.type, enabled=uses_scaling)

    def set_learning_rate(self, learning_rate: float) -> None:
        """Set the learning rate; each group of parameters takes its own multiple of it."""
        for group in self._optimiser.param_groups:
            group["lr"] = learning_rate * group["scale"]

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of the scaled loss."""
        self._scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def step(self) -> bool:
        """Take a step; returns False when fp16's gradients overflowed and the step was skipped."""
        if not self._has_gradients():
            return True  # a batch without labels; fp16's scaler refuses a step without gradients
        scale_before = self._scaler.get_scale()
        self._scaler.unscale_(self._optimiser)
        if self.stage.fedprox_mu:
            self._pull_towards_received()
        if self.stage.optimiser.max_grad_norm:
            nn.utils.clip_grad_norm_(self.parameters, self.stage.optimiser.max_grad_norm)
        self._scaler.step(self._optimiser)
        self._scaler.update()
        return bool(self._scaler.get_scale() >= scale_before)

    def _has_gradients(self) -> bool:
        parameters = chain.from_iterable(group["params"] for group in self._optimiser.param_groups)
        return any(parameter.grad is not None for parameter in parameters)

    def _pull_towards_received(self) -> None:
        for parameter, received in zip(self.parameters, self.received, strict=True):
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - received, alpha=self.stage.fedprox_mu)


def make_optimiser(
    trainable: Sequence[tuple[str, nn.Parameter]],
    settings: OptimiserConfig,
    anchored: Sequence[nn.Parameter] = (),
) -> torch.optim.Optimizer:
    """Make the stage's optimiser, whose parameter groups hold their learning-rate multiple as `scale`.

    Heads and decoder learn at `head_lr_scale` times the learning rate. AdamW's weight decay spares vectors
    (biases and norms). `anchored` parameters take part at learning rate 0, so that fp16's scaler unscales
    their gradients too.
    """
    parameters_by_group: defaultdict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in trainable:
        is_new_layer = name.startswith(("heads.", "decoder."))
        lr_scale = settings.head_lr_scale if is_new_layer else 1.0
        is_spared = settings.name == "adamw" and parameter.ndim <= 1
        weight_decay = 0.0 if is_spared else settings.weight_decay
        parameters_by_group[lr_scale, weight_decay].append(parameter)
    groups = [
        _make_group(parameters, settings.lr, lr_scale, weight_decay)
        for (lr_scale, weight_decay), parameters in parameters_by_group.items()
    ]
    unmoved = list(anchored)
    if not groups and not unmoved:
        unmoved = [nn.Parameter(torch.zeros(1))]  # PyTorch refuses an optimiser without parameters
    if unmoved:
        groups.append(_make_group(unmoved, 0.0, 0.0, 0.0))
    if settings.name == "sgd":
        return torch.optim.SGD(groups, momentum=settings.momentum, fused=True)
    if settings.name == "adam":
        return torch.optim.Adam(groups, fused=True)
    return torch.optim.AdamW(groups, fused=True)


def _make_group(
    parameters: list[nn.Parameter], learning_rate: float, lr_scale: float, weight_decay: float
) -> dict[str, Any]:
    return {
        "params": parameters,
        "lr": learning_rate * lr_scale,
        "scale": lr_scale,
        "weight_decay": weight_decay,
    }


def scheduled_learning_rate(settings: OptimiserConfig, progress: float) -> float:
    """Return the learning rate when the share `progress` in [0, 1] of the stage is done.

    The plateau schedule is constant within a round: the coordinator sends its factor with the round.
    """
    if settings.schedule != "cosine":
        return settings.lr
    return settings.lr * 0.5 * (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0)))
