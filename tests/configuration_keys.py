"""The keys of the schema, other values for each, and configurations in which they are tried."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterator, Mapping
from typing import Any

from common.config.schema import Config

# Overrides of configurations in which, together, every key has an effect somewhere and none somewhere else.
BASES: dict[str, list[str]] = {
    "multisource": ["tasks.covid.prior=global", "evaluation.metric=accuracy"],
    "masks": ["recipe=triage", "preprocess.num_slices=2", "stage.augment.p_elastic=0.5"],
    "contrast": ["recipe=finegrained"],
    "inpainting": [
        "recipe=finegrained",
        "stages.pretrain.tasks=[inpainting]",
        "stage.augment.p_hsv_value=0.5",
    ],
    "scores": ["recipe=prognosis", "stage.tasks=[outcome,brixia,regions]", "stage.rounds=3"],
    "clusters": ["recipe=transfer", "stages.transition.tasks=[soft]", "backbone.norm=group"],
    "patients": ["privacy=patient", "stage.tasks=[covid]", "stage.local_steps=2"],
    "centres": ["privacy=central", "privacy.noise_multiplier=1", "privacy.epsilon=0"],
    "secure sums": ["privacy=secagg", "privacy.secagg.scope=all", "evaluation.reduction=pooled"],
    "alone": ["federation.mode=local"],
    "pooled": ["federation.mode=central", "federation.evaluation=kfold"],
    "one head": [
        "stage.tasks=[source]",
        "tasks.source.head_update=moments",
        "evaluation.task=source",
        "evaluation.metric=accuracy",
        "stage.augment.p_affine=0",
        "stage.optimiser.name=sgd",
    ],
    "adaptive": [
        "federation.centres=[north,b,c,d,e]",
        "aggregation=fedadam",
        "aggregation.robust_rule=median",
        "evaluation.patience=3",
    ],
}
# Another valid value for each key that is neither a switch nor a choice of words.
OTHER_VALUES: dict[str, Any] = {
    "recipe": "another",
    "seed": 2,
    "tasks.*.label_column": "another",
    "tasks.*.label_columns": ["a", "b"],
    "tasks.*.bin_edges": [1.0, 2.0, 5.0],
    "tasks.*.num_clusters": [2, 16],
    "tasks.*.clustering_id": "run-another",
    "tasks.*.classes": ["a", "b", "c"],
    "tasks.*.loss_weight": 3.0,
    "tasks.*.tau": 0.25,
    "tasks.*.hidden_dims": [3],
    "tasks.*.dropout": 0.25,
    "tasks.*.server_head_lr": 0.5,
    "tasks.*.grad_scale": -2.0,
    "tasks.*.dice_weight": 3.0,
    "tasks.*.threshold": 0.75,
    "tasks.*.severity_column": "another",
    "tasks.*.mask_ratio": 0.75,
    "tasks.*.contrastive.projection_dim": 5,
    "tasks.*.contrastive.temperature": 0.75,
    "tasks.*.contrastive.queue_size": 1,
    "tasks.*.contrastive.momentum": 0.1,
    "stages.*.tasks": [],
    "stages.*.rounds": 5,
    "stages.*.local_epochs": 3.0,
    "stages.*.local_steps": 1,
    "stages.*.batch_size": 3,
    "stages.*.grad_accum_steps": 2,
    "stages.*.sampling_ratios": {"positive": 1.0},
    "stages.*.optimiser.lr": 0.05,
    "stages.*.optimiser.head_lr_scale": 3.0,
    "stages.*.optimiser.weight_decay": 0.5,
    "stages.*.optimiser.momentum": 0.25,
    "stages.*.optimiser.plateau_factor": 0.25,
    "stages.*.optimiser.plateau_patience": 1,
    "stages.*.optimiser.max_grad_norm": 0.01,
    "stages.*.augment.cutout_num_holes": 1,
    "stages.*.augment.rotate": 90.0,
    "stages.*.freeze": ["encoder.conv1.*"],
    "stages.*.freeze_fraction": 0.5,
    "stages.*.reset": ["heads.*"],
    "stages.*.local_layers": ["heads"],
    "stages.*.fedprox_mu": 5.0,
    "backbone.name": "test_efficientnet",
    "backbone.weights": "/nowhere.pth",
    "backbone.num_groups": 2,
    "backbone.mean": [0.1, 0.2, 0.3],
    "backbone.std": [0.5, 0.6, 0.7],
    "backbone.drop_path_rate": 0.5,
    "backbone.decoder.channels": [3],
    "preprocess.num_slices": 3,
    "preprocess.num_views": 2,
    "preprocess.view": 1,
    "preprocess.image_size": 48,
    "preprocess.window": [-500.0, 100.0],
    "aggregation.tau": 0.25,
    "aggregation.server_lr": 0.25,
    "aggregation.beta1": 0.25,
    "aggregation.beta2": 0.25,
    "aggregation.eps": 0.25,
    "aggregation.max_norm_ratio": 1.5,
    "aggregation.num_byzantine": 2,
    "privacy.epsilon": 3.0,
    "privacy.noise_multiplier": 2.0,
    "privacy.delta": 1e-6,
    "privacy.clip_norm": 0.25,
    "privacy.query_noise_multiplier": 20.0,
    "privacy.count_noise_multiplier": 7.0,
    "privacy.max_scans_per_patient": 3,
    "privacy.adaptive_clip_quantile": 0.25,
    "privacy.secagg.clip_value": 2.0,
    "privacy.secagg.quantization_bits": 20,
    "privacy.secagg.threshold": 0.9,
    "federation.name": "another",
    "federation.centres": ["north", "b", "c", "d", "e", "f"],
    "federation.folds": 7,
    "federation.fold": 1,
    "federation.held_out_centres": ["north"],
    "federation.data_root": "/another",
    "federation.quorum": 0.25,
    "federation.round_timeout": 7.0,
    "federation.round_retries": 7,
    "federation.join_timeout": 7.0,
    "federation.phantom.scale": 0.5,
    "federation.phantom.seed": 8,
    "federation.phantom.num_slices": 30,
    "federation.phantom.image_size": 96,
    "evaluation.task": "source",
    "evaluation.threshold": 0.25,
    "evaluation.histogram_bins": 64,
    "evaluation.patience": 5,
    "evaluation.warmup": 2,
}


def list_keys(settings: Any = Config, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every key of the schema with its type; ``*`` stands for a task's or stage's name."""
    hints = typing.get_type_hints(settings)
    for setting in dataclasses.fields(settings):
        key = f"{prefix}{setting.name}"
        hint = hints[setting.name]
        arguments = typing.get_args(hint)
        inner = [option for option in (hint, *arguments) if dataclasses.is_dataclass(option)]
        if not inner:
            yield key, hint
        elif typing.get_origin(hint) is dict:
            yield from list_keys(inner[0], f"{key}.*.")
        else:
            yield from list_keys(inner[0], f"{key}.")


def list_other_values(key: str, hint: Any, value: Any) -> list[Any]:
    """Return other valid values of a key: of a switch or a choice all, else the one of the table."""
    if isinstance(value, bool):
        return [not value]
    if typing.get_origin(hint) is typing.Literal:
        return [option for option in typing.get_args(hint) if option != value]
    if key in OTHER_VALUES:
        return [OTHER_VALUES[key]]
    return [value * 0.5 + 0.2]  # a probability or a share of the side


def list_places(key: str, values: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    """Yield the paths of a key in a configuration; none where a part of the schema is left out."""
    kind, _, rest = key.partition(".*.")
    if rest:
        for name in values[kind]:
            yield (kind, name, *rest.split("."))
    else:
        path = tuple(key.split("."))
        settings: Any = values
        for part in path[:-1]:
            settings = settings[part]
        if settings is not None:
            yield path


def read_value(values: Mapping[str, Any], path: tuple[str, ...]) -> Any:
    settings: Any = values
    for part in path:
        settings = settings[part]
    return settings


def with_value(values: Mapping[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    name, *rest = path
    new = with_value(values[name], tuple(rest), value) if rest else value
    return {**values, name: new}
