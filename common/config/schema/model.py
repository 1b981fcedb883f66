"""Settings of the shared model: the encoder and its decoder."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from common.config.names import require_plain_name, require_short
from common.config.schema.base import config_dataclass, require

MAX_CHANNELS = 16384  # of a decoder's level


@config_dataclass
class DecoderConfig:
    """A U-Net's decoder (common/modeling/decoder.py), built only when a task of the recipe needs a map."""

    channels: list[int] = field(
        default_factory=lambda: [256, 128, 64, 32, 16]
    )  # deepest level first, then up
    # `add`: every level has as many channels as what it is merged with.
    skip_connection: Literal["concat", "add"] = "concat"

    def __post_init__(self) -> None:
        """Check the ranges."""
        valid = bool(self.channels) and min(self.channels) >= 1 and max(self.channels) <= MAX_CHANNELS
        require(
            valid, f"backbone.decoder.channels is {self.channels}; give one or more, each 1 to {MAX_CHANNELS}"
        )
        require_short(self.channels, "backbone.decoder.channels")


@config_dataclass
class BackboneConfig:
    """A timm encoder by name, applied to every slice by itself."""

    name: str = "test_resnet"
    weights: str = "random"  # random | timm (the coordinator downloads them) | a file of the coordinator's
    slice_pooling: Literal["mean", "max"] = "mean"  # over the slices of a scan
    # Of the encoder. `group`: BatchNorm2d becomes GroupNorm.
    # `frozen`: batch norm with the statistics of `weights`.
    norm: Literal["batch", "group", "frozen"] = "batch"
    num_groups: int = 32  # of a GroupNorm, at most: the number must divide the channels
    mean: tuple[float, float, float] = (
        0.485,
        0.456,
        0.406,
    )  # of the three equal channels of an image in [0, 1]
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    drop_path_rate: float = 0.0
    decoder: DecoderConfig = field(default_factory=DecoderConfig)

    def __post_init__(self) -> None:
        """Check the ranges."""
        require_plain_name(
            self.name, "a backbone"
        )  # timm would read one with a ':' from a disk or the internet
        require(
            self.norm != "frozen" or self.weights != "random",
            "backbone.norm is frozen, but backbone.weights is random and has no statistics to keep; "
            "name a file of weights, or set backbone.norm=group",
        )
        require(min(self.std) > 0, f"backbone.std is {self.std}; each must be above 0")
        groups = self.num_groups
        require(1 <= groups <= 1024, f"backbone.num_groups is {groups}; it must be 1 to 1024")
        rate = self.drop_path_rate
        require(0 <= rate < 1, f"backbone.drop_path_rate is {rate}; it must be in [0, 1)")
