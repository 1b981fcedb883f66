"""Everything that crosses a hospital's wall, and nothing else. To send more, a field must be added here.

No pixel, no identifier, no per-scan score or prediction has a field. Arrays and facts are kept apart (`pack`, `unpack`); `common/protocol/flower_records.py`
puts them into Flower's records.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from common.modeling.parameters import Weights
from common.utils.errors import RefusalCode

Sums = dict[str, NDArray[np.float64]]


# --- from the coordinator -------------------------------------------------------------------------------------------------------------


@dataclass
class JoinRequest:
    """Who are you, and what have you got? The first message of a run."""

    run_id: str
    config: dict[str, Any]  # common.schema.Config, resolved


@dataclass
class StatisticsRequest:
    """An additive query: `name` says which sums over its scans the centre shall answer with (client/federation/query_handlers.py)."""

    run_id: str
    config: dict[str, Any]
    name: str  # counts | scores | moments | clusters | quality
    stage: str
    split: str = "train"
    task: str = ""  # moments: of this task's classes
    weights: Weights | None = None
    personal_rounds: list[tuple[str, int]] = field(
        default_factory=list
    )  # (stage, round) of the centre's own weights to lay over, in this order
    centroids: NDArray[np.float64] | None = None  # [K, D], clusters: the nearest is a scan's cluster
    clustering_id: str = ""  # clusters: keep each scan's cluster at the centre under this name
    base_digest: str = (
        ""  # when `weights.floats` are NONE: the digest of the weights that the centre holds, ...
    )
    encoded_delta: dict[str, NDArray[np.generic]] = field(
        default_factory=dict
    )  # ... what to add to them, in the run's codec (none: nothing), ...
    target_digest: str = ""  # ... and the digest of the sum


@dataclass
class TrainRequest:
    """Train a round from these weights."""

    run_id: str
    config: dict[str, Any]
    stage: str
    round: int
    weights: Weights
    global_counts: dict[str, list[float]] = field(
        default_factory=dict
    )  # {task: training scans per class, all centres}
    personal_rounds: list[tuple[str, int]] = field(default_factory=list)
    rounds_to_keep: list[int] = field(
        default_factory=list
    )  # rounds of this stage whose personal weights may still be asked for
    mean_centre_scans: float = 0.0  # training scans of the average centre: `stage.local_steps_mode: equal` takes as many steps everywhere
    lr_scale: float = 1.0  # what the learning rate is multiplied by (`schedule: plateau`)
    total_label_weight: dict[str, float] = field(
        default_factory=dict
    )  # secure aggregation: {task: all centres' weights before division, summed}
    base_digest: str = ""  # as in a Query
    encoded_delta: dict[str, NDArray[np.generic]] = field(default_factory=dict)
    target_digest: str = ""


@dataclass
class ShareKeysRequest:
    """Second step of a secure sum (common/privacy/secure_aggregation.py): the public keys of those who take part. Share your secrets among them."""

    run_id: str
    config: dict[str, Any]
    sum_id: str  # which one: as the centres named it when they gave their keys
    roster: dict[str, NDArray[np.generic]]  # {centre: uint8 [96]}


@dataclass
class MaskedInputRequest:
    """Third step: the others' shares for you. Send your numbers, masked towards all who sent shares."""

    run_id: str
    config: dict[str, Any]
    sum_id: str
    shares: dict[str, NDArray[np.generic]]  # {centre that sent it: uint8, encrypted for this centre}


@dataclass
class UnmaskRequest:
    """Last step: whose masked numbers are in the sum. Open what takes their masks away."""

    run_id: str
    config: dict[str, Any]
    sum_id: str
    survivors: list[str]


# --- from a centre --------------------------------------------------------------------------------------------------------------------


@dataclass
class JoinReply:
    """The answer to Hello."""

    centre: str
    cohorts: list[
        str
    ]  # the centres whose cohorts it holds: its own name, or all of them when data are pooled
    fingerprint: str  # of the code it runs
    sources: list[str]
    columns: list[str]  # those of the recipe that its cohort has
    scans: dict[str, int]  # {split: scans ready}
    skipped: dict[str, int]  # {reason: scans that could not be read}
    versions: dict[str, str]
    device: str
    notes: list[str] = field(default_factory=list)
    policy: dict[str, Any] = field(
        default_factory=dict
    )  # the rules in force there, as the hospital wrote them; none: it allows everything


@dataclass
class StatisticsReply:
    """The answer to a Query: sums over scans, keyed `cohort/task/what`. Sums of all centres are added key by key."""

    centre: str
    sums: Sums  # none when they come masked, in a secure sum, ...
    seconds: float = 0.0
    sum_id: str = ""  # ... which this names, ...
    public_keys: NDArray[np.generic] | None = None  # ... with this centre's public keys for it, uint8 [96]


@dataclass
class TrainReply:
    """What a centre sends back in a round."""

    centre: str
    delta: NDArray[
        np.float32
    ]  # [P] weights after minus weights received; empty when the stage keeps all weights personal, or when ...
    int_buffers: NDArray[np.int64]  # [Q] counters after
    scans: int
    steps: int
    losses: dict[str, list[float]]  # {task: [summed loss, labelled scans seen]}
    seconds: float
    encoded_delta: dict[str, NDArray[np.generic]] = field(
        default_factory=dict
    )  # ... it travels as arrays of the run's codec (common/protocol/update_codec.py)
    epsilon: float | None = (
        None  # `privacy=patient`: what its cohort has lost so far, at the run's delta, in this and all earlier runs
    )
    sum_id: str = ""  # as in an Answer: the change comes masked. With `hide: all` scans, steps, losses, counters and epsilon stay here as well
    public_keys: NDArray[np.generic] | None = None


@dataclass
class ShareKeysReply:
    """The answer to Share: this centre's secrets of this sum, in shares, each encrypted for the one who shall hold it."""

    centre: str
    shares: dict[str, NDArray[np.generic]]  # {centre: uint8}


@dataclass
class MaskedInputReply:
    """The answer to Mask: numbers of a ring, each as likely as any other to who does not hold the masks."""

    centre: str
    values: NDArray[np.uint8]  # [V * bytes] the change of the V parameters times the centre's weight
    fixed_point_sums: NDArray[
        np.uint64
    ]  # [R] sums, or the change of the buffers and the centre's weights (common/privacy/secure_aggregation.py)


@dataclass
class UnmaskReply:
    """The answer to Unmask: of each centre that began the sum a share of one secret, never of both."""

    centre: str
    shares: dict[
        str, NDArray[np.generic]
    ]  # {centre: uint8}: of a survivor's own mask; of a drop-out's key to the masks it shares with others


@dataclass
class BaseWeightsMissing:
    """The centre does not hold the weights that the request builds on: send them whole."""

    centre: str


@dataclass
class Refusal:
    """The centre will not or cannot answer. `reason` holds no path, name or identifier."""

    centre: str
    reason: str
    permanent: bool = False  # by choice: asking again is no use
    code: RefusalCode = RefusalCode.ERROR

    def __post_init__(self) -> None:
        """Turn the code's text, as it came over the wire, into a `RefusalCode`."""
        self.code = RefusalCode(self.code)


SecureSumRequest = ShareKeysRequest | MaskedInputRequest | UnmaskRequest
Request = JoinRequest | StatisticsRequest | TrainRequest | SecureSumRequest
Reply = (
    JoinReply
    | StatisticsReply
    | TrainReply
    | BaseWeightsMissing
    | Refusal
    | ShareKeysReply
    | MaskedInputReply
    | UnmaskReply
)
MESSAGE_TYPES: dict[str, type[Any]] = {c.__name__: c for c in (*get_args(Request), *get_args(Reply))}

ARRAY_DICT_FIELDS = ("sums", "encoded_delta", "roster", "shares")  # fields that are arrays by name


def pack_message(message: Request | Reply) -> tuple[dict[str, NDArray[np.generic]], dict[str, Any]]:
    """(arrays, facts): every array by its field (`field/key` inside a dict), the rest as JSON-able facts with the message's kind."""
    arrays: dict[str, NDArray[np.generic]] = {}
    facts: dict[str, Any] = {"kind": type(message).__name__}
    for f in dataclasses.fields(message):
        value = getattr(message, f.name)
        if isinstance(value, np.ndarray):
            arrays[f.name] = value
        elif isinstance(value, Weights):
            arrays[f"{f.name}.floats"], arrays[f"{f.name}.int_buffers"] = value.floats, value.int_buffers
        elif f.name in ARRAY_DICT_FIELDS:
            arrays.update({f"{f.name}/{key}": array for key, array in value.items()})
        else:
            facts[f.name] = value
    return arrays, facts


def unpack_message(arrays: Mapping[str, NDArray[np.generic]], metadata: Mapping[str, Any]) -> Request | Reply:
    """The inverse of `pack`. Raises KeyError or TypeError for a record that is none of ours."""
    metadata = dict(metadata)
    cls = MESSAGE_TYPES[metadata.pop("kind")]
    for f in dataclasses.fields(cls):
        if f"{f.name}.floats" in arrays:
            floats, integers = arrays[f"{f.name}.floats"], arrays[f"{f.name}.int_buffers"]
            metadata[f.name] = Weights(np.asarray(floats, np.float32), np.asarray(integers, np.int64))
        elif f.name in ARRAY_DICT_FIELDS:
            metadata[f.name] = {
                key.removeprefix(f"{f.name}/"): array
                for key, array in arrays.items()
                if key.startswith(f"{f.name}/")
            }
        elif f.name in arrays:
            metadata[f.name] = arrays[f.name]
    message: Request | Reply = cls(**metadata)
    return message


def metadata_to_json(metadata: Mapping[str, Any]) -> str:
    """Facts as they travel: one JSON text, keys sorted."""
    return json.dumps(metadata, sort_keys=True)


def add_sums(total: Sums, sums: Sums) -> Sums:
    """`total += sums`, key by key: the server's half of an additive query. Raises ValueError when shapes differ."""
    for key, array in sums.items():
        if key not in total:
            total[key] = np.array(array, dtype=np.float64)
        elif total[key].shape != array.shape:
            raise ValueError(f"'{key}' has shape {array.shape}, others sent {total[key].shape}")
        else:
            total[key] += array
    return total
