"""A `Config` from plain values, and back: what stands in ``config.yaml`` and travels in messages."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from typing import Any

from pydantic import TypeAdapter, ValidationError

from common.config.renamed_keys import find_new_key
from common.config.schema import Config
from common.utils.errors import ConsiliumError, suggest

_CONFIG_ADAPTER: TypeAdapter[Config] = TypeAdapter(Config)


def parse_config(values: Mapping[str, Any]) -> Config:
    """Build a `Config` from plain values.

    Raises:
        ConsiliumError: one sentence, for an unknown or renamed key or a value out of range.
    """
    try:
        return _CONFIG_ADAPTER.validate_python(values)
    except ValidationError as error:
        raise ConsiliumError(_explain(error)) from error


def config_to_dict(config: Config) -> dict[str, Any]:
    """Return a configuration as plain values."""
    return dataclasses.asdict(config)


def _explain(error: ValidationError) -> str:
    """Return one sentence about the first thing that is wrong."""
    details = error.errors()[0]
    path = [str(part) for part in details["loc"]]
    key = ".".join(path)
    if details["type"] == "value_error":
        return str(details["ctx"]["error"])
    if details["type"] != "unexpected_keyword_argument":
        return f"{key}={details['input']!r} is refused: {details['msg']}"
    new_key = find_new_key(key)
    if new_key:
        return f"{key} is now {new_key}"
    return f"unknown key '{key}'{suggest(path[-1], _list_fields(path[:-1]))}"


def _list_fields(path: list[str]) -> list[str]:
    """Return the schema's field names under a path of keys; none where the path leaves the schema."""
    settings: Any = Config
    for key in path:
        settings = _follow_key(settings, key)
    if not dataclasses.is_dataclass(settings):
        return []
    return [field.name for field in dataclasses.fields(settings)]


def _follow_key(settings: Any, key: str) -> Any:
    """Return the type of one key's value: a settings class where it is one, or a dict's type."""
    if not dataclasses.is_dataclass(settings):
        return typing.get_args(settings)[-1]  # dict[str, Task]: any key is a task's name
    hint = typing.get_type_hints(settings).get(key)
    if typing.get_origin(hint) is dict:
        return hint
    for option in typing.get_args(hint):  # PhantomConfig | None
        if dataclasses.is_dataclass(option):
            return option
    return hint
