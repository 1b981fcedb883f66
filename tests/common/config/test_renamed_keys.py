"""Keys of 0.1.0.

Refused with their new name where a person wrote them, translated where nobody can edit them.
"""

from __future__ import annotations

from typing import Any

import pytest

from common.config.compose import CONFIG_DIR, compose_config
from common.config.parse import config_to_dict, parse_config
from common.config.renamed_keys import RENAMED_KEYS, RENAMED_VALUES, find_new_key, upgrade_config
from common.config.schema import Config
from common.utils.errors import ConsiliumError


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("stage.batch=8", "stage.batch is now stage.batch_size"),
        ("stages.main.batch=8", "stages.main.batch is now stages.main.batch_size"),
        ("tasks.covid.kind=binary", "tasks.covid.kind is now tasks.covid.type"),
        ("stage.optimiser.clip=1", "stage.optimiser.clip is now stage.optimiser.max_grad_norm"),
        ("privacy.secagg.hide=all", "privacy.secagg.hide is now privacy.secagg.scope"),
        ("aggregation=mirror", "aggregation=mirror is now aggregation=imbalance_aware"),
        ("fitting=phantom_triage", "fitting is now presets"),
        ("stage.runtime=auto", "stage.runtime=auto is now stage.autotune=true"),
        ("stage.pace=equal", "stage.pace is now stage.local_steps_mode"),
        ("stage.pace=own", "stage.pace=own is now stage.local_steps_mode=proportional"),
        ("+federation.wait=3", "federation.wait is now federation.join_timeout"),
    ],
)
def test_old_override_is_refused_with_its_new_name(override: str, sentence: str) -> None:
    with pytest.raises(ConsiliumError) as caught:
        compose_config([override])
    assert str(caught.value) == sentence


def test_old_key_of_a_file_or_message_is_refused_with_its_new_name() -> None:
    values = config_to_dict(compose_config([]))
    values["stages"]["main"]["batch"] = values["stages"]["main"].pop("batch_size")
    with pytest.raises(ConsiliumError, match=r"^stages\.main\.batch is now stages\.main\.batch_size$"):
        parse_config(values)


@pytest.mark.parametrize("old_key", list(RENAMED_KEYS))
def test_every_new_name_is_a_key_of_the_schema_and_no_old_name_is(old_key: str) -> None:
    new_key = RENAMED_KEYS[old_key]
    assert find_new_key(old_key.replace("*", "covid")) == new_key.replace("*", "covid")
    for key, is_known in ((old_key, False), (new_key, True)):
        path = key.replace("stage.", "stages.main.").replace("*", "covid").split(".")
        with pytest.raises(ConsiliumError) as caught:
            parse_config(nest(path, object()))
        refused_as_unknown = " is now " in str(caught.value)
        assert refused_as_unknown == (not is_known), str(caught.value)


def nest(path: list[str], value: Any) -> dict[str, Any]:
    for name in reversed(path):
        value = {name: value}
    return value


def test_configuration_of_0_1_0_is_upgraded_to_the_same_settings() -> None:
    present = config_to_dict(
        compose_config(["privacy=secagg", "aggregation.robust_rule=none", "recipe=finegrained"])
    )
    assert parse_config(upgrade_config(downgrade(present))) == parse_config(present)
    assert upgrade_config(present) == present


def downgrade(values: dict[str, Any]) -> dict[str, Any]:
    """The same configuration as 0.1.0 wrote it: every renamed key and value under its old name."""
    old_values = {"true": True, "false": False}

    def walk(level: dict[str, Any], path: list[str]) -> dict[str, Any]:
        result = {}
        for name, value in level.items():
            generic = generalise([*path, name])
            old_name = next((old for old, new in RENAMED_KEYS.items() if new == generic), generic).rpartition(
                "."
            )[2]
            for old_text, new_text in RENAMED_VALUES.items():
                _, _, old_value = old_text.partition("=")
                new_key, _, new_value = new_text.partition("=")
                if new_key == generic and value == old_values.get(new_value, new_value):
                    value = old_value
            result[old_name] = walk(value, [*path, name]) if isinstance(value, dict) else value
        return result

    return walk(values, [])


def generalise(path: list[str]) -> str:
    if path[0] == "stages" and len(path) > 2:
        return ".".join(["stage", *path[2:]])
    if path[0] == "tasks" and len(path) > 2:
        return ".".join(["tasks", "*", *path[2:]])
    return ".".join(path)


def test_shipped_files_hold_no_old_key() -> None:
    for file in CONFIG_DIR.glob("*/*.yaml"):
        group = file.parent.name
        if group in ("recipe", "backbone", "aggregation", "privacy"):
            assert isinstance(compose_config([f"{group}={file.stem}"]), Config)
