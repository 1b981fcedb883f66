"""Create the heads of tasks, and say which input each one reads."""

from __future__ import annotations

import itertools
from enum import StrEnum

from torch import nn

from common.config.schema import Task
from common.learning.losses import DENSE_TYPES, output_dim, uses_feature_map

# The bias with which a segmentation head starts: few of a mask's pixels are affected, and a head that
# predicts this from the start need not learn it first (Lin et al., ICCV 2017, section 4.1).
RARE_CLASS_BIAS = -3.0


class HeadInput(StrEnum):
    """What a head reads."""

    FEATURES = "features"  # the encoder's pooled features [B, D]
    MAP = "map"  # the decoder's feature map [B, S, C, H, W]
    CELLS = "cells"  # the feature map after pyramid pooling [B, 585 C]


def resolve_head_input(task: Task) -> HeadInput:
    """Return what a task's head reads."""
    if not uses_feature_map(task):
        return HeadInput.FEATURES
    if task.type in DENSE_TYPES:
        return HeadInput.MAP
    return HeadInput.CELLS


def make_head(task: Task, in_features: int) -> nn.Sequential:
    """Return (ReLU,) dropout, then [layer, ReLU, dropout] for each hidden width, then the output layer.

    Layers are linear; for a dense task they are 1 x 1 convolutions.
    """
    modules: list[nn.Module] = []
    if task.input_relu:
        modules.append(nn.ReLU())
    modules.append(nn.Dropout(task.dropout))
    widths = [in_features, *task.hidden_dims, output_dim(task)]
    layers = [_make_layer(task, width_in, width_out) for width_in, width_out in itertools.pairwise(widths)]
    for hidden_layer in layers[:-1]:
        modules += [hidden_layer, nn.ReLU(), nn.Dropout(task.dropout)]
    output_layer = layers[-1]
    modules.append(output_layer)
    if task.type == "segmentation" and not task.xavier_init:
        nn.init.constant_(output_layer.bias, RARE_CLASS_BIAS)  # type: ignore[arg-type]
    return nn.Sequential(*modules)


def _make_layer(task: Task, in_features: int, out_features: int) -> nn.Linear | nn.Conv2d:
    """Return one layer of a head."""
    layer: nn.Linear | nn.Conv2d
    if task.type in DENSE_TYPES:
        layer = nn.Conv2d(in_features, out_features, 1)
    else:
        layer = nn.Linear(in_features, out_features)
    if task.xavier_init:
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
    return layer
