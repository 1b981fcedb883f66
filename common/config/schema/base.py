"""What every settings class is made with: a frozen dataclass and a check of its values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal, TypeVar, dataclass_transform

T = TypeVar("T")
Precision = Literal["fp32", "bf16", "fp16"]


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def config_dataclass(cls: type[T]) -> type[T]:
    """Make a frozen dataclass into which pydantic, where it is used, lets no unknown key."""
    cls.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[attr-defined]
    return dataclass(frozen=True)(cls)


def require(condition: bool, sentence: str) -> None:
    """Raise ValueError with a sentence when a value is out of range."""
    if not condition:
        raise ValueError(sentence)


def require_finite(settings: Any, key: str = "") -> None:
    """Raise ValueError for a number in the settings, however deep, that is infinite or not a number."""
    if isinstance(settings, float):
        require(math.isfinite(settings), f"{key} is {settings}; it must be a finite number")
    elif is_dataclass(settings):
        for setting in fields(settings):
            require_finite(getattr(settings, setting.name), f"{key}.{setting.name}".lstrip("."))
    elif isinstance(settings, Mapping):
        for name, value in settings.items():
            require_finite(value, f"{key}.{name}")
    elif isinstance(settings, Sequence) and not isinstance(settings, str):
        for value in settings:
            require_finite(value, key)
