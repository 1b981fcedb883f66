"""Key by key over the whole schema: a key that is set changes something, or is refused by its name.

A key without a rule, without another value to try, or without a place where its effect shows fails here, so
that none can be added without them.
"""

from __future__ import annotations

import functools
import json
import re
from typing import Any

import pytest

from common.config.compose import CONFIG_DIR, compose_config, prepare_config
from common.config.effects.find import ALWAYS_EFFECTIVE, EFFECT_RULES
from common.config.parse import config_to_dict, parse_config
from common.config.schema import Config
from common.utils.errors import ConsiliumError
from server.rounds.cross_validation import expand_folds
from server.rounds.membership import fill_source_classes
from tests.configuration_keys import (
    BASES,
    list_keys,
    list_other_values,
    list_places,
    read_value,
    with_value,
)

KEYS = dict(list_keys())
DECIDED_BY_OTHERS = ("tasks.*.head_update", "stages.*.local_layers", "backbone.norm")  # by mode and privacy
MAKES_OTHERS_WRONG = ("federation.mode", "federation.held_out_centres", "privacy.dp_level", "tasks.*.type")


@functools.cache
def compose_base(base: str) -> Config:
    config = compose_config([*BASES[base], "preprocess.image_size=32"])
    return fill_source_classes(config, ["a", "b"])


def test_every_key_of_the_schema_has_a_rule_or_is_always_effective() -> None:
    ruled = {key for rule in EFFECT_RULES for key in rule.keys}
    assert {*ruled, *ALWAYS_EFFECTIVE} == set(KEYS)


@pytest.mark.parametrize("base", list(BASES))
def test_base_is_accepted_and_normalised_once_for_all(base: str) -> None:
    config = compose_base(base)
    assert prepare_config(config) == config
    sent = parse_config(json.loads(json.dumps(config_to_dict(config))))
    assert prepare_config(sent) == config
    for fold in expand_folds(config).values():
        assert prepare_config(fold) == fold


@pytest.mark.parametrize("recipe", [path.stem for path in (CONFIG_DIR / "recipe").glob("*.yaml")])
def test_what_the_coordinator_composes_a_centre_accepts_unchanged(recipe: str) -> None:
    for federation in (["federation=folder", "federation.centres=[north,south,west]"], []):
        config = fill_source_classes(compose_config([f"recipe={recipe}", *federation]), ["north", "south"])
        assert prepare_config(parse_config(config_to_dict(config))) == config


def try_value(base: str, path: tuple[str, ...], value: Any) -> tuple[Config | None, str]:
    """Return the configuration with another value at a path, or the sentence that refuses it."""
    values = with_value(config_to_dict(compose_base(base)), path, value)
    try:
        return prepare_config(parse_config(values)), ""
    except ConsiliumError as error:
        return None, str(error)


@pytest.mark.parametrize("key", list(KEYS))
def test_key_is_accepted_somewhere_and_refused_by_name_where_it_has_no_effect(key: str) -> None:
    num_accepted = 0
    num_refused = 0
    for base in BASES:
        values = config_to_dict(compose_base(base))
        for path in list_places(key, values):
            present = read_value(values, path)
            for value in list_other_values(key, KEYS[key], present):
                if value == present:
                    continue
                config, sentence = try_value(base, path, value)
                if config is None:
                    num_refused += 1
                    assert is_named(key, value, sentence), f"{base}: {'.'.join(path)}={value}: {sentence}"
                else:
                    num_accepted += 1
                    assert config != compose_base(base) or key in DECIDED_BY_OTHERS
    # A level of privacy needs its noise, and the noise the level: neither changes alone.
    assert num_accepted or key == "privacy.dp_level", f"no base accepts {key}"
    has_rule = any(key in rule.keys and not rule.allowed_anyway for rule in EFFECT_RULES)
    assert num_refused or not has_rule, f"no base refuses {key}, which has a rule"


def is_named(key: str, value: Any, sentence: str) -> bool:
    """Return whether a sentence names a key or its new value, or may name another key that it makes wrong."""
    if key in MAKES_OTHERS_WRONG:
        return True
    names = (key.split(".")[-1], str(value))
    return any(re.search(rf"(?<!\w){re.escape(name)}(?!\w)", sentence) for name in names)
