"""What a hospital allows to leave, written by the hospital (`policy.yaml`, named in `site.yaml`) and enforced here, whatever the coordinator asks.

A request outside it is refused with a reason that the operator can read; a sum over fewer scans than `min_cell_count` does not leave.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from datetime import datetime, time
from pathlib import Path
from typing import TypeVar

import numpy as np
import yaml
from numpy.typing import NDArray

from common.config.schema import Config
from common.learning.losses import task_label_columns
from common.protocol.code_fingerprint import fingerprint_code
from common.protocol.messages import (
    MaskedInputReply,
    Reply,
    Request,
    StatisticsReply,
    StatisticsRequest,
    Sums,
    TrainReply,
    TrainRequest,
    pack_message,
)
from common.utils.errors import ConsiliumError, Refused, suggest

Floats = NDArray[np.float64]
ReplyT = TypeVar("ReplyT", bound=Reply)


@dataclass(frozen=True)
class Policy:
    """An empty list allows everything; 0 sets no limit."""

    recipes: list[str] = field(default_factory=list)
    fingerprints: list[str] = field(
        default_factory=list
    )  # of the code that may run here (`consilium-centre policy` prints this one's)
    allowed_labels: list[str] = field(default_factory=list)  # the cohort's columns that may be asked about
    queries: list[str] = field(default_factory=list)  # counts, scores, moments, clusters, quality
    min_cell_count: int = 1  # a sum over fewer scans does not leave; a count below it is reported as it
    max_message_bytes: int = 0  # of a message
    allowed_hours: str = ""  # when it computes, local time: 19:00-07:00
    gpu_memory: float = 0.0  # GiB that training may take
    require_secure_aggregation: bool = False  # required
    min_centres: int = 0  # a run, and a secure sum, of fewer centres is not answered
    epsilon: float = 0.0  # the largest privacy loss of a cohort, over all runs (client/site/privacy_budget.py); any limit requires differential privacy
    delta: float = 1e-5  # ... at this delta, whatever a run's own is
    min_query_noise: float = 0.0  # the least noise multiplier of counts and scores (`privacy.query_noise_multiplier`); 0: they may be exact

    def __post_init__(self) -> None:
        if (
            self.min_cell_count < 1
            or min(
                self.max_message_bytes, self.gpu_memory, self.epsilon, self.min_query_noise, self.min_centres
            )
            < 0
        ):
            raise ValueError(
                "min_cell_count must be 1 or more; max_message_bytes, gpu_memory, epsilon, min_query_noise and min_centres 0 or more"
            )
        if not 0 < self.delta <= 0.01:
            raise ValueError(f"delta is {self.delta}; it must be above 0 and at most 0.01")
        if self.allowed_hours:
            parse_hours(self.allowed_hours)


def parse_hours(text: str) -> tuple[time, time]:
    """Begin and end of `19:00-07:00`. Raises ValueError."""
    try:
        begin, end = (time.fromisoformat(part.strip()) for part in text.split("-"))
    except ValueError:
        raise ValueError(f"allowed_hours '{text}' are none; write them like 19:00-07:00") from None
    return begin, end


def load_policy(path: str) -> Policy:
    """The policy of a file; without one everything is allowed. Raises ConsiliumError: nothing leaves under a policy that cannot be read."""
    if not path:
        return Policy()
    known = {f.name: f for f in fields(Policy)}
    try:
        given = dict(yaml.safe_load(Path(path).read_text()) or {})
    except (OSError, yaml.YAMLError, ValueError, TypeError) as error:
        raise ConsiliumError(
            f"policy {path} cannot be read ({type(error).__name__}); nothing leaves until it can"
        ) from error
    for key, value in given.items():
        if key not in known:
            raise ConsiliumError(f"policy {path}: unknown key '{key}'{suggest(str(key), known)}")
        wanted = (
            list
            if "list" in str(known[key].type)
            else {"int": int, "str": str, "bool": bool}.get(str(known[key].type), (int, float))
        )
        if not isinstance(value, wanted) or (isinstance(value, bool) and known[key].type != "bool"):
            raise ConsiliumError(f"policy {path}: {key} is {value!r}; it must be of type {known[key].type}")
    try:
        return Policy(**given)
    except ValueError as error:
        raise ConsiliumError(f"policy {path}: {error}") from error


def authorise(policy: Policy, request: Request, config: Config, now: datetime) -> None:
    """Raises Refused, naming the rule, for a request that the policy does not allow."""

    def among(allowed: list[str], given: str, rule: str) -> None:
        if allowed and given not in allowed:
            raise Refused(
                f"this hospital's policy does not allow {rule} '{given}' (allowed: {', '.join(allowed)})"
            )

    among(policy.recipes, config.recipe, "the recipe")
    among(policy.fingerprints, fingerprint_code(), "the code")
    for name, task in config.tasks.items():
        for column in [*task_label_columns(name, task), *filter(None, [task.severity_column])]:
            among(policy.allowed_labels, column, "the label")
    if isinstance(request, StatisticsRequest):
        among(policy.queries, request.name, "the query")
    if policy.require_secure_aggregation and config.privacy.secagg is None:
        raise Refused(
            "this hospital's policy requires secure aggregation, which this run does not use; use privacy=secagg"
        )
    if len(config.federation.centres) < policy.min_centres:
        raise Refused(
            f"this hospital's policy asks for {policy.min_centres} centres or more, this run has {len(config.federation.centres)}"
        )
    if (
        policy.epsilon and config.privacy.dp_level != "patient"
    ):  # `central` trusts the coordinator with the hospital's own change
        raise Refused(
            f"this hospital's policy requires differential privacy (epsilon at most {policy.epsilon:g}), which this run does not use; "
            "use privacy=patient"
        )
    if policy.min_query_noise > config.privacy.query_noise_multiplier:
        raise Refused(
            f"this hospital's policy requires noise of {policy.min_query_noise:g} on counts and scores, and this run has {config.privacy.query_noise_multiplier:g}; "
            f"use privacy=patient privacy.query_noise_multiplier={policy.min_query_noise:g}"
        )
    if policy.allowed_hours and isinstance(request, TrainRequest | StatisticsRequest):
        begin, end = parse_hours(policy.allowed_hours)
        clock = now.time()
        if not (begin <= clock < end if begin <= end else clock >= begin or clock < end):
            raise Refused(
                f"this hospital computes from {policy.allowed_hours} only; it is {clock:%H:%M} there"
            )


def filter_reply(policy: Policy, reply: ReplyT, query_name: str = "") -> ReplyT:
    """The reply (to a `query`, where it is an answer) as it may leave. Raises Refused when it is too large."""
    if (
        isinstance(reply, StatisticsReply) and policy.min_cell_count > 1 and query_name != "counts"
    ):  # which counts by the smallest cell itself
        reply = dataclasses.replace(reply, sums=suppress_small_cells(reply.sums, policy.min_cell_count))
    size = sum(array.nbytes for array in pack_message(reply)[0].values())
    if (
        policy.max_message_bytes
        and size > policy.max_message_bytes
        and isinstance(reply, StatisticsReply | TrainReply | MaskedInputReply)
    ):
        raise Refused(
            f"this hospital's policy lets {policy.max_message_bytes} bytes leave in a message; this one would have {size}"
        )
    return reply


def suppress_small_cells(sums: Sums, min_count: int) -> Sums:
    """The sums without what fewer than `least` scans make up: cells of a table are emptied, bins of a histogram joined, sums left out."""
    kept: Sums = {}
    for key, value in sums.items():
        what = key.rpartition("/")[2]
        if what == "hist":
            kept[key] = np.stack([merge_small_bins(row, min_count) for row in value])
        elif what in ("confusion", "joint"):
            kept[key] = np.where(value < min_count, 0.0, value)
        elif what in ("regression", "overlap"):
            kept[key] = value if value[0] >= min_count else np.zeros_like(value)
        elif what == "loss":
            kept[key] = value if value[1] >= min_count else np.zeros_like(value)
        else:
            kept[key] = value
    if "n" in kept:  # of classes (moments) or clusters: rows of the other sums
        few = kept["n"] < min_count
        if "square" in kept and kept["square"].ndim == 2 and few.any() and (kept["n"] > 0)[few].any():
            return {
                key: np.zeros_like(value) for key, value in kept.items()
            }  # one matrix for all classes cannot be divided
        kept = {
            key: np.where(few.reshape(-1, *[1] * (value.ndim - 1)), 0.0, value)
            if len(value) == len(few)
            else value
            for key, value in kept.items()
        }
    return kept


def merge_small_bins(counts: Floats, min_count: int) -> Floats:
    """A histogram's row [bins] in which no filled bin holds fewer than `least`: neighbours are joined at the bin of their median scan. What is
    fewer in all is left out."""
    out, first, held = np.zeros_like(counts), 0, 0.0
    if counts.sum() < min_count:
        return out
    left = counts.sum()
    for place, n in enumerate(counts):
        held, left = held + n, left - n
        if held >= min_count and (left >= min_count or not left):
            group = np.repeat(np.arange(first, place + 1), counts[first : place + 1].astype(int))
            out[group[len(group) // 2]] += held
            first, held = place + 1, 0.0
    return out


def describe_policy(policy: Policy) -> Mapping[str, object]:
    """What the operator may know of it: its rules in force."""
    rules = {
        f.name: value
        for f in fields(policy)
        if (value := getattr(policy, f.name)) not in ([], "", 0, 0.0, False)
    }
    return rules if policy.epsilon else {name: value for name, value in rules.items() if name != "delta"}
