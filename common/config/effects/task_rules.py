"""When the keys of a task have an effect."""

from __future__ import annotations

from collections.abc import Callable

from common.config.effects.rule import UNSUPERVISED_TYPES, EffectRule, Scope

# --- what keys depend on --------------------------------------------------------------------------


def _reads_one_column(scope: Scope) -> bool:
    return scope.task.type not in UNSUPERVISED_TYPES and not scope.task.label_columns


def _reads_several_columns(scope: Scope) -> bool:
    is_binned = scope.task.type == "multiclass" and bool(scope.task.bin_edges)
    return scope.task.type == "regression" or is_binned


def _has_type(*types: str) -> Callable[[Scope], bool]:
    """Return the condition that the key's task is of one of these types."""
    return lambda scope: scope.task.type in types


# --- the rules ------------------------------------------------------------------------------------

TASK_RULES = (
    EffectRule(
        ("tasks.*.label_column",),
        "in a task that has no labels, or names its columns in label_columns",
        "give one of the two",
        _reads_one_column,
    ),
    EffectRule(
        ("tasks.*.label_columns",),
        "without type: regression, or multiclass with bin_edges",
        "name the column in label_column",
        _reads_several_columns,
    ),
    EffectRule(
        ("tasks.*.bin_edges",),
        "in a task that is not multiclass, or whose classes are clusters",
        "set its type: multiclass without num_clusters",
        lambda scope: scope.task.type == "multiclass" and not scope.task.num_clusters,
    ),
    EffectRule(
        ("tasks.*.num_clusters", "tasks.*.classes"),
        "in a task that is not multiclass",
        "set its type: multiclass",
        _has_type("multiclass"),
    ),
    EffectRule(
        ("tasks.*.clustering_id",),
        "in a task without clusters",
        "the coordinator sets it where there are num_clusters",
        lambda scope: bool(scope.task.num_clusters),
    ),
    EffectRule(
        ("tasks.*.prior",),
        "in a task without classes",
        "set its type: binary or multiclass",
        _has_type("binary", "multiclass"),
    ),
    EffectRule(
        ("tasks.*.tau", "tasks.*.logit_adjustment"),
        "with prior: none",
        "set its prior: local or global",
        lambda scope: scope.task.prior != "none",
    ),
    EffectRule(
        ("tasks.*.head_input",),
        "in a task of segmentation or inpainting, which always reads the map",
        "set its type to another",
        _has_type("binary", "multiclass", "regression", "contrastive"),
    ),
    EffectRule(
        ("tasks.*.xavier_init",),
        "in a head that the server fits",
        "set its head_update: local or anchored",
        lambda scope: scope.task.head_update != "moments",
    ),
    EffectRule(
        ("tasks.*.server_head_lr",),
        "in a head that the server does not update by its gradient",
        "set its head_update: anchored",
        lambda scope: scope.task.head_update == "anchored",
    ),
    EffectRule(
        ("tasks.*.dice_weight", "tasks.*.threshold", "tasks.*.severity_column"),
        "in a task without masks",
        "set its type: segmentation",
        _has_type("segmentation"),
    ),
    EffectRule(
        ("tasks.*.mask_ratio",),
        "in a task that masks nothing",
        "set its type: inpainting",
        _has_type("inpainting"),
    ),
    EffectRule(
        (
            "tasks.*.contrastive.projection_dim",
            "tasks.*.contrastive.temperature",
            "tasks.*.contrastive.queue_size",
            "tasks.*.contrastive.momentum",
        ),
        "in a task that contrasts nothing",
        "set its type: contrastive",
        _has_type("contrastive"),
    ),
    EffectRule(
        ("tasks.*.inference",),
        "in a task without labels, whose head never predicts",
        "set its type to one with labels",
        _has_type("binary", "multiclass", "regression", "segmentation"),
    ),
)
