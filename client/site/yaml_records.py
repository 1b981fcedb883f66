"""Settings that a person writes as YAML, read into a checked record: the site file and the policy."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import TypeAdapter, ValidationError

from common.utils.errors import ConsiliumError, suggest

RecordT = TypeVar("RecordT")


def read_yaml_mapping(path: Path, source: str, remedy: str) -> dict[Any, Any]:
    """Return the mapping that a YAML file holds; an empty file holds none. Raises ConsiliumError."""
    try:
        values = yaml.safe_load(path.read_text())
        if values is None:
            return {}
        if not isinstance(values, dict):
            raise TypeError(f"expected a mapping, got {type(values).__name__}")
    except (OSError, yaml.YAMLError, ValueError, TypeError) as error:
        raise ConsiliumError(f"{source} {path} cannot be read ({type(error).__name__}); {remedy}") from error
    return values


def field_names(record_type: type[Any]) -> list[str]:
    """Return the names of a dataclass's fields."""
    return [field.name for field in fields(record_type)]


def check_keys(
    keys: Iterable[Any], valid_keys: Iterable[str], source: str, renamed_keys: Mapping[str, str]
) -> None:
    """Raise ConsiliumError for a key that is unknown, or for all that have been renamed."""
    valid = list(valid_keys)
    renamings = []
    for key in keys:
        if key in valid:
            continue
        if key not in renamed_keys:
            raise ConsiliumError(f"{source}: unknown key '{key}'{suggest(str(key), valid)}")
        renamings.append(f"'{key}' is now '{renamed_keys[key]}'")
    if renamings:
        pronoun = "it" if len(renamings) == 1 else "them"
        raise ConsiliumError(f"{source}: {', '.join(renamings)}; rename {pronoun}")


def parse_record(record_type: type[RecordT], values: Mapping[str, Any], source: str) -> RecordT:
    """Build a dataclass from values of its fields. Raises ConsiliumError for a wrong type or value."""
    try:
        return TypeAdapter(record_type).validate_python(values)
    except ValidationError as error:
        raise ConsiliumError(f"{source}: {_describe_first_error(error)}") from error


def _describe_first_error(error: ValidationError) -> str:
    first = error.errors()[0]
    if first["type"] == "value_error":  # raised by the dataclass's own checks, in a sentence of ours
        return str(first["ctx"]["error"])
    key = ".".join(str(part) for part in first["loc"])
    requirement = first["msg"].replace("Input should", "it should", 1)
    return f"{key} is {first['input']!r}; {requirement}"
