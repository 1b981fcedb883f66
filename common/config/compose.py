"""Compose a run's configuration from ``configs/`` and the command line: Hydra composes, the schema checks.

There is one override syntax, Hydra's: ``group=choice`` picks a file (``backbone=efficientnet_b7``),
``path.to.key=value`` sets a value. ``stage.x=v`` sets x for every stage of the recipe, ``stages.<name>.x=v``
for one, which takes precedence.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common.config.effects.find import IneffectiveKey, check_files, settle_effects
from common.config.normalise import normalise_config
from common.config.parse import parse_config
from common.config.renamed_keys import find_new_override
from common.config.schema import Config
from common.config.validate import check_contradictions, validate_config
from common.utils.errors import ConsiliumError, suggest

CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"
SECTION_GROUPS = ("aggregation", "privacy")  # whose files set the keys of the section of that name
Groups = dict[str, list[str]]  # {group: its choices}


def compose_config(overrides: Iterable[str] = (), config_dir: Path = CONFIG_DIR) -> Config:
    """Compose, parse, normalise and validate the configuration of a run.

    Raises:
        ConsiliumError: one sentence, for an unknown choice or key (with the nearest valid one), a renamed key
        (with its new name), a value out of range, or settings that exclude each other.
    """
    override_list = list(overrides)
    try:
        composed = _compose_values(override_list, config_dir)
        given_keys = _list_given_keys(override_list, config_dir)
    except (HydraException, OmegaConfBaseException) as error:
        summary = " ".join(str(error).split())[:300]
        raise ConsiliumError(f"the configuration cannot be composed: {summary}") from error
    _check_files(composed.from_files)
    config = normalise_config(parse_config(_merge_stages(composed.values, given_keys)))
    check_contradictions(config)
    _check_played(config, given_keys)
    config = settle_effects(config, given_keys)
    validate_config(config)
    return config


def prepare_config(config: Config) -> Config:
    """Normalise and validate a configuration. Raises ConsiliumError."""
    config = normalise_config(config)
    validate_config(config)
    return config


def keep_effective_overrides(overrides: Iterable[str], fixed: Iterable[str] = ()) -> list[str]:
    """Return the overrides without those that have no effect beside the fixed ones.

    Raises:
        ConsiliumError: what is wrong with the configuration besides.
    """
    remaining = list(overrides)
    while True:
        try:
            compose_config([*fixed, *remaining])
            return remaining
        except IneffectiveKey as error:
            effective = [override for override in remaining if not _sets_key(override, error.key)]
            if len(effective) == len(remaining):
                raise
            remaining = effective


def _sets_key(override: str, key: str) -> bool:
    """Return whether an override sets a key, or a group that holds it, for one stage or for all."""
    override_key = override.partition("=")[0].lstrip("+~")
    names = {key}
    if key.startswith("stages."):
        names.add(f"stage.{key.split('.', 2)[2]}")
    return any(name == override_key or name.startswith(f"{override_key}.") for name in names)


def _list_given_keys(overrides: list[str], config_dir: Path) -> list[str]:
    """Return the dotted keys that overrides set, themselves or by choosing a file of a single section.

    ``stage.optimiser={lr: 0.1}`` gives ``stage.optimiser.lr``.
    """
    groups = _list_groups(config_dir)
    files: dict[str, Path] = {}  # by section; of two choices the last one counts
    keys: list[str] = []
    for override in overrides:
        parsed = OverridesParser.create().parse_override(override)
        key = parsed.key_or_group
        if key in SECTION_GROUPS:
            files[key] = config_dir / key / f"{parsed.value()}.yaml"
        elif key not in groups and not parsed.is_delete():
            keys += _list_leaves(parsed.value(), key)
    for section, path in files.items():
        keys += _list_leaves(OmegaConf.load(path), section)
    return list(dict.fromkeys(keys))


def _list_leaves(value: Any, key: str) -> list[str]:
    """Return the dotted keys of the values in a mapping; the key itself where it is none, or is empty."""
    if not isinstance(value, Mapping) or not value:
        return [key]
    leaves: list[str] = []
    for name, entry in value.items():
        leaves += _list_leaves(entry, f"{key}.{name}")
    return leaves


def _check_played(config: Config, given_keys: list[str]) -> None:
    """Raise IneffectiveKey for an override of a stage that is not played, or of a task that nothing uses."""
    played = {"stages": config.stages.keys(), "tasks": config.tasks.keys()}
    reasons = {"stages": "the stage has no rounds", "tasks": "no stage that is played has the task"}
    for key in given_keys:
        kind, _, rest = key.partition(".")
        name, _, setting = rest.partition(".")
        if kind in played and name not in played[kind] and setting != "rounds":
            raise IneffectiveKey(key, f"{key} has no effect: {reasons[kind]}; leave it out")


class ComposedValues(NamedTuple):
    """What Hydra makes of the files that the overrides choose, and of all overrides, as plain values."""

    from_files: dict[str, Any]
    values: dict[str, Any]


def _compose_values(overrides: list[str], config_dir: Path) -> ComposedValues:
    groups = _list_groups(config_dir)
    hydra_overrides = [_to_hydra_override(override, groups) for override in overrides]
    group_overrides = [override for override in hydra_overrides if override.partition("=")[0] in groups]
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=os.fspath(config_dir), version_base="1.3"):
        from_files = compose("config", overrides=group_overrides)
        _check_names(overrides, from_files)
        composed = compose("config", overrides=hydra_overrides)
    return ComposedValues(_to_values(from_files), _to_values(composed))


def _to_values(composed: DictConfig) -> dict[str, Any]:
    values = OmegaConf.to_container(composed, resolve=False)  # no ${...} is ever filled in
    return cast(dict[str, Any], values)


def _check_files(values: Mapping[str, Any]) -> None:
    """Raise IneffectiveKey where the files that were chosen set a key that has no effect in this recipe."""
    try:
        config = normalise_config(parse_config(_merge_stages(values, [])))
    except ConsiliumError:
        return  # complete only by the command line, which is checked with it
    own_keys: list[str] = []
    for name, stage in (values.get("stages") or {}).items():
        own_keys += _list_leaves(stage or {}, f"stages.{name}")
    check_files(config, own_keys)


def _list_groups(config_dir: Path) -> Groups:
    groups = {}
    for folder in config_dir.iterdir():
        if folder.is_dir():
            groups[folder.name] = sorted(file.stem for file in folder.glob("*.yaml"))
    return groups


def _to_hydra_override(override: str, groups: Groups) -> str:
    """Return an override in Hydra's syntax.

    ``++`` lets Hydra set keys that no file mentions; the schema refuses unknown ones afterwards.
    """
    key, equals, value = override.partition("=")
    if not equals:
        raise ConsiliumError(f"override '{override}' has no '='; write key=value, e.g. aggregation.tau=0.5")
    if "${" in override.replace("\\", ""):
        raise ConsiliumError(
            f"override '{override}' has an interpolation, which could read this machine's environment; "
            "write the value itself"
        )
    if key.lstrip("+~").partition(".")[0] == "hydra":
        raise ConsiliumError(f"override '{override}' is for Hydra itself; set only keys of the configuration")
    new_override = find_new_override(override)
    if new_override:
        old_text, new_text = _shorten_rename(override, new_override)
        raise ConsiliumError(f"{old_text} is now {new_text}")
    if key in groups:
        if value not in groups[key]:
            raise ConsiliumError(f"{key} '{value}' is unknown{suggest(value, groups[key])}")
        return override
    if override.startswith(("+", "~")):
        return override
    return f"++{override}"


def _shorten_rename(old_override: str, new_override: str) -> tuple[str, str]:
    """Return an old and a new override for a message: only their keys where the value is the same."""
    old_key, _, old_value = old_override.lstrip("+~").partition("=")
    new_key, _, new_value = new_override.partition("=")
    if old_value == new_value:
        return old_key, new_key
    return f"{old_key}={old_value}", new_override


def _check_names(overrides: list[str], base: DictConfig) -> None:
    """Raise ConsiliumError for an override of a task or stage that the recipe lacks.

    A misspelt name would make a new one.
    """
    for override in overrides:
        kind, _, rest = override.partition("=")[0].partition(".")
        name, dot, _ = rest.partition(".")
        if kind in ("tasks", "stages") and dot and name not in base.get(kind, {}):
            raise ConsiliumError(
                f"override '{override}': the recipe has no {kind.removesuffix('s')} "
                f"'{name}'{suggest(name, base.get(kind, {}))}"
            )


def _merge_stages(values: Mapping[str, Any], given_keys: list[str]) -> dict[str, Any]:
    """Return the values with ``stage``, what all stages share, merged into each of ``stages``.

    A stage's own value takes precedence: of the files' over the files', of the command line's over all.
    """
    shared = OmegaConf.create({"stage": values.get("stage", {})})
    shared_keys = [key for key in given_keys if key.startswith("stage.")]
    stages = {}
    for name, own_values in (values.get("stages") or {"main": {}}).items():
        merged = OmegaConf.merge(shared, {"stage": own_values or {}})
        for key in shared_keys:
            if key == "stage.rounds" and OmegaConf.select(merged, key) == 0:
                continue  # a stage that the recipe skips is switched on by its own name only
            own_key = f"stages.{name}.{key.removeprefix('stage.')}"
            if own_key not in given_keys:
                OmegaConf.update(merged, key, OmegaConf.select(shared, key))
        merged_values = cast(dict[str, Any], OmegaConf.to_container(merged))
        stages[name] = merged_values["stage"]
    others = {key: value for key, value in values.items() if key != "stage"}
    return {**others, "stages": stages}
