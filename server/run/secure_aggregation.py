"""The coordinator's half of a secure sum (common/privacy/secure_aggregation.py).

The coordinator forwards keys and encrypted shares, adds masked numbers as they arrive, and removes the masks
with the secrets that the centres reveal. A centre that is away in one step is left out of it, down to the
threshold. Only the total is kept: memory does not grow with the number of centres. A sum that fails is
started again with new keys; what is to be summed lies at the centres.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

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
from common.utils.errors import ConsiliumError, RefusalCode
from server.run.broadcast import send_requests
from server.run.reply_fields import BadReply, require_array
from server.run.reply_validation import bad_reply
from server.run.run_state import Run, RunPaused, group_by_reason


class NotEnoughCentres(ConsiliumError):
    """Fewer centres than a sum needs stayed until its end; nothing was revealed."""

    def __init__(self, needed: int, stayed: int, dropouts: Mapping[str, Refusal]) -> None:
        """Keep why each centre is missing, for the record of exclusions."""
        reasons = {centre: refusal.reason for centre, refusal in dropouts.items()}
        super().__init__(
            f"{stayed} centres stayed in a secure sum that needs {needed} ({group_by_reason(reasons)})"
        )
        self.dropouts = dict(dropouts)


@dataclass
class SecureSumResult:
    """The sum over `survivors`."""

    values: NDArray[np.signedinteger]  # [V] the weighted updates' sum, in quantization steps
    sums: Sums  # with the keys and shapes of the template
    survivors: list[str]
    dropouts: dict[str, Refusal]  # {centre that is not in the sum: why}


@dataclass
class SumInProgress:
    """A secure sum between its steps."""

    run: Run
    sum_id: str
    roster: dict[str, ByteArray]  # {centre: its public keys}, in the order of names
    min_centres: int  # fewer than these, and nothing is revealed
    dropouts: dict[str, Refusal]
    values: secure_aggregation.RingValues  # [V] masked, then the sum
    fixed_point_sums: NDArray[np.uint64]  # [R] masked, then the sum
    bytes_per_value: int
    encrypted_shares: dict[str, dict[str, ByteArray]] = field(default_factory=dict)  # {from: {to: shares}}
    survivors: list[str] = field(default_factory=list)
    revealed: dict[str, UnmaskReply] = field(default_factory=dict)  # {survivor: shares that it reveals}

    def require_quorum(self, num_present: int) -> None:
        """Raise NotEnoughCentres where too few centres are left."""
        if num_present < self.min_centres:
            raise NotEnoughCentres(self.min_centres, num_present, self.dropouts)


def secure_sum(
    run: Run,
    key_replies: Mapping[str, TrainReply | StatisticsReply],
    num_parameters: int,
    empty_sums: Sums,
    min_centres: int = 0,
) -> SecureSumResult:
    """Add up what the centres keep masked, without seeing any of it alone.

    Args:
        run: the run.
        key_replies: {centre: the reply with which it gave its public keys}.
        num_parameters: the length V of the masked update.
        empty_sums: the keys and shapes of the masked sums.
        min_centres: how many centres the sum must include, if more than the threshold of the protocol.

    Raises:
        NotEnoughCentres: too few centres stayed. This is checked before anything is revealed.
    """
    secure = _start_sum(run, key_replies, num_parameters, empty_sums, min_centres)
    secure.require_quorum(len(secure.roster))
    _exchange_shares(secure)
    secure.require_quorum(len(secure.encrypted_shares))
    _add_masked_inputs(secure)
    secure.require_quorum(len(secure.survivors))
    _collect_revealed_shares(secure)
    _remove_all_masks(secure)
    # A centre that is silent in the last step is in the sum all the same.
    dropouts = {centre: why for centre, why in secure.dropouts.items() if centre not in secure.survivors}
    sums = secure_aggregation.from_fixed_point(secure.fixed_point_sums)
    return SecureSumResult(
        secure_aggregation.to_signed_integers(secure.values, secure.bytes_per_value),
        secure_aggregation.unflatten_sums(sums, empty_sums),
        secure.survivors,
        dropouts,
    )


def _start_sum(
    run: Run,
    key_replies: Mapping[str, TrainReply | StatisticsReply],
    num_parameters: int,
    empty_sums: Sums,
    min_centres: int,
) -> SumInProgress:
    dropouts: dict[str, Refusal] = {}
    sum_id, roster = select_roster(key_replies, dropouts)
    threshold = secure_aggregation.compute_min_survivors(run.config, len(roster))
    bytes_per_value = secure_aggregation.bytes_per_parameter(run.config)
    return SumInProgress(
        run=run,
        sum_id=sum_id,
        roster=roster,
        min_centres=max(threshold, min_centres),
        dropouts=dropouts,
        values=np.zeros(num_parameters, secure_aggregation.ring_dtype(bytes_per_value)),
        fixed_point_sums=np.zeros(sum(array.size for array in empty_sums.values()), np.uint64),
        bytes_per_value=bytes_per_value,
    )


def select_roster(
    key_replies: Mapping[str, TrainReply | StatisticsReply], dropouts: dict[str, Refusal]
) -> tuple[str, dict[str, ByteArray]]:
    """Return the id of the sum that most centres mean, and the public keys of those centres."""
    votes = Counter(reply.sum_id for reply in key_replies.values())
    sum_id = max(votes, key=lambda name: (votes[name], name), default="")
    roster: dict[str, ByteArray] = {}
    for centre, reply in sorted(key_replies.items()):
        keys = reply.public_keys
        if keys is None or reply.sum_id != sum_id:
            dropouts[centre] = Refusal(
                centre,
                "means another sum than the others: it received other settings or weights, "
                "or runs without secure aggregation",
                code=RefusalCode.BAD_REPLY,
            )
        else:
            roster[centre] = keys
    return sum_id, roster


def _exchange_shares(secure: SumInProgress) -> None:
    """Step 2: send everybody the public keys, and receive each centre's secrets in encrypted shares."""
    run = secure.run
    request = ShareKeysRequest(run.run_id, run.config_values, secure.sum_id, secure.roster)
    requests = dict.fromkeys(secure.roster, request)
    for centre, reply in collect_step_replies(run, requests, secure.dropouts):
        if isinstance(reply, ShareKeysReply):
            secure.encrypted_shares[centre] = reply.shares


def _add_masked_inputs(secure: SumInProgress) -> None:
    """Step 3: forward the shares, and add up the masked numbers."""
    run = secure.run
    requests = {}
    for centre in secure.encrypted_shares:
        shares = _shares_for(secure, centre)
        requests[centre] = MaskedInputRequest(run.run_id, run.config_values, secure.sum_id, shares)
    for centre, reply in collect_step_replies(run, requests, secure.dropouts):
        if not isinstance(reply, MaskedInputReply):
            continue
        try:
            _require_masked_input(secure, reply)
        except BadReply as fault:
            secure.dropouts[centre] = bad_reply(centre, str(fault))
        else:
            secure.values += secure_aggregation.unpack_ring_values(reply.values, secure.bytes_per_value)
            secure.fixed_point_sums += reply.fixed_point_sums
            secure.survivors.append(centre)
    secure.survivors.sort()


def _shares_for(secure: SumInProgress, receiver: str) -> dict[str, ByteArray]:
    """Return {sender: its encrypted shares for the receiver}."""
    shares = secure.encrypted_shares
    return {sender: shares[sender][receiver] for sender in shares if sender != receiver}


def _require_masked_input(secure: SumInProgress, reply: MaskedInputReply) -> None:
    """Require as many masked numbers as the sum has. Raises BadReply."""
    num_bytes = secure.values.size * secure.bytes_per_value
    require_array("values", reply.values, "uint8", (num_bytes,))
    require_array("fixed_point_sums", reply.fixed_point_sums, "uint64", secure.fixed_point_sums.shape)


def _collect_revealed_shares(secure: SumInProgress) -> None:
    """Step 4: tell the survivors who is in the sum, and receive what removes the masks."""
    run = secure.run
    request = UnmaskRequest(run.run_id, run.config_values, secure.sum_id, secure.survivors)
    requests = dict.fromkeys(secure.survivors, request)
    for centre, reply in collect_step_replies(run, requests, secure.dropouts):
        if not isinstance(reply, UnmaskReply):
            continue
        if reply.shares.keys() == secure.encrypted_shares.keys():
            secure.revealed[centre] = reply
        else:
            secure.dropouts[centre] = bad_reply(centre, "shares are not of the centres that began the sum")


def _remove_all_masks(secure: SumInProgress) -> None:
    """Step 5: leave the sum of the survivors' numbers."""
    threshold = secure_aggregation.compute_min_survivors(secure.run.config, len(secure.roster))
    if len(secure.revealed) < threshold:
        raise NotEnoughCentres(threshold, len(secure.revealed), secure.dropouts)
    helpers = dict(itertools.islice(secure.revealed.items(), threshold))
    for centre in sorted(secure.encrypted_shares):
        if centre in secure.survivors:
            _remove_own_mask(secure, centre, helpers)
        else:
            _remove_pairwise_masks(secure, centre, helpers)


def _remove_own_mask(secure: SumInProgress, survivor: str, helpers: Mapping[str, UnmaskReply]) -> None:
    """Subtract the mask that a survivor added to its numbers."""
    seed = _combine_shares(secure, survivor, helpers)
    keys = secure_aggregation.parse_public_keys(secure.roster[survivor])
    if hashlib.sha256(seed).digest() != keys.seed_digest:
        raise _inconsistent_shares(survivor, helpers)
    mask_seed = secure_aggregation.expand_seed(seed)
    secure_aggregation.add_mask(mask_seed, -1, secure.fixed_point_sums, secure.values)


def _remove_pairwise_masks(secure: SumInProgress, dropout: str, helpers: Mapping[str, UnmaskReply]) -> None:
    """Subtract the masks that the survivors share with a dropout, which its own would have cancelled."""
    private_key = _combine_shares(secure, dropout, helpers)
    keys = secure_aggregation.parse_public_keys(secure.roster[dropout])
    if secure_aggregation.derive_public_key(private_key) != keys.mask_key:
        raise _inconsistent_shares(dropout, helpers)
    context = secure_aggregation.hash_mask_context(
        secure.sum_id, secure.roster, sorted(secure.encrypted_shares)
    )
    for survivor in secure.survivors:
        survivor_key = secure_aggregation.parse_public_keys(secure.roster[survivor]).mask_key
        seed = secure_aggregation.derive_shared_key(private_key, survivor_key, b"mask" + context)
        sign = -secure_aggregation.compute_pair_sign(survivor, dropout)
        secure_aggregation.add_mask(seed, sign, secure.fixed_point_sums, secure.values)


def _combine_shares(secure: SumInProgress, centre: str, helpers: Mapping[str, UnmaskReply]) -> bytes:
    """Return a centre's secret from the helpers' shares of it."""
    share_numbers = {name: number for number, name in enumerate(sorted(secure.roster), 1)}
    shares = {share_numbers[name]: reply.shares[centre].tobytes() for name, reply in helpers.items()}
    return secure_aggregation.shamir_combine(shares)


def _inconsistent_shares(centre: str, helpers: Mapping[str, UnmaskReply]) -> RunPaused:
    centres = ", ".join([*helpers, centre])
    return RunPaused(
        f"the shares of {centre}'s secret do not fit together: a centre ({centres}) runs other code"
    )


def collect_step_replies(
    run: Run, requests: Mapping[str, Request], dropouts: dict[str, Refusal]
) -> Iterator[tuple[str, Reply]]:
    """Yield each centre's reply as it arrives; note the refusals."""
    for received in send_requests(run, requests):
        if isinstance(received.reply, Refusal):
            dropouts[received.centre] = received.reply
        else:
            yield received.centre, received.reply
