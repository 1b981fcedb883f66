"""Everything that crosses a hospital's wall, and nothing else. To send more, a field must be added here.

No pixel, no identifier, no per-scan score or prediction has a field. Arrays and facts are kept apart (`pack`, `unpack`); `common/records.py`
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

from common.weights import Weights

Sums = dict[str, NDArray[np.float64]]


# --- from the coordinator -------------------------------------------------------------------------------------------------------------


@dataclass
class Hello:
    """Who are you, and what have you got? The first message of a run."""

    run: str
    config: dict[str, Any]  # common.schema.Config, resolved


@dataclass
class Query:
    """An additive query: `name` says which sums over its scans the centre shall answer with (client/queries.py)."""

    run: str
    config: dict[str, Any]
    name: str  # counts | scores | moments | clusters | quality
    stage: str
    split: str = "train"
    task: str = ""  # moments: of this task's classes
    weights: Weights | None = None
    personal: list[tuple[str, int]] = field(default_factory=list)  # (stage, round) of the centre's own weights to lay over, in this order
    centroids: NDArray[np.float64] | None = None  # [K, D], clusters: the nearest is a scan's cluster
    clustering: str = ""  # clusters: keep each scan's cluster at the centre under this name
    base: str = ""  # when `weights.floats` are NONE: the digest of the weights that the centre holds, ...
    change: dict[str, NDArray[np.generic]] = field(default_factory=dict)  # ... what to add to them, in the run's codec (none: nothing), ...
    digest: str = ""  # ... and the digest of the sum


@dataclass
class Train:
    """Train a round from these weights."""

    run: str
    config: dict[str, Any]
    stage: str
    round: int
    weights: Weights
    global_counts: dict[str, list[float]] = field(default_factory=dict)  # {task: training scans per class, all centres}
    personal: list[tuple[str, int]] = field(default_factory=list)
    keep: list[int] = field(default_factory=list)  # rounds of this stage whose personal weights may still be asked for
    average: float = 0.0  # training scans of the average centre: `stage.pace: equal` takes as many steps everywhere
    rate: float = 1.0  # what the learning rate is multiplied by (`schedule: plateau`)
    masses: dict[str, float] = field(default_factory=dict)  # secure aggregation: {task: all centres' weights before division, summed}
    base: str = ""  # as in a Query
    change: dict[str, NDArray[np.generic]] = field(default_factory=dict)
    digest: str = ""


@dataclass
class Share:
    """Second step of a secure sum (common/secagg.py): the public keys of those who take part. Share your secrets among them."""

    run: str
    config: dict[str, Any]
    sum: str  # which one: as the centres named it when they gave their keys
    roster: dict[str, NDArray[np.generic]]  # {centre: uint8 [96]}


@dataclass
class Mask:
    """Third step: the others' shares for you. Send your numbers, masked towards all who sent shares."""

    run: str
    config: dict[str, Any]
    sum: str
    shares: dict[str, NDArray[np.generic]]  # {centre that sent it: uint8, encrypted for this centre}


@dataclass
class Unmask:
    """Last step: whose masked numbers are in the sum. Open what takes their masks away."""

    run: str
    config: dict[str, Any]
    sum: str
    survivors: list[str]


# --- from a centre --------------------------------------------------------------------------------------------------------------------


@dataclass
class Presence:
    """The answer to Hello."""

    centre: str
    cohorts: list[str]  # the centres whose cohorts it holds: its own name, or all of them when data are pooled
    fingerprint: str  # of the code it runs
    sources: list[str]
    columns: list[str]  # those of the recipe that its cohort has
    scans: dict[str, int]  # {split: scans ready}
    skipped: dict[str, int]  # {reason: scans that could not be read}
    versions: dict[str, str]
    device: str
    notes: list[str] = field(default_factory=list)
    policy: dict[str, Any] = field(default_factory=dict)  # the rules in force there, as the hospital wrote them; none: it allows everything


@dataclass
class Answer:
    """The answer to a Query: sums over scans, keyed `cohort/task/what`. Sums of all centres are added key by key."""

    centre: str
    sums: Sums  # none when they come masked, in a secure sum, ...
    seconds: float = 0.0
    sum: str = ""  # ... which this names, ...
    keys: NDArray[np.generic] | None = None  # ... with this centre's public keys for it, uint8 [96]


@dataclass
class Contribution:
    """What a centre sends back in a round."""

    centre: str
    delta: NDArray[np.float32]  # [P] weights after minus weights received; empty when the stage keeps all weights personal, or when ...
    integers: NDArray[np.int64]  # [Q] counters after
    scans: int
    steps: int
    losses: dict[str, list[float]]  # {task: [summed loss, labelled scans seen]}
    seconds: float
    coded: dict[str, NDArray[np.generic]] = field(default_factory=dict)  # ... it travels as arrays of the run's codec (common/codec.py)
    epsilon: float | None = None  # `privacy=patient`: what its cohort has lost so far, at the run's delta, in this and all earlier runs
    sum: str = ""  # as in an Answer: the change comes masked. With `hide: all` scans, steps, losses, counters and epsilon stay here as well
    keys: NDArray[np.generic] | None = None


@dataclass
class Shares:
    """The answer to Share: this centre's secrets of this sum, in shares, each encrypted for the one who shall hold it."""

    centre: str
    shares: dict[str, NDArray[np.generic]]  # {centre: uint8}


@dataclass
class Masked:
    """The answer to Mask: numbers of a ring, each as likely as any other to who does not hold the masks."""

    centre: str
    values: NDArray[np.uint8]  # [V * bytes] the change of the V parameters times the centre's weight
    exact: NDArray[np.uint64]  # [R] sums, or the change of the buffers and the centre's weights (common/secagg.py)


@dataclass
class Unmasked:
    """The answer to Unmask: of each centre that began the sum a share of one secret, never of both."""

    centre: str
    shares: dict[
        str, NDArray[np.generic]
    ]  # {centre: uint8}: of a survivor's own mask; of a drop-out's key to the masks it shares with others


@dataclass
class Lacking:
    """The centre does not hold the weights that the request builds on: send them whole."""

    centre: str


@dataclass
class Refusal:
    """The centre will not or cannot answer. `reason` holds no path, name or identifier."""

    centre: str
    reason: str
    declined: bool = False  # by choice: asking again is no use


Step = Share | Mask | Unmask
Request = Hello | Query | Train | Step
Reply = Presence | Answer | Contribution | Lacking | Refusal | Shares | Masked | Unmasked
KINDS: dict[str, type[Any]] = {c.__name__: c for c in (*get_args(Request), *get_args(Reply))}

NAMED = ("sums", "coded", "change", "roster", "shares")  # fields that are arrays by name


def pack(message: Request | Reply) -> tuple[dict[str, NDArray[np.generic]], dict[str, Any]]:
    """(arrays, facts): every array by its field (`field/key` inside a dict), the rest as JSON-able facts with the message's kind."""
    arrays: dict[str, NDArray[np.generic]] = {}
    facts: dict[str, Any] = {"kind": type(message).__name__}
    for f in dataclasses.fields(message):
        value = getattr(message, f.name)
        if isinstance(value, np.ndarray):
            arrays[f.name] = value
        elif isinstance(value, Weights):
            arrays[f"{f.name}.floats"], arrays[f"{f.name}.integers"] = value.floats, value.integers
        elif f.name in NAMED:
            arrays.update({f"{f.name}/{key}": array for key, array in value.items()})
        else:
            facts[f.name] = value
    return arrays, facts


def unpack(arrays: Mapping[str, NDArray[np.generic]], facts: Mapping[str, Any]) -> Request | Reply:
    """The inverse of `pack`. Raises KeyError or TypeError for a record that is none of ours."""
    facts = dict(facts)
    cls = KINDS[facts.pop("kind")]
    for f in dataclasses.fields(cls):
        if f"{f.name}.floats" in arrays:
            floats, integers = arrays[f"{f.name}.floats"], arrays[f"{f.name}.integers"]
            facts[f.name] = Weights(np.asarray(floats, np.float32), np.asarray(integers, np.int64))
        elif f.name in NAMED:
            facts[f.name] = {key.removeprefix(f"{f.name}/"): array for key, array in arrays.items() if key.startswith(f"{f.name}/")}
        elif f.name in arrays:
            facts[f.name] = arrays[f.name]
    message: Request | Reply = cls(**facts)
    return message


def facts_json(facts: Mapping[str, Any]) -> str:
    """Facts as they travel: one JSON text, keys sorted."""
    return json.dumps(facts, sort_keys=True)


def add(total: Sums, sums: Sums) -> Sums:
    """`total += sums`, key by key: the server's half of an additive query. Raises ValueError when shapes differ."""
    for key, array in sums.items():
        if key not in total:
            total[key] = np.array(array, dtype=np.float64)
        elif total[key].shape != array.shape:
            raise ValueError(f"'{key}' has shape {array.shape}, others sent {total[key].shape}")
        else:
            total[key] += array
    return total
