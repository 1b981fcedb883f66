"""When the keys of a stage have an effect."""

from __future__ import annotations

from collections.abc import Callable

from common.config.effects.rule import EffectRule, Scope, has_decoder
from common.config.normalise import stage_tasks

# --- what keys depend on --------------------------------------------------------------------------


def _labels_scans(scope: Scope) -> bool:
    """Return whether scans differ by kind of label (client/data/dataset.py)."""
    tasks = [scope.config.tasks[name] for name in stage_tasks(scope.config, scope.stage)]
    return any(task.type in ("binary", "segmentation") for task in tasks)


def _has_short_batches(scope: Scope) -> bool:
    """Return whether a pass may end with a short batch, or its length in steps counts."""
    shuffles = not scope.stage.sampling_ratios and scope.config.privacy.dp_level != "patient"
    return not scope.stage.local_steps or shuffles


def _trains_new_layers(scope: Scope) -> bool:
    tasks = [scope.config.tasks[name] for name in stage_tasks(scope.config, scope.stage)]
    return any(task.head_update == "local" for task in tasks) or has_decoder(scope)


def _augments(probability: str) -> Callable[[Scope], bool]:
    """Return the condition that a change of training slices is not switched off."""
    return lambda scope: getattr(scope.stage.augment, probability) > 0


# --- the rules ------------------------------------------------------------------------------------

AUGMENT_RULES = (
    EffectRule(
        ("stages.*.augment.translate", "stages.*.augment.scale", "stages.*.augment.rotate"),
        "with p_affine=0",
        "set augment.p_affine",
        _augments("p_affine"),
    ),
    EffectRule(
        ("stages.*.augment.brightness", "stages.*.augment.contrast"),
        "with p_brightness=0",
        "set augment.p_brightness",
        _augments("p_brightness"),
    ),
    EffectRule(
        ("stages.*.augment.hsv_value_shift",),
        "with p_hsv_value=0",
        "set augment.p_hsv_value",
        _augments("p_hsv_value"),
    ),
    EffectRule(
        ("stages.*.augment.cutout_num_holes", "stages.*.augment.cutout_hole_size"),
        "with p_cutout=0",
        "set augment.p_cutout",
        _augments("p_cutout"),
    ),
    EffectRule(
        ("stages.*.augment.elastic_displacement",),
        "with p_elastic=0",
        "set augment.p_elastic",
        _augments("p_elastic"),
    ),
)

STAGE_RULES = (
    EffectRule(
        ("stages.*.local_epochs", "stages.*.local_steps_mode"),
        "beside local_steps, a fixed number of steps",
        "leave out local_steps",
        lambda scope: not scope.stage.local_steps,
        is_shared=True,
    ),
    EffectRule(
        ("stages.*.drop_last",),
        "where local_steps counts the steps and batches are drawn at random",
        "leave out local_steps",
        _has_short_batches,
        is_shared=True,
    ),
    EffectRule(
        ("stages.*.sampling_ratios",),
        "in a stage without a binary task or masks, by which scans differ",
        "add such a task",
        _labels_scans,
    ),
    EffectRule(
        ("stages.*.optimiser.momentum",),
        "with an optimiser that has moments of its own",
        "set optimiser.name=sgd",
        lambda scope: scope.stage.optimiser.name == "sgd",
    ),
    EffectRule(
        ("stages.*.optimiser.plateau_factor", "stages.*.optimiser.plateau_patience"),
        "without the plateau schedule",
        "set optimiser.schedule=plateau",
        lambda scope: scope.stage.optimiser.schedule == "plateau",
    ),
    EffectRule(
        ("stages.*.optimiser.head_lr_scale",),
        "in a stage that trains neither a head nor a decoder at the centres",
        "set a task's head_update: local",
        _trains_new_layers,
    ),
    *AUGMENT_RULES,
)
