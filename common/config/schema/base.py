"""What every settings class is made with: a frozen dataclass and a check of its values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, Literal, TypeVar, dataclass_transform

T = TypeVar("T")
MAX_SEED = 2**63 - 1
MAX_LENGTH = 1000  # of any text, such as a path
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


def require_range(key: str, value: float, low: float, high: float) -> None:
    """Raise ValueError when a number is not in [low, high]."""
    require(low <= value <= high, f"{key} is {value}; it must be {low:g} to {high:g}")


def require_bounded(settings: Any, key: str = "") -> None:
    """Raise ValueError for a number in the settings that is not finite, or a text that is too long."""
    if isinstance(settings, float):
        require(math.isfinite(settings), f"{key} is {settings}; it must be a finite number")
    elif isinstance(settings, str):
        length = len(settings)
        require(length <= MAX_LENGTH, f"{key} has {length} characters; it may have {MAX_LENGTH}")
    elif is_dataclass(settings):
        for setting in fields(settings):
            require_bounded(getattr(settings, setting.name), f"{key}.{setting.name}".lstrip("."))
    elif isinstance(settings, Mapping):
        for name, value in settings.items():
            require_bounded(value, f"{key}.{name}")
    elif isinstance(settings, Sequence):
        for value in settings:
            require_bounded(value, key)
