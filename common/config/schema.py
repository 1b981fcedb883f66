"""Every setting of a run: its type, its default, its range.

Plain dataclasses, so that the trainer, the model and the tasks need neither Hydra nor pydantic to be used. `common/config/compose.py` fills them
from `configs/` and the command line; a centre receives them resolved. A value out of range is refused when the object is made.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeVar, dataclass_transform

T = TypeVar("T")
TrainingMode = Literal["federated", "central", "local"]
LocalLayerGroup = Literal["batch_norm", "heads", "all"]
Precision = Literal["fp32", "bf16", "fp16"]
Compression = Literal["fp32", "fp16", "int8", "int4"]
MetricName = Literal[
    "auc",
    "f1",
    "balanced_accuracy",
    "sensitivity",
    "specificity",
    "accuracy",
    "gmean",
    "dice",
    "r2",
    "spearman",
]
LabelKind = Literal[
    "masked", "positive", "negative", "unlabelled"
]  # of a scan: with a mask; else by the stage's first binary task


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def config_dataclass(cls: type[T]) -> type[T]:
    """A frozen dataclass that pydantic, where it is used, lets no unknown key into."""
    cls.__pydantic_config__ = {"extra": "forbid"}  # type: ignore[attr-defined]
    return dataclass(frozen=True)(cls)


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(sentence)


@config_dataclass
class PreprocessConfig:
    """What is kept of a scan. Everything here is part of the store's key: a changed value is recomputed."""

    modality: Literal["any", "CT", "XR"] = (
        "any"  # of a cohort that says what its scans are, only these are taken
    )
    selection: Literal["kds", "kds_paper", "zquantile", "even"] = (
        "kds"  # even: a grid over the slices that hold lung
    )
    full_lung_search: bool = False  # look for lungs in every slice, in full; else in some, reduced (client/imaging/slice_pipeline.py): many times as fast
    num_slices: int = 8  # S, kept of a CT; a radiograph is always one
    num_views: int = (
        0  # further random choices of slices, each kept too: training takes one of them or the evaluation's
    )
    view: int = 0  # which of them; 0: the evaluation's own choice
    image_size: int = 256  # H = W of the kept slices, pixels
    crop: Literal["body", "lungs", "none"] = (
        "body"  # lungs: by the cohort's own lung mask (column `lungs`), else by our lung finder
    )
    window: tuple[float, float] = (
        -1000.0,
        300.0,
    )  # HU shown as 0..255; a cohort's own window columns come first

    def __post_init__(self) -> None:
        _require(
            1 <= self.num_slices <= 128, f"preprocess.num_slices is {self.num_slices}; it must be 1 to 128"
        )
        _require(0 <= self.num_views <= 32, f"preprocess.num_views is {self.num_views}; it must be 0 to 32")
        _require(0 <= self.view <= 32, f"preprocess.view is {self.view}; it must be 0 to 32")
        _require(
            16 <= self.image_size <= 1024,
            f"preprocess.image_size is {self.image_size}; it must be 16 to 1024 pixels",
        )
        _require(
            self.window[0] < self.window[1],
            f"preprocess.window is {self.window}; the first value must be the lower one",
        )


@config_dataclass
class ContrastiveConfig:
    """Momentum contrast (client/training/moco.py)."""

    projection_dim: int = 128  # of the projection that is compared
    temperature: float = 0.2
    queue_size: int = (
        1024  # keys of other scans that a scan is told from; never more than the centre has scans
    )
    momentum: float = 0.99  # of the key encoder within a round

    def __post_init__(self) -> None:
        _require(
            self.projection_dim >= 2 and self.queue_size >= 1,
            "contrast.width must be 2 or more, contrast.queue 1 or more",
        )
        _require(self.temperature > 0, f"contrast.temperature is {self.temperature}; it must be above 0")
        _require(0 <= self.momentum <= 1, f"contrast.momentum is {self.momentum}; it must be in [0, 1]")


@config_dataclass
class Task:
    """One thing to predict: a head, a loss, its metrics and its weight in the stage's loss.

    `segmentation`'s label is a mask (the column holds its file); `inpainting` (what was painted over) and `contrast` (which scan is it?) need none.
    """

    type: Literal["binary", "multiclass", "regression", "segmentation", "inpainting", "contrastive"] = (
        "binary"
    )
    label_column: str = ""  # the cohort's column; empty: the task's own name
    label_columns: list[str] = field(
        default_factory=list
    )  # several instead: a regression predicts each, a multiclass task bins their sum
    bin_edges: list[float] = field(
        default_factory=list
    )  # multiclass of a number: its class is how many of these it exceeds
    num_clusters: list[int] = field(
        default_factory=list
    )  # multiclass without labels: federated k-means makes them, with the best k of these
    clustering_id: str = (
        ""  # filled by the coordinator: under what name the centres keep the cluster of each scan
    )
    classes: list[str] = field(
        default_factory=list
    )  # multiclass; empty for `source`: filled with the federation's sources
    loss_weight: float = 1.0
    prior: Literal["none", "local", "global"] = "none"
    logit_adjustment: Literal["log", "fedlc"] = (
        "log"  # log: tau log pi (Menon et al. 2021); fedlc: -tau n^(-1/4) (Zhang et al. 2022)
    )
    tau: float = 1.0
    head_input: Literal["features", "map"] = (
        "features"  # map: the decoder's full-resolution map by pyramid pooling (common/modeling/pyramid_pooling.py)
    )
    hidden_dims: list[int] = field(
        default_factory=list
    )  # widths between input and output, each with ReLU and dropout
    input_relu: bool = False  # of the head's input
    xavier_init: bool = False  # the head's first weights (Glorot & Bengio 2010) instead of PyTorch's own
    dropout: float = 0.0
    head_update: Literal["local", "anchored", "moments"] = "local"
    server_head_lr: float = 0.005  # anchored: the head's step on the sum of its gradients over a round; at 0.1 it swings from source to source
    grad_scale: float = (
        1.0  # of the gradient that flows from this head into the backbone; negative: gradient reversal
    )
    dice_weight: float = 1.0  # segmentation: the Dice loss's weight beside cross-entropy's 1
    threshold: float = 0.5  # segmentation: a pixel is affected from this probability on
    severity_column: str = ""  # segmentation: a column with the known severity, compared with the affected share of the worse lung (Spearman's rho)
    mask_ratio: float = 0.25  # inpainting: of the picture that is painted over
    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    inference: bool = True  # false: the head is dropped when predicting

    def __post_init__(self) -> None:
        _require(self.loss_weight >= 0, f"a task's weight is {self.loss_weight}; it must be 0 or more")
        _require(0 <= self.dropout < 1, f"a task's dropout is {self.dropout}; it must be in [0, 1)")
        _require(-10 <= self.tau <= 10, f"a task's tau is {self.tau}; it must be in [-10, 10]")
        _require(
            self.type == "multiclass" or self.head_update != "moments", "head: moments needs kind: multiclass"
        )
        linear = not (self.hidden_dims or self.input_relu or self.head_input == "map")
        _require(self.head_update != "moments" or linear, "head: moments needs a linear head on the features")
        _require(
            list(self.bin_edges) == sorted(set(self.bin_edges)),
            f"a task's edges are {self.bin_edges}; they must ascend",
        )
        _require(
            not (self.bin_edges or self.num_clusters) or self.type == "multiclass",
            "edges and clusters need kind: multiclass",
        )
        _require(
            min(self.num_clusters, default=2) >= 2,
            f"a task's clusters are {self.num_clusters}; each must be 2 or more",
        )
        _require(
            min(self.hidden_dims, default=1) >= 1,
            f"a task's hidden widths are {self.hidden_dims}; each must be 1 or more",
        )
        _require(0 < self.threshold < 1, f"a task's cut is {self.threshold}; it must be in (0, 1)")
        _require(0 < self.mask_ratio < 1, f"a task's share is {self.mask_ratio}; it must be in (0, 1)")
        _require(self.dice_weight >= 0, f"a task's dice is {self.dice_weight}; it must be 0 or more")


@config_dataclass
class AugmentConfig:
    """Random changes of each training slice on its own; `p_*` are probabilities, 0 switches one off."""

    p_flip: float = 0.5  # left-right
    p_affine: float = 0.5
    translate: float = 0.2  # of the side
    scale: float = 0.2
    rotate: float = 30.0  # degrees
    p_brightness: float = 0.5
    brightness: float = 0.2
    contrast: float = 0.2
    p_hsv_value: float = 0.5
    hsv_value_shift: float = 20 / 255  # shift of the HSV value; hue and saturation do nothing to grey
    p_cutout: float = 0.2
    cutout_num_holes: int = 8
    cutout_hole_size: float = 0.125  # side of a hole as a share of the image's (32 of 256)
    p_elastic: float = 0.0
    elastic_displacement: float = 0.03  # largest displacement, of the side

    def __post_init__(self) -> None:
        odds = ("p_flip", "p_affine", "p_brightness", "p_hsv_value", "p_cutout", "p_elastic")
        for name in (
            *odds,
            "translate",
            "scale",
            "brightness",
            "contrast",
            "cutout_hole_size",
            "elastic_displacement",
        ):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"augment.{name} is {value}; it must be in [0, 1]")


@config_dataclass
class OptimiserConfig:
    """The centres' optimiser, made afresh each round so that a round depends on nothing but weights, data and seed."""

    name: Literal["adam", "adamw", "sgd"] = "adamw"
    lr: float = 3e-4
    head_lr_scale: float = 1.0  # the heads' and the decoder's lr as a multiple of it: what is new beside an encoder that has learnt before
    weight_decay: float = 0.01
    momentum: float = 0.9  # sgd only
    schedule: Literal["constant", "cosine", "plateau"] = (
        "cosine"  # cosine: over all steps of the stage; plateau: see factor
    )
    plateau_factor: float = 0.65  # plateau: of lr, after ...
    plateau_patience: int = 15  # ... more than this many rounds without a better validation value
    max_grad_norm: float = 0.0  # largest norm of a step's gradient; 0: no limit

    def __post_init__(self) -> None:
        _require(0 < self.lr <= 10, f"optimiser.lr is {self.lr}; it must be in (0, 10]")
        _require(self.head_lr_scale > 0, f"optimiser.head_lr is {self.head_lr_scale}; it must be above 0")
        _require(
            self.weight_decay >= 0, f"optimiser.weight_decay is {self.weight_decay}; it must be 0 or more"
        )
        _require(
            0 < self.plateau_factor < 1, f"optimiser.factor is {self.plateau_factor}; it must be in (0, 1)"
        )
        _require(
            self.plateau_patience >= 1, f"optimiser.patience is {self.plateau_patience}; it must be 1 or more"
        )
        _require(self.max_grad_norm >= 0, f"optimiser.clip is {self.max_grad_norm}; it must be 0 or more")


@config_dataclass
class Stage:
    """Tasks + initial weights + what is frozen, reset or kept personal + optimiser + number of rounds."""

    tasks: list[str] = field(default_factory=list)  # empty: all of the recipe's
    rounds: int = 8  # 0: the stage is passed over
    local_epochs: float = 1.0  # passes over a centre's scans in a round ...
    local_steps: int | None = None  # ... or a fixed number of optimiser steps at every centre
    local_steps_mode: Literal["proportional", "equal"] = (
        "proportional"  # equal: every centre takes the average centre's steps, so that its weight alone is its say
    )
    batch_size: int = 10  # scans
    grad_accum_steps: int = 1  # a batch is computed in this many parts
    drop_last: bool = False
    # a batch's shares by kind of label, drawn with replacement; empty: each scan once a pass
    sampling_ratios: dict[LabelKind, float] = field(default_factory=dict)
    optimiser: OptimiserConfig = field(default_factory=OptimiserConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    freeze: list[str] = field(default_factory=list)  # parameter-name patterns (fnmatch)
    freeze_fraction: float = (
        0.0  # of the encoder's convolutions, the shallower ones, with all that lies between them
    )
    reset: list[str] = field(default_factory=list)  # made anew at the stage's start
    local_layers: list[LocalLayerGroup] = field(
        default_factory=list
    )  # what a centre keeps as its own; [batch_norm] is FedBN, [all] no exchange
    fedprox_mu: float = 0.0  # FedProx's mu
    precision: Precision = "fp32"
    channels_last: bool = True
    grad_checkpointing: bool = False
    torch_compile: bool = False  # by torch.compile: minutes at first, worth it for long rounds on a GPU
    autotune: bool = (
        False  # each centre measures which precision, channels_last and threads are fastest there
    )

    def __post_init__(self) -> None:
        _require(0 <= self.rounds <= 100_000, f"stage.rounds is {self.rounds}; it must be 0 or more")
        _require(
            0 <= self.freeze_fraction <= 1,
            f"stage.freeze_fraction is {self.freeze_fraction}; it must be in [0, 1]",
        )
        _require(
            all(v >= 0 for v in self.sampling_ratios.values()),
            f"stage.sampling_ratios is {self.sampling_ratios}; no share may be below 0",
        )
        _require(
            not self.sampling_ratios or sum(self.sampling_ratios.values()) > 0,
            "stage.sampling_ratios gives every kind the share 0",
        )
        _require(self.local_epochs > 0, f"stage.local_epochs is {self.local_epochs}; it must be above 0")
        _require(
            self.local_steps is None or self.local_steps >= 1,
            f"stage.local_steps is {self.local_steps}; it must be 1 or more",
        )
        _require(self.batch_size >= 1, f"stage.batch_size is {self.batch_size}; it must be 1 or more")
        _require(
            1 <= self.grad_accum_steps <= self.batch_size,
            f"stage.grad_accum_steps is {self.grad_accum_steps}; it must be 1 to stage.batch_size ({self.batch_size})",
        )
        _require(self.fedprox_mu >= 0, f"stage.fedprox_mu is {self.fedprox_mu}; it must be 0 or more")


@config_dataclass
class DecoderConfig:
    """A U-Net's way up (common/modeling/decoder.py), there only when a task of the recipe needs a map."""

    channels: list[int] = field(
        default_factory=lambda: [256, 128, 64, 32, 16]
    )  # from the deepest up; the last one is the map's
    skip_connection: Literal["concat", "add"] = (
        "concat"  # add: every level is as wide as what it is merged with
    )

    def __post_init__(self) -> None:
        _require(
            bool(self.channels) and min(self.channels) >= 1,
            f"backbone.decoder.channels is {self.channels}; give one or more, each 1 or more",
        )


@config_dataclass
class BackboneConfig:
    """A timm encoder by name, applied to every slice alone."""

    name: str = "test_resnet"
    weights: str = "random"  # random | timm (the coordinator fetches them) | a file of the coordinator's
    slice_pooling: Literal["mean", "max"] = "mean"  # over the slices of a scan
    norm: Literal["batch", "group", "frozen"] = (
        "batch"  # of the encoder; group: BatchNorm2d becomes GroupNorm; frozen: as `weights` have it
    )
    num_groups: int = 32  # of a GroupNorm, at most: their number divides the channels
    mean: tuple[float, float, float] = (
        0.485,
        0.456,
        0.406,
    )  # of the three (equal) channels of a picture in [0, 1]
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    drop_path_rate: float = 0.0
    decoder: DecoderConfig = field(default_factory=DecoderConfig)

    def __post_init__(self) -> None:
        _require(
            self.norm != "frozen" or self.weights != "random",
            "backbone.norm is frozen, but backbone.weights random: there are no statistics to keep; give weights, or norm group",
        )
        _require(min(self.std) > 0, f"backbone.std is {self.std}; each must be above 0")
        _require(
            1 <= self.num_groups <= 1024, f"backbone.num_groups is {self.num_groups}; it must be 1 to 1024"
        )


@config_dataclass
class AggregationConfig:
    """How contributions become the next weights."""

    method: Literal["fedavg", "fedadam", "fedyogi"] = "fedavg"
    tau: float = 1.0  # w_c ~ n_c^(1 - tau): 0 is FedAvg, 1 weighs every centre alike
    weight_by: Literal["cells", "scans"] = "cells"  # cells: of (centre, class)
    server_lr: float = 1.0  # the server's learning rate on the averaged update
    beta1: float = 0.9  # fedadam, fedyogi
    beta2: float = 0.99
    eps: float = 1e-3
    compression: Compression = (
        "int8"  # of the changes that centres send (common/protocol/update_codec.py); fp32: as they are
    )
    max_norm_ratio: float = (
        10.0  # a contribution is left out when its norm exceeds this multiple of the others' median
    )
    robust_rule: Literal["none", "median", "trimmed_mean", "krum"] = (
        "none"  # against centres that lie (server/aggregation/robust.py); none: the weighted mean
    )
    num_byzantine: int = 1  # ... how many of them there may be

    def __post_init__(self) -> None:
        _require(0 <= self.tau <= 2, f"aggregation.tau is {self.tau}; it must be in [0, 2]")
        _require(self.server_lr > 0, f"aggregation.server_lr is {self.server_lr}; it must be above 0")
        _require(0 <= self.beta1 < 1 and 0 <= self.beta2 < 1, "aggregation.beta1 and beta2 must be in [0, 1)")
        _require(self.eps > 0, f"aggregation.eps is {self.eps}; it must be above 0")
        _require(
            self.max_norm_ratio > 1,
            f"aggregation.max_norm_ratio is {self.max_norm_ratio}; it must be above 1",
        )
        _require(
            self.num_byzantine >= 1,
            f"aggregation.num_byzantine is {self.num_byzantine}; it must be 1 or more",
        )

    @property
    def min_contributions(self) -> int:
        """The contributions that the rule needs to be worth anything: an honest majority; Krum's own condition is n > 2f + 2."""
        return {"none": 1, "krum": 2 * self.num_byzantine + 3}.get(
            self.robust_rule, 2 * self.num_byzantine + 1
        )


@config_dataclass
class SecureAggregationConfig:
    """Secure aggregation (common/privacy/secure_aggregation.py): the coordinator sees sums over centres, no centre's own numbers."""

    scope: Literal["model", "all"] = (
        "model"  # model: changes of weights; all: counts, metrics and every other query as well
    )
    clip_value: float = 4.0  # largest change of a parameter in a round, times the centre's weight; more is cut off, and counted in the sum
    quantization_bits: int = (
        26  # of a parameter: its grid is 2 clip / 2^bits; log2(centres) bits more travel, in whole bytes
    )
    threshold: float = 0.66  # share of the centres that began a sum who must stay to its end

    def __post_init__(self) -> None:
        _require(
            0 < self.clip_value <= 1e6,
            f"privacy.secagg.clip_value is {self.clip_value}; it must be above 0 and at most 1e6",
        )
        _require(
            8 <= self.quantization_bits <= 32,
            f"privacy.secagg.quantization_bits is {self.quantization_bits}; it must be 8 to 32",
        )
        _require(
            0.5 <= self.threshold <= 1,
            f"privacy.secagg.threshold is {self.threshold}; it must be in [0.5, 1]",
        )


@config_dataclass
class PrivacyConfig:
    """Differential privacy. `patient`: of the weights that a centre sends, the unit is the patient (client/training/dp_sgd.py). `central`: of the weights
    that the coordinator makes of them, the unit is the centre (server/aggregation/central_dp.py). Beside either or none: secure aggregation."""

    dp_level: Literal["none", "patient", "central"] = "none"
    epsilon: float = (
        0.0  # the loss that all rounds of this run together shall come to; the noise follows from it. Or ...
    )
    noise_multiplier: float = (
        0.0  # ... the noise multiplier itself: standard deviation of the noise, as a multiple of `clip`
    )
    delta: float = 1e-5  # the chance that the loss is larger; well below 1 / patients of the largest centre
    clip_norm: float = (
        1.0  # largest L2 norm of one patient's gradient, or of one centre's change of the weights
    )
    query_noise_multiplier: float = 0.0  # patient: noise multiplier of counts and scores, paid from the same epsilon; 0: they are exact (client/federation/noisy_counts.py)
    max_scans_per_patient: int = 1  # ... of one patient, at most as many count in such an answer
    adaptive_clip_quantile: float = (
        0.0  # central: the clip follows this quantile of the changes' norms, from `clip` on; 0: it stays
    )
    secagg: SecureAggregationConfig | None = None  # not with `central`

    def __post_init__(self) -> None:
        _require(
            0 <= self.epsilon <= 50, f"privacy.epsilon is {self.epsilon}; it must be above 0 and at most 50"
        )
        _require(
            self.noise_multiplier == 0 or 0.3 <= self.noise_multiplier <= 1000,
            f"privacy.noise_multiplier is {self.noise_multiplier}; it must be 0.3 to 1000, or 0",
        )
        _require(
            0 < self.delta <= 0.01, f"privacy.delta is {self.delta}; it must be above 0 and at most 0.01"
        )
        _require(0 < self.clip_norm <= 1e6, f"privacy.clip_norm is {self.clip_norm}; it must be above 0")
        noisy = self.dp_level == "patient" and 0.3 <= self.query_noise_multiplier <= 1000
        _require(
            self.query_noise_multiplier == 0 or noisy,
            f"privacy.query_noise_multiplier is {self.query_noise_multiplier}; it must be 0.3 to 1000 with privacy=patient, or 0",
        )
        _require(
            self.max_scans_per_patient >= 1,
            f"privacy.max_scans_per_patient is {self.max_scans_per_patient}; it must be 1 or more",
        )
        _require(
            0 <= self.adaptive_clip_quantile < 1,
            f"privacy.adaptive_clip_quantile is {self.adaptive_clip_quantile}; it must be in [0, 1)",
        )
        _require(
            self.dp_level == "none" or (self.epsilon > 0) != (self.noise_multiplier > 0),
            f"privacy.epsilon is {self.epsilon} and privacy.noise_multiplier {self.noise_multiplier}: one follows from the other; give one, set the other to 0",
        )


@config_dataclass
class PhantomConfig:
    """The made-up hospitals: counts scaled from the first paper's true ones."""

    scale: float = 0.1  # of 1222 training and 310 validation scans
    seed: int = 7
    num_slices: int = 24  # Z of a series
    image_size: int = 128

    def __post_init__(self) -> None:
        _require(0 < self.scale <= 1, f"federation.phantom.scale is {self.scale}; it must be in (0, 1]")
        _require(
            self.num_slices >= 10,
            f"federation.phantom.num_slices is {self.num_slices}; it must be 10 or more",
        )
        _require(
            self.image_size >= 64,
            f"federation.phantom.image_size is {self.image_size}; it must be 64 or more",
        )


@config_dataclass
class FederationConfig:
    """Who takes part, and when a round closes."""

    name: str = "phantom"
    centres: list[str] = field(default_factory=lambda: ["north", "east", "south", "west"])
    mode: TrainingMode = "federated"
    # loco: a run without each centre in turn, tested there; kfold: a run for each fold, of whose patients one part is the test split and the next
    # validation, whatever the cohort's own split is.
    evaluation: Literal["holdout", "loco", "kfold"] = "holdout"
    folds: int = 5  # kfold
    fold: int | None = None  # filled by kfold: the part that is the test split
    held_out_centres: list[str] = field(
        default_factory=list
    )  # filled by loco: centres that only test, with all their scans
    data_root: str = (
        ""  # simulation only: the folder with one subfolder a centre; a hospital names its own in site.yaml
    )
    quorum: float = 1.0  # share of the centres that must have contributed when the deadline passes
    round_timeout: float = 3600.0  # seconds
    round_retries: int = 2  # of a round below the quorum, before the run pauses
    join_timeout: float = 120.0  # seconds for the centres to appear
    phantom: PhantomConfig | None = None

    def __post_init__(self) -> None:
        _require(
            bool(self.centres),
            "federation.centres is empty; name the centres, e.g. federation.centres=[north,south]",
        )
        _require(
            len(set(self.centres)) == len(self.centres),
            f"federation.centres names a centre twice: {self.centres}",
        )
        _require(self.folds >= 3, f"federation.folds is {self.folds}; it must be 3 or more")
        _require(
            self.fold is None or 0 <= self.fold < self.folds,
            f"federation.fold is {self.fold}; it must be 0 to {self.folds - 1}",
        )
        some = set(self.held_out_centres) < set(self.centres)
        _require(
            some,
            f"federation.held_out_centres is {self.held_out_centres}; it must name some of federation.centres, not all",
        )
        _require(0 < self.quorum <= 1, f"federation.quorum is {self.quorum}; it must be in (0, 1]")
        _require(
            self.round_timeout > 0,
            f"federation.round_timeout is {self.round_timeout}; it must be above 0 seconds",
        )
        _require(
            self.round_retries >= 0, f"federation.round_retries is {self.round_retries}; it must be 0 or more"
        )


@config_dataclass
class EvaluationConfig:
    """How models are scored and the best one is chosen (on validation only)."""

    task: str = "covid"  # the task whose metric chooses
    metric: MetricName = "auc"
    reduction: Literal["macro", "pooled", "worst"] = "macro"
    checkpoint_selection: Literal["best", "last"] = (
        "best"  # last: a small validation set chooses noise, and an annealed stage ends at its best guess
    )
    threshold: float = 0.5
    histogram_bins: int = 256  # of the score histograms that leave a centre
    cross_site: Literal["none", "last"] = (
        "none"  # last: each centre's own model of the last round is scored at every centre (server/analysis/cross_site_evaluation.py)
    )
    image_statistics: bool = (
        True  # ask the centres once what their scans look like (client/federation/image_statistics.py)
    )
    missing_class: Literal["zero", "skip"] = (
        "skip"  # challenge score: F1 of a class that a source does not have
    )
    patience: int = 0  # rounds without a better validation value before a stage ends; 0: never
    warmup: int = 0  # rounds of a stage that patience does not count

    def __post_init__(self) -> None:
        _require(0 < self.threshold < 1, f"evaluation.threshold is {self.threshold}; it must be in (0, 1)")
        _require(
            8 <= self.histogram_bins <= 4096 and self.histogram_bins % 2 == 0,
            f"evaluation.histogram_bins is {self.histogram_bins}; it must be even, 8 to 4096",
        )


@config_dataclass
class Config:
    """A run, resolved: what the coordinator writes to `config.yaml` and sends to the centres."""

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
