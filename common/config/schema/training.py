"""Settings of local training: stages, optimiser, augmentation."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from common.config.names import require_short
from common.config.schema.base import Precision, config_dataclass, require, require_range

MAX_EPOCHS = 100_000  # of a round; what is more is a mistake that would keep a centre busy for ever
MAX_STEPS = 10_000_000
MAX_BATCH_SIZE = 100_000
MAX_HOLES = 1000

LocalLayerGroup = Literal["batch_norm", "heads", "all"]
# Of a scan: `masked` if it has a mask, otherwise by the stage's first binary task.
LabelKind = Literal["masked", "positive", "negative", "unlabelled"]

UNIT_INTERVAL_FIELDS = (
    "p_flip", "p_affine", "p_brightness", "p_hsv_value", "p_cutout", "p_elastic",
    "translate", "scale", "brightness", "contrast", "hsv_value_shift", "cutout_hole_size",
    "elastic_displacement",
)  # fmt: skip


@config_dataclass
class AugmentConfig:
    """Random changes of each training slice by itself. `p_*` are probabilities; 0 switches a change off."""

    p_flip: float = 0.5  # left-right
    p_affine: float = 0.5
    translate: float = 0.2  # of the side
    scale: float = 0.2
    rotate: float = 30.0  # degrees
    p_brightness: float = 0.5
    brightness: float = 0.2
    contrast: float = 0.2
    p_hsv_value: float = 0.5
    hsv_value_shift: float = 20 / 255  # hue and saturation do not change a grey image
    p_cutout: float = 0.2
    cutout_num_holes: int = 8
    cutout_hole_size: float = 0.125  # side of a hole, as a fraction of the image's side (32 of 256)
    p_elastic: float = 0.0
    elastic_displacement: float = 0.03  # largest displacement, as a fraction of the side

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in UNIT_INTERVAL_FIELDS:
            value = getattr(self, name)
            require(0 <= value <= 1, f"augment.{name} is {value}; it must be in [0, 1]")
        holes = self.cutout_num_holes
        require(0 <= holes <= MAX_HOLES, f"augment.cutout_num_holes is {holes}; it must be 0 to {MAX_HOLES}")
        require_range("augment.rotate", self.rotate, 0, 180)


@config_dataclass
class OptimiserConfig:
    """The centres' optimiser, created anew in each round: a round depends on weights, data and seed alone."""

    name: Literal["adam", "adamw", "sgd"] = "adamw"
    lr: float = 3e-4
    head_lr_scale: float = 1.0  # heads and decoder learn with lr times this, beside a pretrained encoder
    weight_decay: float = 0.01
    momentum: float = 0.9  # sgd only
    # `cosine`: over all steps of the stage.
    # `plateau`: lr times plateau_factor after more than plateau_patience rounds without a better score.
    schedule: Literal["constant", "cosine", "plateau"] = "cosine"
    plateau_factor: float = 0.65
    plateau_patience: int = 15
    max_grad_norm: float = 0.0  # largest norm of a step's gradient; 0: no limit

    def __post_init__(self) -> None:
        """Check the ranges."""
        require(0 < self.lr <= 10, f"optimiser.lr is {self.lr}; it must be in (0, 10]")
        require(
            self.head_lr_scale > 0, f"optimiser.head_lr_scale is {self.head_lr_scale}; it must be above 0"
        )
        require(
            self.weight_decay >= 0, f"optimiser.weight_decay is {self.weight_decay}; it must be 0 or more"
        )
        factor = self.plateau_factor
        patience = self.plateau_patience
        require(0 < factor < 1, f"optimiser.plateau_factor is {factor}; it must be in (0, 1)")
        require(patience >= 1, f"optimiser.plateau_patience is {patience}; it must be 1 or more")
        require_range("optimiser.plateau_patience", patience, 1, 100_000)
        require(0 <= self.momentum < 1, f"optimiser.momentum is {self.momentum}; it must be in [0, 1)")
        require(
            self.max_grad_norm >= 0, f"optimiser.max_grad_norm is {self.max_grad_norm}; it must be 0 or more"
        )


@config_dataclass
class Stage:
    """Tasks, what is frozen, reset or kept local, an optimiser, and a number of rounds."""

    tasks: list[str] = field(default_factory=list)  # empty: all of the recipe's
    rounds: int = 8  # 0: the stage is skipped
    local_epochs: float = 1.0  # passes over a centre's scans in a round ...
    local_steps: int | None = None  # ... or a fixed number of optimiser steps at every centre
    # `equal`: every centre takes the average centre's number of steps,
    # so that its weight alone decides its influence.
    local_steps_mode: Literal["proportional", "equal"] = "proportional"
    batch_size: int = 10  # scans
    grad_accum_steps: int = 1  # a batch is computed in this many parts
    drop_last: bool = False
    # Composition of a batch by kind of label, drawn with replacement. Empty: each scan once a pass.
    sampling_ratios: dict[LabelKind, float] = field(default_factory=dict)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    freeze: list[str] = field(default_factory=list)  # patterns of parameter names (fnmatch)
    freeze_fraction: float = (
        0.0  # of the encoder's convolutions, from the input on, with everything between them
    )
    reset: list[str] = field(
        default_factory=list
    )  # patterns of parameters to initialise anew when the stage starts
    # What stays at the centre. [batch_norm] is FedBN; [all] exchanges nothing.
    local_layers: list[LocalLayerGroup] = field(default_factory=list)
    fedprox_mu: float = 0.0
    precision: Precision = "fp32"
    channels_last: bool = True
    grad_checkpointing: bool = False
    torch_compile: bool = False  # takes minutes at first; pays for long rounds on a GPU
    autotune: bool = (
        False  # each centre measures which precision, channels_last and threads are fastest there
    )

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("tasks", "freeze", "reset", "local_layers"):
            require_short(getattr(self, name), f"stage.{name}")
        require(0 <= self.rounds <= 100_000, f"stage.rounds is {self.rounds}; it must be 0 to 100000")
        fraction = self.freeze_fraction
        require(0 <= fraction <= 1, f"stage.freeze_fraction is {fraction}; it must be in [0, 1]")
        ratios = self.sampling_ratios
        lowest = min(ratios.values(), default=0)
        require(lowest >= 0, f"stage.sampling_ratios is {ratios}; no share may be below 0")
        require(not ratios or sum(ratios.values()) > 0, "stage.sampling_ratios gives every kind the share 0")
        epochs = self.local_epochs
        require(
            0 < epochs <= MAX_EPOCHS,
            f"stage.local_epochs is {epochs}; it must be above 0 and at most {MAX_EPOCHS}",
        )
        steps = self.local_steps
        require(
            steps is None or 1 <= steps <= MAX_STEPS,
            f"stage.local_steps is {steps}; it must be 1 to {MAX_STEPS}",
        )
        require(
            1 <= self.batch_size <= MAX_BATCH_SIZE,
            f"stage.batch_size is {self.batch_size}; it must be 1 to {MAX_BATCH_SIZE}",
        )
        layers = self.local_layers
        require(len(set(layers)) == len(layers), f"stage.local_layers names a group twice: {layers}")
        parts = self.grad_accum_steps
        batch_size = self.batch_size
        require(
            1 <= parts <= batch_size,
            f"stage.grad_accum_steps is {parts}; it must be 1 to stage.batch_size ({batch_size})",
        )
        require(self.fedprox_mu >= 0, f"stage.fedprox_mu is {self.fedprox_mu}; it must be 0 or more")
