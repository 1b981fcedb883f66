"""What a rule about a key's effect is made of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from common.config.schema import Config, Stage, Task

DENSE_TYPES = ("segmentation", "inpainting")
UNSUPERVISED_TYPES = ("inpainting", "contrastive")


@dataclass(frozen=True)
class Scope:
    """The configuration in which a key stands, and the key's own task or stage where it has one."""

    config: Config
    task: Task = field(default_factory=Task)
    stage: Stage = field(default_factory=Stage)


@dataclass(frozen=True)
class EffectRule:
    """What keys depend on.

    Attributes:
        keys: The keys.
        lacking: Completes "has no effect ...".
        remedy: What gives them an effect.
        is_effective: Whether they have one.
        allowed_anyway: Values that only say what is so where the key has no effect.
        is_shared: Files of ``configs/`` may set the key for all recipes, also for one that has no use for it.
    """

    keys: tuple[str, ...]
    lacking: str
    remedy: str
    is_effective: Callable[[Scope], bool]
    allowed_anyway: tuple[object, ...] = ()
    is_shared: bool = False


def uses_map(task: Task) -> bool:
    """Return whether a task's head reads the decoder's map."""
    return task.type in DENSE_TYPES or task.head_input == "map"


def has_decoder(scope: Scope) -> bool:
    """Return whether a task's head reads the decoder's map, so that there is a decoder."""
    return any(uses_map(task) for task in scope.config.tasks.values())
