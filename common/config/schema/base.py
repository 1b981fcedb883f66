"""What every settings class is made with: a frozen dataclass and a check of its values."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeVar, dataclass_transform

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
