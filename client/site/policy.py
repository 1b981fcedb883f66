"""Enforce the hospital's policy: which requests the centre answers, and what may leave.

The hospital writes it as `policy.yaml` and names that file in `site.yaml`. A request that it does not allow
is refused with a reason for the coordinator's operator. What may leave in a reply: client/site/release.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, time
from pathlib import Path

from pydantic import StrictBool, StrictFloat, StrictInt

from client.site.yaml_records import check_keys, field_names, parse_record, read_yaml_mapping
from common.config.schema import Config
from common.learning.losses import list_read_columns
from common.protocol.code_fingerprint import fingerprint_code
from common.protocol.messages import (
    JoinRequest,
    Request,
    StatisticsRequest,
    TrainRequest,
)
from common.utils.errors import ConsiliumError, RefusalCode, Refused

SOURCE_COLUMN = "source"
RENAMED_POLICY_KEYS = {  # {key of 0.1.0: its name now}
    "smallest_cell": "min_cell_count",
    "labels": "allowed_labels",
    "max_bytes": "max_message_bytes",
    "hours": "allowed_hours",
    "secure_aggregation": "require_secure_aggregation",
    "smallest_federation": "min_centres",
    "noise": "min_query_noise",
}


@dataclass(frozen=True)
class Policy:
    """The rules of `policy.yaml`. An empty list or text allows everything; 0 sets no limit."""

    # Only recipes that `consilium-centre approve` has approved by their content (client/site/approvals.py).
    require_approval: StrictBool = False
    fingerprints: list[str] = field(
        default_factory=list
    )  # of the code that may run (`consilium-centre policy`)
    # Columns of the cohort that a run may read: labels, masks, severity, the label of a clustered task. Where
    # the list does not have `source`, the names of the scans' sources do not leave either.
    allowed_labels: list[str] = field(default_factory=list)
    queries: list[str] = field(default_factory=list)  # counts, scores, moments, clusters, quality
    min_cell_count: StrictInt = (
        1  # a sum over fewer scans does not leave; a smaller count is reported as this
    )
    max_message_bytes: StrictInt = 0
    # Local time in which the centre reads scans and computes: 19:00-07:00. What it began it finishes, and so
    # are secure sums: their later steps compute nothing on scans.
    allowed_hours: str = ""
    gpu_memory: StrictFloat = 0.0  # GiB that training may use
    require_secure_aggregation: StrictBool = False
    min_centres: StrictInt = 0  # centres that a run, and a secure sum, must have
    epsilon: StrictFloat = (
        0.0  # privacy loss of a patient over all runs; above 0, only private runs are allowed
    )
    delta: StrictFloat = 1e-5  # the delta at which `epsilon` holds, whatever a run's own is
    min_query_noise: StrictFloat = (
        0.0  # least `privacy.query_noise_multiplier` of a run; 0: counts may be exact
    )

    def __post_init__(self) -> None:
        """Check the values. Raises ValueError."""
        if self.min_cell_count < 1:
            raise ValueError(f"min_cell_count must be 1 or more, not {self.min_cell_count}")
        for name in ("max_message_bytes", "gpu_memory", "epsilon", "min_query_noise", "min_centres"):
            value = getattr(self, name)
            if value < 0:
                raise ValueError(f"{name} must be 0 or more, not {value}")
        if not 0 < self.delta <= 0.01:
            raise ValueError(f"delta is {self.delta}; it must be above 0 and at most 0.01")
        if self.allowed_hours:
            parse_hours(self.allowed_hours)


def parse_hours(text: str) -> tuple[time, time]:
    """Return the beginning and the end of a span such as `19:00-07:00`. Raises ValueError."""
    try:
        begin, end = (time.fromisoformat(part.strip()) for part in text.split("-"))
    except ValueError:
        raise ValueError(f"allowed_hours is '{text}'; write it like 19:00-07:00") from None
    return begin, end


def load_policy(path: str) -> Policy:
    """Return the policy of a file; without a file everything is allowed.

    Raises ConsiliumError for a file that cannot be read: then nothing is allowed.
    """
    if not path:
        return Policy()
    source = f"policy {path}"
    values = read_yaml_mapping(Path(path), "policy", "nothing leaves until it can be read")
    other_keys = [key for key in values if key != "recipes"]
    check_keys(other_keys, field_names(Policy), source, RENAMED_POLICY_KEYS)
    if "recipes" in values:
        raise ConsiliumError(
            f"{source}: 'recipes' protects nothing, because the coordinator writes a recipe's name; "
            "remove it, set require_approval: true, and approve each recipe with `consilium-centre approve`"
        )
    return parse_record(Policy, values, source)


def list_open_rules(policy: Policy) -> list[str]:
    """Return what a policy allows that a hospital may not have meant to, a sentence each; none: nothing."""
    sentences = []
    if not policy.require_approval:
        sentences.append(
            "any recipe is allowed, whatever it computes and sends, because require_approval is not true: "
            "set it, and approve recipes with `consilium-centre approve`"
        )
    if not policy.allowed_labels:
        sentences.append("any column of the cohort may be asked about, because allowed_labels is empty")
    if policy.min_cell_count <= 1:
        sentences.append("numbers about a single scan may leave, because min_cell_count is 1")
    if not policy.epsilon and not policy.require_secure_aggregation:
        sentences.append(
            "this hospital's own change of the weights may leave unprotected, because neither epsilon nor "
            "require_secure_aggregation is set"
        )
    return sentences


def may_disclose_sources(policy: Policy) -> bool:
    """Return whether the names of the scans' sources may leave."""
    return not policy.allowed_labels or SOURCE_COLUMN in policy.allowed_labels


def describe_policy(policy: Policy) -> Mapping[str, object]:
    """Return {rule: value} of the rules in force, for the coordinator's operator."""
    rules = {name: value for name, value in vars(policy).items() if value not in ([], "", 0, False)}
    if not policy.epsilon:
        del rules["delta"]
    return rules


# --- before a request is answered -----------------------------------------------------------------


def authorise(policy: Policy, request: Request, config: Config, now: datetime) -> None:
    """Check a request and its run against the policy. Raises Refused, naming the rule."""
    _require_allowed(policy.fingerprints, fingerprint_code(), "code")
    _check_labels(policy, config)
    if isinstance(request, StatisticsRequest):
        _require_allowed(policy.queries, request.name, "query")
    _check_protection(policy, config)
    if policy.allowed_hours and isinstance(request, JoinRequest | TrainRequest | StatisticsRequest):
        _check_hours(policy.allowed_hours, now)


def _require_allowed(allowed: list[str], value: str, rule: str) -> None:
    if allowed and value not in allowed:
        raise forbidden(f"does not allow the {rule} '{value}' (allowed: {', '.join(allowed)})")


def _check_labels(policy: Policy, config: Config) -> None:
    for name, task in config.tasks.items():
        for column in list_read_columns(name, task):
            _require_allowed(policy.allowed_labels, column, "label")


def _check_protection(policy: Policy, config: Config) -> None:
    """Require what the policy asks for: secure aggregation, centres, differential privacy, query noise."""
    if policy.require_secure_aggregation and config.privacy.secagg is None:
        raise forbidden("requires secure aggregation, which this run does not use; use privacy=secagg")
    num_centres = len(config.federation.centres)
    if num_centres < policy.min_centres:
        raise forbidden(f"requires {policy.min_centres} centres or more, and this run has {num_centres}")
    # `dp_level: central` does not do: it trusts the coordinator with the hospital's own update.
    if policy.epsilon and config.privacy.dp_level != "patient":
        raise forbidden(
            f"requires differential privacy (epsilon at most {policy.epsilon:g}), "
            "which this run does not use; use privacy=patient"
        )
    run_noise = config.privacy.query_noise_multiplier
    if policy.min_query_noise > run_noise:
        raise forbidden(
            f"requires noise of {policy.min_query_noise:g} on counts and scores, "
            f"and this run has {run_noise:g}; use privacy=patient "
            f"privacy.query_noise_multiplier={policy.min_query_noise:g}"
        )


def _check_hours(allowed_hours: str, now: datetime) -> None:
    begin, end = parse_hours(allowed_hours)
    clock = now.time()
    if begin <= end:
        is_allowed = begin <= clock < end
    else:  # over midnight
        is_allowed = clock >= begin or clock < end
    if not is_allowed:
        raise forbidden(
            f"allows computation in the hours {allowed_hours} only; the time there is {clock:%H:%M}, and it "
            f"takes part again from {begin:%H:%M} on"
        )


def forbidden(rule: str) -> Refused:
    """Return the refusal of what a rule of the policy forbids."""
    return Refused(f"this hospital's policy {rule}", RefusalCode.POLICY)
