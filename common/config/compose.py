"""Compose a run's configuration from ``configs/`` and the command line: Hydra composes, the schema checks.

There is one override syntax, Hydra's: ``group=choice`` picks a file (``backbone=efficientnet_b7``),
``path.to.key=value`` sets a value. ``stage.x=v`` sets x for every stage of the recipe, ``stages.<name>.x=v``
for one, which takes precedence.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common.config.normalise import normalise_config
from common.config.parse import parse_config
from common.config.renamed_keys import find_new_override
from common.config.schema import Config
from common.config.validate import validate_config
from common.utils.errors import ConsiliumError, suggest

CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"
Groups = dict[str, list[str]]  # {group: its choices}


def compose_config(overrides: Iterable[str] = (), config_dir: Path = CONFIG_DIR) -> Config:
    """Compose, parse, normalise and validate the configuration of a run.

    Raises:
        ConsiliumError: one sentence, for an unknown choice or key (with the nearest valid one), a renamed key
        (with its new name), a value out of range, or settings that exclude each other.
    """
    override_list = list(overrides)
    try:
        values = _compose_values(override_list, config_dir)
    except (HydraException, OmegaConfBaseException) as error:
        summary = " ".join(str(error).split())[:300]
        raise ConsiliumError(f"the configuration cannot be composed: {summary}") from error
    return prepare_config(parse_config(_merge_stages(values, override_list)))


def prepare_config(config: Config) -> Config:
    """Normalise and validate a configuration. Raises ConsiliumError."""
    config = normalise_config(config)
    validate_config(config)
    return config


def _compose_values(overrides: list[str], config_dir: Path) -> dict[str, Any]:
    """Return what Hydra makes of the files and the overrides, as plain values."""
    groups = _list_groups(config_dir)
    hydra_overrides = [_to_hydra_override(override, groups) for override in overrides]
    group_overrides = [override for override in hydra_overrides if override.partition("=")[0] in groups]
    GlobalHydra.instance().clear()
    with initialize_config_dir(config_dir=os.fspath(config_dir), version_base="1.3"):
        _check_names(overrides, compose("config", overrides=group_overrides))
        composed = compose("config", overrides=hydra_overrides)
    values = OmegaConf.to_container(composed, resolve=False)  # no ${...} is ever filled in
    return cast(dict[str, Any], values)


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


def _merge_stages(values: Mapping[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Return the values with ``stage``, what all stages share, merged into each of ``stages``."""
    shared = OmegaConf.create({"stage": values.get("stage", {})})
    overridden = [override.lstrip("+~").partition("=")[0] for override in overrides]
    shared_keys = [key for key in dict.fromkeys(overridden) if key.startswith("stage.")]
    stages = {}
    for name, own_values in (values.get("stages") or {"main": {}}).items():
        merged = OmegaConf.merge(shared, {"stage": own_values or {}})
        for key in shared_keys:
            if key == "stage.rounds" and OmegaConf.select(merged, key) == 0:
                continue  # a stage that the recipe skips is switched on by its own name only
            own_key = f"stages.{name}.{key.removeprefix('stage.')}"
            if own_key not in overridden:
                OmegaConf.update(merged, key, OmegaConf.select(shared, key))
        merged_values = cast(dict[str, Any], OmegaConf.to_container(merged))
        stages[name] = merged_values["stage"]
    others = {key: value for key, value in values.items() if key != "stage"}
    return {**others, "stages": stages}
