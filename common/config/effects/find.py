"""Find the keys of a configuration that are set to no effect; refuse them, or set them back."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.config.effects.data_rules import DATA_RULES, MODEL_RULES
from common.config.effects.rule import EffectRule, Scope
from common.config.effects.run_rules import RUN_RULES
from common.config.effects.stage_rules import STAGE_RULES
from common.config.effects.task_rules import TASK_RULES
from common.config.schema import Config, Stage, Task
from common.utils.errors import ConsiliumError

EFFECT_RULES: tuple[EffectRule, ...] = (*RUN_RULES, *DATA_RULES, *MODEL_RULES, *TASK_RULES, *STAGE_RULES)
ALWAYS_EFFECTIVE = (
    "recipe",
    "seed",
    "tasks.*.type",
    "tasks.*.loss_weight",
    "tasks.*.hidden_dims",
    "tasks.*.input_relu",
    "tasks.*.dropout",
    "tasks.*.head_update",
    "tasks.*.grad_scale",
    "stages.*.tasks",
    "stages.*.rounds",
    "stages.*.local_steps",
    "stages.*.batch_size",
    "stages.*.grad_accum_steps",
    "stages.*.optimiser.name",
    "stages.*.optimiser.lr",
    "stages.*.optimiser.weight_decay",
    "stages.*.optimiser.schedule",
    "stages.*.optimiser.max_grad_norm",
    "stages.*.augment.p_flip",
    "stages.*.augment.p_affine",
    "stages.*.augment.p_brightness",
    "stages.*.augment.p_hsv_value",
    "stages.*.augment.p_cutout",
    "stages.*.augment.p_elastic",
    "stages.*.freeze",
    "stages.*.freeze_fraction",
    "stages.*.reset",
    "stages.*.local_layers",
    "stages.*.fedprox_mu",
    "stages.*.precision",
    "stages.*.channels_last",
    "stages.*.grad_checkpointing",
    "stages.*.torch_compile",
    "stages.*.autotune",
    "backbone.name",
    "backbone.weights",
    "backbone.norm",
    "backbone.mean",
    "backbone.std",
    "backbone.drop_path_rate",
    "preprocess.modality",
    "preprocess.image_size",
    "preprocess.crop",
    "aggregation.robust_rule",
    "privacy.dp_level",
    "privacy.secagg.scope",
    "privacy.secagg.clip_value",
    "privacy.secagg.quantization_bits",
    "privacy.secagg.threshold",
    "federation.name",
    "federation.centres",
    "federation.mode",
    "federation.evaluation",
    "federation.data_root",
    "federation.round_timeout",
    "federation.round_retries",
    "federation.join_timeout",
    "federation.phantom.scale",
    "federation.phantom.seed",
    "federation.phantom.num_slices",
    "federation.phantom.image_size",
    "evaluation.task",
    "evaluation.checkpoint_selection",
    "evaluation.patience",
)


class IneffectiveKey(ConsiliumError):
    """A key is set that has no effect; `key` is its dotted name."""

    def __init__(self, key: str, sentence: str) -> None:
        """Say why it has none, and what to do."""
        super().__init__(sentence)
        self.key = key


@dataclass(frozen=True)
class KeyWithoutEffect:
    """A key that has no effect in a configuration, whether it is set or not."""

    path: tuple[str, ...]
    value: Any
    default: Any
    rule: EffectRule

    @property
    def key(self) -> str:
        """Return the dotted key."""
        return ".".join(self.path)

    @property
    def key_of_stage(self) -> str:
        """Return the key below its stage; "" for a key of no stage."""
        return ".".join(self.path[2:]) if self.path[0] == "stages" else ""

    @property
    def is_set(self) -> bool:
        """Return whether it has another value than its default."""
        return bool(self.value != self.default) and self.value not in self.rule.allowed_anyway

    def to_error(self) -> IneffectiveKey:
        """Return the error that refuses it."""
        sentence = f"{self.key}={_format(self.value)} has no effect {self.rule.lacking}"
        return IneffectiveKey(self.key, f"{sentence}; {self.rule.remedy}, or leave it out")


def check_effects(config: Config) -> None:
    """Raise IneffectiveKey for the first key that is set and has no effect."""
    for finding in find_keys_without_effect(config):
        if finding.is_set:
            raise finding.to_error()


def find_keys_without_effect(config: Config) -> Iterator[KeyWithoutEffect]:
    """Yield the keys that have no effect in a configuration, at their defaults or not."""
    for rule in EFFECT_RULES:
        for key in rule.keys:
            for name, scope in _iterate_scopes(key, config):
                if not rule.is_effective(scope):
                    default = _read(_DEFAULTS, key.split("."))
                    path = tuple(name if part == "*" else part for part in key.split("."))
                    yield KeyWithoutEffect(path, _read(config, path), default, rule)


def check_files(config: Config, own_keys: Collection[str]) -> None:
    """Refuse what the files of ``configs/`` set to no effect by themselves, before any override.

    `own_keys` are the dotted keys that the files set for one stage. What they set for all recipes or for all
    stages may have no effect in one.

    Raises:
        IneffectiveKey: a file sets a key that has no effect.
    """
    for finding in find_keys_without_effect(config):
        is_for_all = finding.rule.is_shared or _has_effect_elsewhere(config, finding)
        if finding.is_set and (not is_for_all or _is_given(finding.key, own_keys)):
            raise finding.to_error()


def settle_effects(config: Config, given_keys: Collection[str]) -> Config:
    """Refuse what the command line sets to no effect; set back what it takes the effect from.

    Privacy is never set back: whoever reads a file that asks for it must find it, or an error.

    Args:
        config: A normalised configuration.
        given_keys: Dotted keys that the command line sets, for all stages as ``stage.``.

    Raises:
        IneffectiveKey: One of `given_keys` has no effect, whatever its value; one for all stages in none.
    """
    settled = config
    for finding in find_keys_without_effect(config):
        has_effect_elsewhere = _has_effect_elsewhere(config, finding)
        is_given = _is_given(finding.key, given_keys)
        if finding.key_of_stage and not has_effect_elsewhere:
            is_given = is_given or _is_given(f"stage.{finding.key_of_stage}", given_keys)
        if is_given and finding.value not in finding.rule.allowed_anyway:
            raise finding.to_error()
        if finding.is_set and finding.path[0] != "privacy":
            settled = _replace(settled, finding.path, finding.default)
    return settled


def _has_effect_elsewhere(config: Config, finding: KeyWithoutEffect) -> bool:
    """Return whether a key of a stage has an effect in another one."""
    if not finding.key_of_stage:
        return False
    return any(finding.rule.is_effective(Scope(config, stage=stage)) for stage in config.stages.values())


def _is_given(key: str, given_keys: Collection[str]) -> bool:
    """Return whether a key is among the given ones, or one of the entries of its mapping is."""
    return any(given == key or given.startswith(f"{key}.") for given in given_keys)


def _iterate_scopes(key: str, config: Config) -> Iterator[tuple[str, Scope]]:
    """Yield the name that ``*`` stands for and the scope, for each place of a key in a configuration."""
    kind = key.partition(".")[0]
    if kind == "tasks":
        for name, task in config.tasks.items():
            yield name, Scope(config, task=task)
    elif kind == "stages":
        for name, stage in config.stages.items():
            yield name, Scope(config, stage=stage)
    else:
        yield "", Scope(config)


_DEFAULTS = {**vars(Config()), "tasks": {"*": Task()}, "stages": {"*": Stage()}}


def _read(settings: Any, path: Sequence[str]) -> Any:
    for name in path:
        settings = settings[name] if isinstance(settings, Mapping) else getattr(settings, name)
    return settings


def _replace(settings: Any, path: Sequence[str], value: Any) -> Any:
    """Return settings in which the value at a path is another one."""
    if not path:
        return value
    name, *rest = path
    if isinstance(settings, Mapping):
        return {**settings, name: _replace(settings[name], rest, value)}
    return dataclasses.replace(settings, **{name: _replace(getattr(settings, name), rest, value)})


def _format(value: Any) -> str:
    """Return a value as it is written in an override."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(_format, value))}]"
    return str(value)
