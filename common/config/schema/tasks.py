"""Settings of a task: what is predicted, by which head, with which loss."""

from __future__ import annotations

from dataclasses import field
from typing import Literal

from common.config.names import (
    MAX_CLUSTERING_ID_LENGTH,
    require_plain_name,
    require_plain_text,
    require_plain_texts,
    require_short,
)
from common.config.schema.base import config_dataclass, require

MAX_UNITS = 65536  # of a layer of a head
MAX_QUEUE_SIZE = 1_000_000
MAX_CLUSTERS = 1000


@config_dataclass
class ContrastiveConfig:
    """Momentum contrast (client/training/moco.py)."""

    projection_dim: int = 128  # of the vectors that are compared
    temperature: float = 0.2
    queue_size: int = 1024  # keys of other scans to tell a scan from; at most as many as the centre has scans
    momentum: float = 0.99  # of the key encoder, within a round

    def __post_init__(self) -> None:
        """Check the ranges."""
        require(
            2 <= self.projection_dim <= MAX_UNITS,
            f"contrastive.projection_dim is {self.projection_dim}; it must be 2 to {MAX_UNITS}",
        )
        require(
            1 <= self.queue_size <= MAX_QUEUE_SIZE,
            f"contrastive.queue_size is {self.queue_size}; it must be 1 to {MAX_QUEUE_SIZE}",
        )
        require(self.temperature > 0, f"contrastive.temperature is {self.temperature}; it must be above 0")
        require(0 <= self.momentum <= 1, f"contrastive.momentum is {self.momentum}; it must be in [0, 1]")


@config_dataclass
class Task:
    """One thing to predict: a head, a loss, its metrics and its weight in the stage's loss.

    The label of `segmentation` is a mask: its column holds the mask's file. `inpainting` (restore what was
    masked) and `contrastive` (tell a scan from others) need no label.
    """

    type: Literal["binary", "multiclass", "regression", "segmentation", "inpainting", "contrastive"] = (
        "binary"
    )
    label_column: str = ""  # the cohort's column; empty: the task's own name
    # Several columns instead: regression predicts each, a multiclass task bins their sum.
    label_columns: list[str] = field(default_factory=list)
    # Multiclass of a number: the class is how many of these edges the number exceeds.
    bin_edges: list[float] = field(default_factory=list)
    # Multiclass without labels: federated k-means makes the classes, with the best k of these.
    num_clusters: list[int] = field(default_factory=list)
    clustering_id: str = (
        ""  # set by the coordinator: the name under which the centres keep each scan's cluster
    )
    classes: list[str] = field(
        default_factory=list
    )  # multiclass; empty for `source`: the federation's sources
    loss_weight: float = 1.0
    prior: Literal["none", "local", "global"] = "none"  # class frequencies for the logit adjustment
    # `log`: tau log pi (Menon et al. 2021). `fedlc`: -tau n^(-1/4) (Zhang et al. 2022).
    logit_adjustment: Literal["log", "fedlc"] = "log"
    tau: float = 1.0  # strength of the logit adjustment
    # `map`: the decoder's full-resolution map, by pyramid pooling (common/modeling/pyramid_pooling.py).
    head_input: Literal["features", "map"] = "features"
    hidden_dims: list[int] = field(default_factory=list)  # of the head, each with ReLU and dropout
    input_relu: bool = False  # apply ReLU to the head's input
    xavier_init: bool = False  # initialise the head by Glorot and Bengio (2010) instead of PyTorch's default
    dropout: float = 0.0
    # `anchored`: the head is frozen in local steps, and the server applies its summed gradient.
    # `moments`: the server fits a linear discriminant to the centres' class moments.
    head_update: Literal["local", "anchored", "moments"] = "local"
    server_head_lr: float = 0.005  # of an anchored head; at 0.1 it swings from source to source
    grad_scale: float = 1.0  # of the gradient from this head into the backbone; negative: gradient reversal
    dice_weight: float = 1.0  # segmentation: weight of the Dice loss beside 1 for cross-entropy
    threshold: float = 0.5  # segmentation: a pixel is affected from this probability on
    # Segmentation: a column with the known severity, to compare with the affected fraction of the worse lung.
    severity_column: str = ""
    mask_ratio: float = 0.25  # inpainting: fraction of the image that is masked
    contrastive: ContrastiveConfig = field(default_factory=ContrastiveConfig)
    inference: bool = True  # false: the head is dropped when predicting

    def __post_init__(self) -> None:
        """Check the names, the ranges, and what depends on the task's type."""
        self._check_names()
        require(self.loss_weight >= 0, f"a task's loss_weight is {self.loss_weight}; it must be 0 or more")
        rate = self.server_head_lr
        require(0 < rate <= 10, f"a task's server_head_lr is {rate}; it must be in (0, 10]")
        require(0 <= self.dropout < 1, f"a task's dropout is {self.dropout}; it must be in [0, 1)")
        require(-10 <= self.tau <= 10, f"a task's tau is {self.tau}; it must be in [-10, 10]")
        require(0 < self.threshold < 1, f"a task's threshold is {self.threshold}; it must be in (0, 1)")
        require(0 < self.mask_ratio < 1, f"a task's mask_ratio is {self.mask_ratio}; it must be in (0, 1)")
        require(self.dice_weight >= 0, f"a task's dice_weight is {self.dice_weight}; it must be 0 or more")
        fewest_units = min(self.hidden_dims, default=1)
        most_units = max(self.hidden_dims, default=1)
        require(
            fewest_units >= 1 and most_units <= MAX_UNITS,
            f"a task's hidden_dims are {self.hidden_dims}; each must be 1 to {MAX_UNITS}",
        )
        fewest_clusters = min(self.num_clusters, default=2)
        most_clusters = max(self.num_clusters, default=2)
        require(
            fewest_clusters >= 2 and most_clusters <= MAX_CLUSTERS,
            f"a task's num_clusters are {self.num_clusters}; each must be 2 to {MAX_CLUSTERS}",
        )
        require(
            len(set(self.label_columns)) == len(self.label_columns),
            f"a task's label_columns name a column twice: {self.label_columns}",
        )
        require(
            len(set(self.classes)) == len(self.classes), f"a task's classes name one twice: {self.classes}"
        )
        ascending = sorted(set(self.bin_edges))
        require(
            list(self.bin_edges) == ascending, f"a task's bin_edges are {self.bin_edges}; they must ascend"
        )
        if self.type != "multiclass":
            require(not self.bin_edges, "a task's bin_edges need type: multiclass")
            require(not self.num_clusters, "a task's num_clusters need type: multiclass")
            require(self.head_update != "moments", "head_update: moments needs type: multiclass")
        if self.head_update == "moments":
            linear = not self.hidden_dims and not self.input_relu and self.head_input == "features"
            require(
                linear,
                "head_update: moments needs a linear head on the features, "
                "without hidden_dims, input_relu and head_input: map",
            )

    def _check_names(self) -> None:
        for column in (self.label_column, self.severity_column):
            if column:
                require_plain_text(column, "a column")
        require_plain_texts(self.label_columns, "a task's label_columns")
        require_plain_texts(self.classes, "a task's classes")
        require_short(self.hidden_dims, "a task's hidden_dims")
        require_short(self.num_clusters, "a task's num_clusters")
        require_short(self.bin_edges, "a task's bin_edges")
        if self.clustering_id:
            require_plain_name(self.clustering_id, "a clustering", MAX_CLUSTERING_ID_LENGTH)
