"""When the keys of preprocessing and of the model have an effect."""

from __future__ import annotations

from common.config.effects.rule import EffectRule, Scope, has_decoder, uses_map

# --- what keys depend on --------------------------------------------------------------------------


def _may_be_ct(scope: Scope) -> bool:
    return scope.config.preprocess.modality != "XR"


def _searches_lungs(scope: Scope) -> bool:
    return _may_be_ct(scope) and scope.config.preprocess.selection != "kds_paper"


def _pools_slices(scope: Scope) -> bool:
    """Return whether features of several slices are pooled; clusters are made of such features, too."""
    tasks = scope.config.tasks.values()
    return _may_be_ct(scope) and any(not uses_map(task) or task.num_clusters for task in tasks)


def _uses_group_norm(scope: Scope) -> bool:
    norm = scope.config.backbone.norm
    return norm == "group" or (norm == "frozen" and has_decoder(scope))


# --- the rules ------------------------------------------------------------------------------------

DATA_RULES = (
    EffectRule(
        ("preprocess.selection", "preprocess.num_views", "preprocess.view", "preprocess.window"),
        "with preprocess.modality=XR: a radiograph is one picture",
        "use preprocess.modality=CT",
        _may_be_ct,
    ),
    EffectRule(
        ("preprocess.num_slices",),
        "with preprocess.modality=XR: a radiograph is one picture",
        "use preprocess.modality=CT",
        _may_be_ct,
        allowed_anyway=(1,),
    ),
    EffectRule(
        ("preprocess.full_lung_search",),
        "with preprocess.modality=XR or preprocess.selection=kds_paper",
        "use another selection of slices of a CT",
        _searches_lungs,
    ),
)

MODEL_RULES = (
    EffectRule(
        ("backbone.slice_pooling",),
        "where no head reads pooled features of several slices",
        "use a task with head_input: features and preprocess.modality=CT",
        _pools_slices,
        is_shared=True,
    ),
    EffectRule(
        ("backbone.num_groups",),
        "without group norms",
        "set backbone.norm=group",
        _uses_group_norm,
    ),
    EffectRule(
        ("backbone.decoder.channels", "backbone.decoder.skip_connection"),
        "without a decoder",
        "add a task of segmentation or inpainting, or one with head_input: map",
        has_decoder,
        is_shared=True,
    ),
)
