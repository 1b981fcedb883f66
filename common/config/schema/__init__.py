"""Every setting of a run: its type, its default, its range.

These are plain dataclasses, so that the trainer, the model and the losses need neither Hydra nor pydantic.
Hydra fills them from ``configs/`` and the command line (common/config/compose.py); a centre receives them
resolved. A value out of range is refused when the object is made.
"""

from __future__ import annotations

from dataclasses import field

from common.config.names import require_plain_name, require_short
from common.config.schema.base import (
    MAX_SEED,
    Precision,
    config_dataclass,
    require,
    require_bounded,
    require_range,
)
from common.config.schema.data import PhantomConfig, PreprocessConfig
from common.config.schema.federation import (
    AggregationConfig,
    Compression,
    EvaluationConfig,
    FederationConfig,
    MetricName,
    TrainingMode,
)
from common.config.schema.model import BackboneConfig, DecoderConfig
from common.config.schema.privacy import PrivacyConfig, SecureAggregationConfig
from common.config.schema.tasks import ContrastiveConfig, Task
from common.config.schema.training import AugmentConfig, LabelKind, LocalLayerGroup, OptimiserConfig, Stage

__all__ = [
    "AggregationConfig",
    "AugmentConfig",
    "BackboneConfig",
    "Compression",
    "Config",
    "ContrastiveConfig",
    "DecoderConfig",
    "EvaluationConfig",
    "FederationConfig",
    "LabelKind",
    "LocalLayerGroup",
    "MetricName",
    "OptimiserConfig",
    "PhantomConfig",
    "Precision",
    "PreprocessConfig",
    "PrivacyConfig",
    "SecureAggregationConfig",
    "Stage",
    "Task",
    "TrainingMode",
    "config_dataclass",
]


@config_dataclass
class Config:
    """A run's configuration, resolved.

    What the coordinator writes to ``config.yaml`` and sends to the centres.
    """

    recipe: str = ""
    seed: int = 1
    tasks: dict[str, Task] = field(default_factory=dict)
    stages: dict[str, Stage] = field(default_factory=dict)
    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    preprocess: PreprocessConfig = field(default_factory=PreprocessConfig)
    aggregation: AggregationConfig = field(default_factory=AggregationConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    federation: FederationConfig = field(default_factory=FederationConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)

    def __post_init__(self) -> None:
        """Check the names, and that every number is finite and every text short."""
        require_range("seed", self.seed, 0, MAX_SEED)
        if self.recipe:
            require_plain_name(self.recipe, "a recipe")
        require_short(self.tasks, "tasks")
        for name in self.tasks:
            require_plain_name(name, "a task")
            require(
                "." not in name, f"task '{name}' has a '.', which parts of the model's names; leave it out"
            )
        require_short(self.stages, "stages")
        for name in self.stages:
            require_plain_name(name, "a stage")
        require_bounded(self)
