"""The coordinator's half of a secure sum (common/privacy/secure_aggregation.py): it passes keys and encrypted shares on, adds masked numbers up as they arrive, and
takes the masks away with what the centres open.

Who stays away in a step is left out of it, down to the threshold. Nothing but the total is kept: memory does not grow with the centres. A sum
that fails is begun again with new keys; what it was about lies at the centres.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from common.config.compose import config_to_dict
from common.privacy import secure_aggregation
from common.privacy.secure_aggregation import ByteArray
from common.protocol.messages import (
    MaskedInputReply,
    MaskedInputRequest,
    Refusal,
    Reply,
    Request,
    ShareKeysReply,
    ShareKeysRequest,
    StatisticsReply,
    Sums,
    TrainReply,
    UnmaskReply,
    UnmaskRequest,
)
from common.utils.errors import ConsiliumError
from server.run.broadcast import send_requests
from server.run.run_state import Run, RunPaused, group_by_reason, refusal_reason


class NotEnoughCentres(ConsiliumError):
    """Fewer centres than a sum needs stayed to its end; nothing was opened. `why`: {centre: reason}."""

    def __init__(self, needed: int, stayed: int, dropouts: Mapping[str, str]) -> None:
        super().__init__(
            f"{stayed} centres stayed in a secure sum that needs {needed} ({group_by_reason(dropouts)})"
        )
        self.dropouts = dict(dropouts)


@dataclass
class SecureSumResult:
    """The sum over `survivors`: `values` [V] on their grid, `sums` as in the blank. `why`: {centre that is not in it: reason}."""

    values: NDArray[np.signedinteger]
    sums: Sums
    survivors: list[str]
    dropouts: dict[str, str]


def secure_sum(
    run: Run,
    key_replies: Mapping[str, TrainReply | StatisticsReply],
    num_parameters: int,
    empty_sums: Sums,
    min_centres: int = 0,
) -> SecureSumResult:
    """Add up what the centres that have `said` their keys keep masked: `size` parameters and the sums of `blank`. Raises TooFew where fewer than
    the threshold, or than `least`, stay; the latter is asked before anything is opened."""
    why: dict[str, str] = {}
    name, roster = select_roster(key_replies, why)
    config, threshold = (
        config_to_dict(run.config),
        secure_aggregation.compute_min_survivors(run.config, len(roster)),
    )

    def require_quorum(present: int, needed: int) -> None:
        if present < needed:
            raise NotEnoughCentres(needed, present, why)

    require_quorum(len(roster), max(threshold, min_centres))
    boxes: dict[str, dict[str, ByteArray]] = {}
    share = {c: ShareKeysRequest(run.run_id, config, name, roster) for c in roster}
    for centre, reply in collect_step_replies(run, share, why):
        if isinstance(reply, ShareKeysReply) and reply.shares.keys() == roster.keys() - {centre}:
            boxes[centre] = reply.shares
        else:
            why[centre] = refusal_reason(reply)
    require_quorum(len(boxes), max(threshold, min_centres))

    width = secure_aggregation.bytes_per_parameter(run.config)
    values, exact = (
        np.zeros(num_parameters, secure_aggregation.ring_dtype(width)),
        np.zeros(sum(a.size for a in empty_sums.values()), np.uint64),
    )
    survivors: list[str] = []
    mask = {
        c: MaskedInputRequest(run.run_id, config, name, {by: box[c] for by, box in boxes.items() if by != c})
        for c in boxes
    }
    for centre, reply in collect_step_replies(run, mask, why):
        if not isinstance(reply, MaskedInputReply):
            why[centre] = refusal_reason(reply)
        elif reply.values.shape != (num_parameters * width,) or reply.values.dtype != np.uint8:
            why[centre] = f"wrong shape: {reply.values.size} bytes instead of {num_parameters * width}"
        elif reply.fixed_point_sums.shape != exact.shape or reply.fixed_point_sums.dtype != np.uint64:
            why[centre] = f"wrong shape: {reply.fixed_point_sums.size} sums instead of {exact.size}"
        else:
            values += secure_aggregation.unpack_ring_values(reply.values, width)
            exact += reply.fixed_point_sums
            survivors.append(centre)
    survivors.sort()
    require_quorum(len(survivors), max(threshold, min_centres))

    opened: dict[str, UnmaskReply] = {}
    unmask = {c: UnmaskRequest(run.run_id, config, name, survivors) for c in survivors}
    for centre, reply in collect_step_replies(run, unmask, why):
        if isinstance(reply, UnmaskReply) and reply.shares.keys() == boxes.keys():
            opened[centre] = reply
        else:
            why[centre] = refusal_reason(reply)
    require_quorum(len(opened), threshold)
    helpers = dict(list(opened.items())[:threshold])
    for centre in sorted(boxes):
        remove_masks(name, roster, sorted(boxes), survivors, centre, helpers, values, exact)
    absent = {
        c: reason for c, reason in why.items() if c not in survivors
    }  # who is silent at the end is in the sum all the same
    return SecureSumResult(
        secure_aggregation.to_signed_integers(values, width),
        secure_aggregation.unflatten_sums(secure_aggregation.from_fixed_point(exact), empty_sums),
        survivors,
        absent,
    )


def select_roster(
    key_replies: Mapping[str, TrainReply | StatisticsReply], dropouts: dict[str, str]
) -> tuple[str, dict[str, ByteArray]]:
    """The sum that most centres mean, and the public keys of those who do."""
    names = Counter(reply.sum_id for reply in key_replies.values())
    name = max(names, key=lambda n: (names[n], n), default="")
    roster: dict[str, ByteArray] = {}
    for centre, reply in sorted(key_replies.items()):
        keys = reply.public_keys
        if reply.sum_id != name or keys is None or keys.dtype != np.uint8 or keys.shape != (96,):
            dropouts[centre] = (
                "means another sum than the others: it was told other settings or weights, or runs without secure aggregation"
            )
        else:
            roster[centre] = keys
    return name, roster


def remove_masks(
    sum_id: str, roster: Mapping[str, ByteArray], members: list[str], survivors: list[str], centre: str, helpers: Mapping[str, UnmaskReply],
    values: secure_aggregation.RingValues, exact: NDArray[np.uint64],
) -> None:  # fmt: skip
    """A survivor's own mask, or those that a drop-out shares with the survivors, out of the total. Raises Paused for shares that do not fit."""
    numbers = {c: n for n, c in enumerate(sorted(roster), 1)}
    shares = {numbers[c]: reply.shares[centre].tobytes() for c, reply in helpers.items()}
    keys, size = secure_aggregation.parse_public_keys(roster[centre]), 16 if centre in survivors else 32
    secret = (
        secure_aggregation.shamir_combine(shares)
        if {len(share) for share in shares.values()} == {size}
        else b""
    )
    if size == 16:
        fits = hashlib.sha256(secret).digest() == keys.seed_digest
    else:
        fits = len(secret) == 32 and secure_aggregation.derive_public_key(secret) == keys.mask_key
    if not fits:
        raise RunPaused(
            f"the shares of {centre}'s secret do not fit together: a centre ({', '.join(helpers)}, {centre}) runs other code"
        )
    if centre in survivors:
        secure_aggregation.add_mask(secure_aggregation.expand_seed(secret), -1, exact, values)
        return
    bound = b"mask" + secure_aggregation.hash_mask_context(sum_id, roster, members)
    for peer in survivors:
        common = secure_aggregation.derive_shared_key(
            secret, secure_aggregation.parse_public_keys(roster[peer]).mask_key, bound
        )
        secure_aggregation.add_mask(
            common, -secure_aggregation.compute_pair_sign(peer, centre), exact, values
        )


def collect_step_replies(
    run: Run, requests: Mapping[str, Request], dropouts: dict[str, str]
) -> Iterator[tuple[str, Reply]]:
    """Each centre's reply as it comes; `why` there is none of one."""
    for received in send_requests(run, requests):
        if isinstance(received.reply, Refusal):
            dropouts[received.centre] = received.reply.reason
        else:
            yield received.centre, received.reply
