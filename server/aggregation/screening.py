"""Decide which updates can be used: decode them, find those that are not finite or far too large."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from statistics import median

import numpy as np

from common.config.schema import Compression, LocalLayerGroup
from common.modeling.local_layers import find_local_values
from common.modeling.parameters import Layout, Weights
from common.protocol.messages import TrainReply
from common.protocol.update_codec import decode_update

MAX_CHANGE = 1e15  # of a weight in a round: what is computed from it stays finite


def decode_reply(reply: TrainReply, layout: Layout, codec: Compression) -> TrainReply:
    """Return the reply with the decoded weight delta [P] in place of its encoded form.

    Raises:
        ValueError: the compressed codes cannot be unpacked; the arrays' sizes have been validated.
    """
    if not reply.encoded_delta:
        return reply
    return replace(reply, delta=decode_update(reply.encoded_delta, layout, codec), encoded_delta={})


def find_validation_error(reply: TrainReply) -> str:
    """Return why a decoded update cannot be used, or "". Its form has been validated when it was received."""
    if not reply.delta.size:
        return ""
    largest = max(float(reply.delta.max()), -float(reply.delta.min()))  # NaN if any value is
    if not np.isfinite(largest):
        return "not finite"
    if largest > MAX_CHANGE:
        return f"a weight changes by {largest:.3g}, which no training does"
    return ""


def find_leaked_layers(
    reply: TrainReply, sent: Weights, layout: Layout, local_layers: Collection[LocalLayerGroup]
) -> str:
    """Return why an update that is well formed cannot be used where layers stay at the centres, or "".

    A local value has a change of zero, and a local counter is the one that was `sent`.
    """
    local_values = find_local_values(layout, local_layers)
    num_floats = np.count_nonzero(reply.delta[local_values.floats]) if reply.delta.size else 0
    is_changed = reply.int_buffers != sent.int_buffers
    num_leaked = num_floats + np.count_nonzero(is_changed & local_values.int_buffers)
    if num_leaked:
        return f"holds {num_leaked} values of layers that stay at the centre (stage.local_layers)"
    return ""


def find_outliers(norms: Mapping[str, float], max_ratio: float) -> dict[str, str]:
    """Return {centre: reason} of those whose norm exceeds `max_ratio` times the median of the others' norms.

    With two centres nobody can say which is the outlier, and none is reported.
    """
    outliers = {}
    for centre, norm in norms.items():
        other_norms = [norms[other] for other in norms.keys() - {centre}]
        if len(other_norms) < 2:
            continue
        median_norm = median(other_norms)
        if median_norm > 0 and norm > max_ratio * median_norm:
            ratio = norm / median_norm
            outliers[centre] = (
                f"norm {norm:.3g} is {ratio:.0f} times the others' median (limit {max_ratio:g})"
            )
    return outliers
