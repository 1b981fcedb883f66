"""Configuration keys of 0.1.0 and their names since 0.2.0: an old key is refused with its new name.

``*`` stands for a name that the recipe chooses (a task's). A key of ``stage`` is the same under
``stages.<name>``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

RENAMED_KEYS: dict[str, str] = {
    "preprocess.exact": "preprocess.full_lung_search",
    "preprocess.slices": "preprocess.num_slices",
    "preprocess.draws": "preprocess.num_views",
    "preprocess.draw": "preprocess.view",
    "preprocess.size": "preprocess.image_size",
    "tasks.*.contrast.width": "tasks.*.contrastive.projection_dim",
    "tasks.*.contrast.queue": "tasks.*.contrastive.queue_size",
    "tasks.*.contrast.temperature": "tasks.*.contrastive.temperature",
    "tasks.*.contrast.momentum": "tasks.*.contrastive.momentum",
    "tasks.*.kind": "tasks.*.type",
    "tasks.*.label": "tasks.*.label_column",
    "tasks.*.columns": "tasks.*.label_columns",
    "tasks.*.edges": "tasks.*.bin_edges",
    "tasks.*.clusters": "tasks.*.num_clusters",
    "tasks.*.clustering": "tasks.*.clustering_id",
    "tasks.*.weight": "tasks.*.loss_weight",
    "tasks.*.adjust": "tasks.*.logit_adjustment",
    "tasks.*.reads": "tasks.*.head_input",
    "tasks.*.hidden": "tasks.*.hidden_dims",
    "tasks.*.relu": "tasks.*.input_relu",
    "tasks.*.xavier": "tasks.*.xavier_init",
    "tasks.*.head": "tasks.*.head_update",
    "tasks.*.anchor_lr": "tasks.*.server_head_lr",
    "tasks.*.dice": "tasks.*.dice_weight",
    "tasks.*.cut": "tasks.*.threshold",
    "tasks.*.burden": "tasks.*.severity_column",
    "tasks.*.share": "tasks.*.mask_ratio",
    "tasks.*.contrast": "tasks.*.contrastive",
    "stage.augment.shift": "stage.augment.translate",
    "stage.augment.p_value": "stage.augment.p_hsv_value",
    "stage.augment.value": "stage.augment.hsv_value_shift",
    "stage.augment.p_holes": "stage.augment.p_cutout",
    "stage.augment.holes": "stage.augment.cutout_num_holes",
    "stage.augment.hole": "stage.augment.cutout_hole_size",
    "stage.augment.elastic": "stage.augment.elastic_displacement",
    "stage.optimiser.head_lr": "stage.optimiser.head_lr_scale",
    "stage.optimiser.factor": "stage.optimiser.plateau_factor",
    "stage.optimiser.patience": "stage.optimiser.plateau_patience",
    "stage.optimiser.clip": "stage.optimiser.max_grad_norm",
    "stage.epochs": "stage.local_epochs",
    "stage.steps": "stage.local_steps",
    "stage.pace": "stage.local_steps_mode",
    "stage.batch": "stage.batch_size",
    "stage.accumulate": "stage.grad_accum_steps",
    "stage.sample": "stage.sampling_ratios",
    "stage.freeze_share": "stage.freeze_fraction",
    "stage.personal": "stage.local_layers",
    "stage.proximal": "stage.fedprox_mu",
    "stage.checkpointing": "stage.grad_checkpointing",
    "stage.compile": "stage.torch_compile",
    "stage.runtime": "stage.autotune",
    "backbone.decoder.widths": "backbone.decoder.channels",
    "backbone.decoder.merge": "backbone.decoder.skip_connection",
    "backbone.pool": "backbone.slice_pooling",
    "backbone.groups": "backbone.num_groups",
    "backbone.drop_path": "backbone.drop_path_rate",
    "aggregation.count": "aggregation.weight_by",
    "aggregation.lr": "aggregation.server_lr",
    "aggregation.codec": "aggregation.compression",
    "aggregation.outlier": "aggregation.max_norm_ratio",
    "aggregation.robust": "aggregation.robust_rule",
    "aggregation.hostile": "aggregation.num_byzantine",
    "privacy.secagg.hide": "privacy.secagg.scope",
    "privacy.secagg.clip": "privacy.secagg.clip_value",
    "privacy.secagg.bits": "privacy.secagg.quantization_bits",
    "privacy.kind": "privacy.dp_level",
    "privacy.noise": "privacy.noise_multiplier",
    "privacy.clip": "privacy.clip_norm",
    "privacy.queries": "privacy.query_noise_multiplier",
    "privacy.scans": "privacy.max_scans_per_patient",
    "privacy.quantile": "privacy.adaptive_clip_quantile",
    "federation.phantom.slices": "federation.phantom.num_slices",
    "federation.phantom.pixels": "federation.phantom.image_size",
    "federation.unseen": "federation.held_out_centres",
    "federation.root": "federation.data_root",
    "federation.deadline": "federation.round_timeout",
    "federation.retries": "federation.round_retries",
    "federation.wait": "federation.join_timeout",
    "evaluation.over": "evaluation.reduction",
    "evaluation.choose": "evaluation.checkpoint_selection",
    "evaluation.bins": "evaluation.histogram_bins",
    "evaluation.matrix": "evaluation.cross_site",
    "evaluation.quality": "evaluation.image_statistics",
    "evaluation.absent": "evaluation.missing_class",
}

RENAMED_GROUPS = {"fitting": "presets"}

# Values that have new names, as they are written in an override.
RENAMED_VALUES: dict[str, str] = {
    "aggregation=mirror": "aggregation=imbalance_aware",
    "tasks.*.kind=contrast": "tasks.*.type=contrastive",
    "stage.pace=own": "stage.local_steps_mode=proportional",
    "stage.runtime=given": "stage.autotune=false",
    "stage.runtime=auto": "stage.autotune=true",
    "aggregation.robust=trimmed": "aggregation.robust_rule=trimmed_mean",
}


def find_new_key(key: str) -> str | None:
    """Return the present name of a dotted key of 0.1.0, or None when it is not an old key."""
    parts = key.split(".")
    for old_key, new_key in _iterate_renames(RENAMED_KEYS):
        old_parts = old_key.split(".")
        if _matches(parts, old_parts):
            new_parts = new_key.split(".")
            return ".".join(_fill_wildcards(parts, new_parts))
    return None


def find_new_override(override: str) -> str | None:
    """Return the present form of an override ``key=value`` of 0.1.0, or None when nothing about it is old."""
    key, _, value = override.lstrip("+~").partition("=")
    if key in RENAMED_GROUPS:
        return f"{RENAMED_GROUPS[key]}={value}"
    for old_text, new_text in _iterate_renames(RENAMED_VALUES):
        old_key, _, old_value = old_text.partition("=")
        if value == old_value and _matches(key.split("."), old_key.split(".")):
            new_key, _, new_value = new_text.partition("=")
            filled_parts = _fill_wildcards(key.split("."), new_key.split("."))
            return f"{'.'.join(filled_parts)}={new_value}"
    new_key_alone = find_new_key(key)
    return f"{new_key_alone}={value}" if new_key_alone else None


def upgrade_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a resolved configuration of 0.1.0 under the present keys.

    One of this version is returned unchanged.

    For files that nobody can edit, such as the configuration inside a saved model. Keys that a person wrote
    are refused with their new name instead (`find_new_key`).
    """
    return _upgrade_level(values, [])


def _upgrade_level(values: Mapping[str, Any], path: list[str]) -> dict[str, Any]:
    upgraded: dict[str, Any] = {}
    for name, value in values.items():
        key = ".".join([*path, name])
        new_name = (find_new_key(key) or key).rpartition(".")[2]
        new_value = _find_new_value(key, value)
        if isinstance(new_value, Mapping):
            new_value = _upgrade_level(new_value, [*path, name])
        upgraded[new_name] = new_value
    return upgraded


def _find_new_value(key: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    new_override = find_new_override(f"{key}={value}")
    if new_override is None:
        return value
    new_value = new_override.partition("=")[2]
    return {"true": True, "false": False}.get(new_value, new_value)


def _iterate_renames(renames: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield the renames, those of ``stage`` also as they stand under ``stages.*``."""
    for old_text, new_text in renames.items():
        yield old_text, new_text
        if old_text.startswith("stage."):
            yield f"stages.*.{old_text.removeprefix('stage.')}", f"stages.*.{new_text.removeprefix('stage.')}"


def _matches(parts: list[str], pattern: list[str]) -> bool:
    if len(parts) != len(pattern):
        return False
    return all(wanted in ("*", part) for part, wanted in zip(parts, pattern, strict=True))


def _fill_wildcards(parts: list[str], pattern: list[str]) -> list[str]:
    return [part if wanted == "*" else wanted for part, wanted in zip(parts, pattern, strict=True)]
