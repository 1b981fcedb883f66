"""Settings of the federation: who takes part, how updates are aggregated, and how models are scored."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from common.config.names import MAX_LIST_LENGTH, require_plain_name, require_short
from common.config.schema.base import config_dataclass, require, require_range
from common.config.schema.data import PhantomConfig

MAX_SECONDS = 30 * 24 * 3600.0  # of a wait
TrainingMode = Literal["federated", "central", "local"]
Compression = Literal["fp32", "fp16", "int8", "int4"]
MetricName = Literal[
    "auc", "f1", "balanced_accuracy", "sensitivity", "specificity",
    "accuracy", "gmean", "dice", "r2", "spearman",
]  # fmt: skip


@config_dataclass
class AggregationConfig:
    """How the centres' updates become the next weights."""

    method: Literal["fedavg", "fedadam", "fedyogi"] = "fedavg"
    tau: float = 1.0  # w_c ~ n_c^(1 - tau): 0 is FedAvg, 1 weighs every centre alike
    weight_by: Literal["cells", "scans"] = "cells"  # cells: of (centre, class)
    server_lr: float = 1.0  # the server's learning rate on the mean update
    beta1: float = 0.9  # fedadam, fedyogi
    beta2: float = 0.99
    eps: float = 1e-3
    compression: Compression = "int8"  # of the updates (common/protocol/update_codec.py); fp32: none
    max_norm_ratio: float = (
        10.0  # an update is left out when its norm exceeds this multiple of the others' median
    )
    # Against centres that send false updates (server/aggregation/robust.py). `none`: the weighted mean.
    robust_rule: Literal["none", "median", "trimmed_mean", "krum"] = "none"
    num_byzantine: int = 1  # how many such centres the robust rule has to withstand

    def __post_init__(self) -> None:
        """Check the ranges."""
        require(0 <= self.tau <= 2, f"aggregation.tau is {self.tau}; it must be in [0, 2]")
        rate = self.server_lr
        require(0 < rate <= 1000, f"aggregation.server_lr is {rate}; it must be above 0, at most 1000")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"aggregation.{name} is {value}; it must be in [0, 1)")
        require(0 < self.eps <= 1, f"aggregation.eps is {self.eps}; it must be in (0, 1]")
        ratio = self.max_norm_ratio
        byzantine = self.num_byzantine
        require(ratio > 1, f"aggregation.max_norm_ratio is {ratio}; it must be above 1")
        require(byzantine >= 1, f"aggregation.num_byzantine is {byzantine}; it must be 1 or more")
        require_range("aggregation.num_byzantine", byzantine, 1, MAX_LIST_LENGTH)

    @property
    def min_contributions(self) -> int:
        """Return how many updates the robust rule needs.

        An honest majority, or Krum's own condition n > 2f + 2.
        """
        if self.robust_rule == "none":
            return 1
        if self.robust_rule == "krum":
            return 2 * self.num_byzantine + 3
        return 2 * self.num_byzantine + 1


@config_dataclass
class FederationConfig:
    """Who takes part, and when a round closes."""

    name: str = "phantom"
    centres: list[str] = field(default_factory=lambda: ["north", "east", "south", "west"])
    mode: TrainingMode = "federated"
    # `loco`: one run for each centre, which is left out of training and tested.
    # `kfold`: one run for each fold. The fold's patients are the test split and the next fold's the
    # validation split, whatever split the cohort names.
    evaluation: Literal["holdout", "loco", "kfold"] = "holdout"
    folds: int = 5  # kfold
    fold: int | None = None  # set by kfold: the fold that is the test split
    held_out_centres: list[str] = field(
        default_factory=list
    )  # set by loco: centres that test with all their scans
    data_root: str = (
        ""  # simulation: the folder with a subfolder a centre; a hospital's data are in its site.yaml
    )
    quorum: float = 1.0  # fraction of the centres that must have replied when the round times out
    round_timeout: float = 3600.0  # seconds
    round_retries: int = 2  # of a round below the quorum, before the run pauses
    join_timeout: float = 120.0  # seconds for the centres to appear
    phantom: PhantomConfig | None = None

    def __post_init__(self) -> None:
        """Check the ranges, and that centres are named once."""
        centres = self.centres
        held_out = self.held_out_centres
        require(
            bool(centres),
            "federation.centres is empty; name the centres, e.g. federation.centres=[north,south]",
        )
        require_plain_name(self.name, "a federation")
        require_short(centres, "federation.centres")
        for centre in centres:
            require_plain_name(centre, "a centre")
        require(len(set(centres)) == len(centres), f"federation.centres names a centre twice: {centres}")
        # With many folds, a fold's test split is a handful of patients, or a single one.
        require(3 <= self.folds <= 20, f"federation.folds is {self.folds}; it must be 3 or more, at most 20")
        in_range = self.fold is None or 0 <= self.fold < self.folds
        require(in_range, f"federation.fold is {self.fold}; it must be 0 to {self.folds - 1}")
        require(
            set(held_out) < set(centres) and len(set(held_out)) == len(held_out),
            f"federation.held_out_centres is {held_out}; it must name some of federation.centres, not all, "
            "each once",
        )
        require(0 < self.quorum <= 1, f"federation.quorum is {self.quorum}; it must be in (0, 1]")
        timeout = self.round_timeout
        retries = self.round_retries
        require(timeout > 0, f"federation.round_timeout is {timeout}; it must be above 0 seconds")
        require_range("federation.round_timeout", timeout, 0, MAX_SECONDS)
        require_range("federation.round_retries", retries, 0, 1000)
        require_range("federation.join_timeout", self.join_timeout, 0, MAX_SECONDS)


@config_dataclass
class EvaluationConfig:
    """How models are scored, and how the best round is selected, on validation only."""

    task: str = "covid"  # the task whose metric selects
    metric: MetricName = "auc"
    reduction: Literal["macro", "pooled", "worst"] = "macro"  # over the centres
    # `last`: a small validation set selects noise, and an annealed stage ends with its best guess.
    checkpoint_selection: Literal["best", "last"] = "best"
    threshold: float = 0.5
    histogram_bins: int = 256  # of the score histograms that leave a centre
    # `last`: each centre's own model of the last round is scored at every centre.
    cross_site: Literal["none", "last"] = "none"
    image_statistics: bool = True  # ask the centres once for histograms of image statistics
    missing_class: Literal["zero", "skip"] = (
        "skip"  # challenge score: F1 of a class that a source does not have
    )
    patience: int = 0  # rounds without a better validation score before a stage ends; 0: never
    warmup: int = 0  # first rounds of a stage, which patience does not count

    def __post_init__(self) -> None:
        """Check the ranges."""
        require(0 < self.threshold < 1, f"evaluation.threshold is {self.threshold}; it must be in (0, 1)")
        bins = self.histogram_bins
        valid = 8 <= bins <= 4096 and bins % 2 == 0
        require(valid, f"evaluation.histogram_bins is {bins}; it must be even, 8 to 4096")
        require_range("evaluation.patience", self.patience, 0, 100_000)
        require_range("evaluation.warmup", self.warmup, 0, 100_000)
