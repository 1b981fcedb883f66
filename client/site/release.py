"""Filter every reply before it leaves: one filter for each kind, and what has no filter does not leave.

The data that replies are made of are whole groups of patients already (client/federation/released_data.py).
Here remains what a model's scores and the round tell: numbers that too few scans make up are suppressed
(client/site/small_cells.py), times are rounded, and every message keeps to the policy's size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from client.site.policy import Policy, forbidden
from client.site.small_cells import suppress_small_cells
from common.protocol.message_packing import pack_message
from common.protocol.messages import (
    BaseWeightsMissing,
    JoinReply,
    MaskedInputReply,
    Refusal,
    Reply,
    ShareKeysReply,
    StatisticsReply,
    TrainReply,
    UnmaskReply,
)
from common.utils.errors import RefusalCode, Refused


@dataclass(frozen=True)
class ReleaseRules:
    """What the filter goes by."""

    policy: Policy
    min_patients: int = 1  # the larger of the site's and the policy's `min_cell_count`
    min_scans: int = 1  # so many scans surely stand for `min_patients` patients
    query_name: str = ""  # that a StatisticsReply answers


def filter_reply(rules: ReleaseRules, reply: Reply) -> Reply:
    """Return a reply as it may leave.

    Raises Refused for a kind of reply that has no filter, and for one that is too large.
    """
    reply_filter = REPLY_FILTERS.get(type(reply))
    if reply_filter is None:
        raise Refused("the centre made a reply of a kind that may not leave", RefusalCode.ERROR)
    filtered: Reply = reply_filter(rules, reply)
    if not isinstance(filtered, Refusal):
        _check_message_size(filtered, rules.policy.max_message_bytes)
    return filtered


def _filter_statistics(rules: ReleaseRules, reply: StatisticsReply) -> StatisticsReply:
    if rules.min_patients <= 1:
        return reply
    sums = reply.sums
    if rules.query_name != "counts":  # these are whole groups, or have noise
        sums = suppress_small_cells(sums, rules.min_scans)
    return replace(reply, sums=sums, seconds=_round_seconds(reply.seconds))


def _filter_training(rules: ReleaseRules, reply: TrainReply) -> TrainReply:
    if rules.min_patients <= 1:
        return reply
    losses = {}
    for task, (loss, num_labelled) in reply.losses.items():
        is_reportable = num_labelled >= rules.min_patients
        losses[task] = [loss, num_labelled] if is_reportable else [0.0, 0.0]
    return replace(reply, losses=losses, seconds=_round_seconds(reply.seconds))


def _round_seconds(seconds: float) -> float:
    """Return the next whole second: the exact time would tell how many scans were read."""
    return float(math.ceil(seconds))


def _filter_join(rules: ReleaseRules, reply: JoinReply) -> JoinReply:
    """Return the description of a centre without numbers of too few scans."""
    scans = {split: count for split, count in reply.scans.items() if count >= rules.min_patients}
    skipped = {reason: count for reason, count in reply.skipped.items() if count >= rules.min_patients}
    return replace(reply, scans=scans, skipped=skipped)


def _pass_unchanged(rules: ReleaseRules, reply: Reply) -> Reply:
    """Return a reply that holds no number about patients: masked values, key shares, sentences."""
    return reply


REPLY_FILTERS: dict[type, Callable[[ReleaseRules, Any], Reply]] = {
    JoinReply: _filter_join,
    StatisticsReply: _filter_statistics,
    TrainReply: _filter_training,
    ShareKeysReply: _pass_unchanged,
    MaskedInputReply: _pass_unchanged,
    UnmaskReply: _pass_unchanged,
    BaseWeightsMissing: _pass_unchanged,
    Refusal: _pass_unchanged,
}


def _check_message_size(reply: Reply, max_bytes: int) -> None:
    if not max_bytes:
        return
    arrays, _ = pack_message(reply)
    size = sum(array.nbytes for array in arrays.values())
    if size > max_bytes:
        raise forbidden(f"allows messages of at most {max_bytes} bytes, and this one would have {size}")
