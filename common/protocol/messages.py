"""Define every message that crosses a hospital's wall. Nothing else is sent; to send more, add a field here.

No message has a field for a pixel, an identifier, or the score or prediction of a single scan.
``message_packing`` splits a message into arrays and JSON metadata, and ``flower_records`` puts those into
Flower's records.

Sizes in the comments: P float values and Q integer counters of a model (common/modeling/parameters.py), V of
the P values are trainable parameters, R values in the sums of a secure sum
(common/privacy/secure_aggregation).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from common.modeling.parameters import Weights
from common.utils.errors import RefusalCode

Sums = dict[str, NDArray[np.float64]]  # keys: common/protocol/sum_key.py
ArraysByName = dict[str, NDArray[np.generic]]


# --- requests from the coordinator ------------------------------------------------------------------------


@dataclass
class JoinRequest:
    """Ask a centre what it is and which data it has. This is the first message of a run."""

    run_id: str
    config: dict[str, Any]  # the run's complete configuration (common.config.schema.Config)


@dataclass
class StatisticsRequest:
    """Ask for sums over the centre's scans (an additive query, client/federation/query_handlers.py)."""

    run_id: str
    config: dict[str, Any]
    name: str  # the query: counts, scores, moments, clusters or quality
    stage: str
    split: str = "train"  # the scans to sum over: train, val or test
    task: str = ""  # moments: the task whose classes the features are grouped by
    weights: Weights | None = None  # the model to compute with; None for queries that need no model
    # The centre's own local layers to use, as (stage, round) in this order; later ones replace earlier ones.
    personal_rounds: list[tuple[str, int]] = field(default_factory=list)
    centroids: NDArray[np.float64] | None = None  # [K, D], clusters: each scan is assigned to the nearest
    clustering_id: str = ""  # clusters: store each scan's cluster at the centre under this name
    # When `weights.floats` is EMPTY_PARAMS, the centre rebuilds the weights from those it has cached:
    base_digest: str = ""  # digest of the cached weights
    encoded_delta: ArraysByName = field(default_factory=dict)  # change to add, in the run's codec; {}: none
    target_digest: str = ""  # digest of the result


@dataclass
class TrainRequest:
    """Ask a centre to train for one round from the given weights."""

    run_id: str
    config: dict[str, Any]
    stage: str
    round: int
    weights: Weights
    # {task: training scans in each class, over all centres}
    global_counts: dict[str, list[float]] = field(default_factory=dict)
    personal_rounds: list[tuple[str, int]] = field(default_factory=list)  # as in a StatisticsRequest
    # Rounds of this stage whose local layers may still be requested; the centre deletes the others.
    rounds_to_keep: list[int] = field(default_factory=list)
    # Mean number of training scans per centre; `stage.local_steps_mode: equal` derives the steps from it.
    mean_centre_scans: float = 0.0
    lr_scale: float = 1.0  # factor on the learning rate (`optimiser.schedule: plateau`)
    # Secure aggregation: {task: sum of all centres' weights before normalisation}
    total_label_weight: dict[str, float] = field(default_factory=dict)
    base_digest: str = ""  # as in a StatisticsRequest
    encoded_delta: ArraysByName = field(default_factory=dict)  # as in a StatisticsRequest
    target_digest: str = ""  # as in a StatisticsRequest


@dataclass
class ShareKeysRequest:
    """Step 2 of a secure sum: send all participants' public keys and ask for encrypted secret shares."""

    run_id: str
    config: dict[str, Any]
    sum_id: str  # the sum's identifier, computed by the centres when they sent their keys
    roster: ArraysByName  # {centre: public keys, uint8 [96]}


@dataclass
class MaskedInputRequest:
    """Step 3 of a secure sum: deliver the other centres' shares and ask for the masked values."""

    run_id: str
    config: dict[str, Any]
    sum_id: str
    shares: ArraysByName  # {sending centre: its share, uint8, encrypted for the receiving centre}


@dataclass
class UnmaskRequest:
    """Step 4 of a secure sum: name the centres in the sum and ask for the shares that remove the masks."""

    run_id: str
    config: dict[str, Any]
    sum_id: str
    survivors: list[str]  # the centres whose masked values have been added


# --- replies from a centre --------------------------------------------------------------------------------


@dataclass
class JoinReply:
    """Describe a centre and its data; the reply to a JoinRequest."""

    centre: str
    cohorts: list[str]  # cohorts it holds: its own name, or those of all centres when data are pooled
    fingerprint: str  # hash of the code it runs (common/protocol/code_fingerprint.py)
    sources: list[str]  # where its scans were acquired
    columns: list[str]  # the recipe's label columns that its cohort has
    scans: dict[str, int]  # {split: scans that are ready for training or evaluation}
    skipped: dict[str, int]  # {reason: scans that could not be read}
    versions: dict[str, str]  # {package: version}
    device: str  # the device it computes on, such as "cpu" or "cuda:0"
    notes: list[str] = field(default_factory=list)  # remarks for the coordinator's operator
    # The hospital's policy as written in its policy.yaml; {}: no policy, everything is allowed
    policy: dict[str, Any] = field(default_factory=dict)


@dataclass
class StatisticsReply:
    """Return sums over scans; the reply to a StatisticsRequest. The coordinator adds them key by key."""

    centre: str
    sums: Sums  # {} when they are part of a secure sum
    seconds: float = 0.0  # computing time
    sum_id: str = ""  # secure sum: the identifier of the sum
    public_keys: NDArray[np.generic] | None = None  # secure sum: this centre's public keys, uint8 [96]


@dataclass
class TrainReply:
    """Return the result of a training round; the reply to a TrainRequest."""

    centre: str
    # [P] trained minus received weights. Empty when the stage exchanges no layers, when `encoded_delta` holds
    # the change, or when the change is part of a secure sum.
    delta: NDArray[np.float32]
    int_buffers: NDArray[np.int64]  # [Q] the model's integer counters after training
    scans: int  # training scans
    steps: int  # optimiser steps
    losses: dict[str, list[float]]  # {task: [summed loss, number of labelled scans]}
    seconds: float  # computing time
    encoded_delta: ArraysByName = field(default_factory=dict)  # the change, in the run's codec (update_codec)
    # `privacy.dp_level: patient`: privacy loss of the cohort so far at the run's delta, earlier runs included
    epsilon: float | None = None
    # Secure sum: the identifier of the sum. With `privacy.secagg.scope: all`, `scans`, `steps`, `losses`,
    # `int_buffers` and `epsilon` are not disclosed either.
    sum_id: str = ""
    public_keys: NDArray[np.generic] | None = None  # secure sum: this centre's public keys, uint8 [96]


@dataclass
class ShareKeysReply:
    """Return shares of this centre's two secrets; the reply to a ShareKeysRequest."""

    centre: str
    shares: ArraysByName  # {receiving centre: share, uint8, encrypted for that centre}


@dataclass
class MaskedInputReply:
    """Return masked values, uniformly random to all who lack the masks; the reply to a MaskedInputRequest."""

    centre: str
    values: NDArray[np.uint8]  # [V * bytes] change of the V parameters times the centre's weight, on a grid
    # [R] sums over scans; or the change of the non-trainable values times the centre's weight, and the weight
    fixed_point_sums: NDArray[np.uint64]


@dataclass
class UnmaskReply:
    """Return one secret share per centre that began the sum, never both; the reply to an UnmaskRequest."""

    centre: str
    # {centre: share, uint8}: of the seed of its own mask if it survived, else of its key for pairwise masks
    shares: ArraysByName


@dataclass
class BaseWeightsMissing:
    """Report that the weights named by `base_digest` are not cached and must be sent in full."""

    centre: str


@dataclass
class Refusal:
    """Decline a request."""

    centre: str
    reason: str  # a sentence for the coordinator's operator, without paths, names or identifiers of patients
    permanent: bool = False  # whether the same request would be refused again
    code: RefusalCode = RefusalCode.ERROR  # the kind of reason, for programs

    def __post_init__(self) -> None:
        """Convert the code from its text form on the wire into a RefusalCode."""
        self.code = RefusalCode(self.code)


SecureSumRequest = ShareKeysRequest | MaskedInputRequest | UnmaskRequest
Request = JoinRequest | StatisticsRequest | TrainRequest | SecureSumRequest
SecureSumReply = ShareKeysReply | MaskedInputReply | UnmaskReply
Reply = JoinReply | StatisticsReply | TrainReply | BaseWeightsMissing | Refusal | SecureSumReply


def add_sums(total: Sums, sums: Sums) -> Sums:
    """Add `sums` to `total` key by key, in place: the coordinator's half of an additive query.

    Raises:
        ValueError: An array's shape differs from that in the total.
    """
    for key, array in sums.items():
        if key not in total:
            total[key] = np.array(array, dtype=np.float64)
        elif total[key].shape != array.shape:
            raise ValueError(f"'{key}' has shape {array.shape}; the other centres sent {total[key].shape}")
        else:
            total[key] += array
    return total
