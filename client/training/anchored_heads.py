"""Heads whose one step a round is a gradient step over all centres (`head_update: anchored`)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from common.config.schema import Task
from common.modeling.model import Model


class AnchoredHeads:
    """Heads that stay where they are while their gradients are summed, and move once at the end.

    A centre with a single class would drag a locally trained source head towards that class. An anchored
    head moves by `-server_head_lr * sum of gradients` after the last step, so that the server's average of
    the centres' deltas is one gradient step over all centres.
    """

    def __init__(self, model: Model, tasks: Mapping[str, Task]) -> None:
        """Find the parameters of the anchored tasks' heads."""
        self.parameters: list[nn.Parameter] = []
        self._learning_rates: list[float] = []
        for name, task in tasks.items():
            if task.head_update == "anchored":
                head_parameters = list(model.heads[name].parameters())
                self.parameters += head_parameters
                self._learning_rates += [task.server_head_lr] * len(head_parameters)
        self._displacements: list[Tensor] = [torch.zeros_like(parameter) for parameter in self.parameters]

    def accumulate_gradients(self) -> None:
        """Add the current gradients to the step that the heads will take."""
        for displacement, parameter, rate in zip(
            self._displacements, self.parameters, self._learning_rates, strict=True
        ):
            if parameter.grad is not None:
                displacement.add_(parameter.grad, alpha=rate)

    @torch.no_grad()
    def apply_displacements(self) -> None:
        """Take the heads' one step."""
        for displacement, parameter in zip(self._displacements, self.parameters, strict=True):
            parameter.sub_(displacement)
