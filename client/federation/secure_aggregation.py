"""Take part in a secure sum (common/privacy/secure_aggregation).

Keys are made for one sum, each step is taken once, and the secrets are deleted before the last reply leaves.
The numbers of a round stay on disk until the next one, in case the round must be repeated: with them it is
the same sum. A sum that was opened once may be repeated with the same centres only, since the difference of
two sums would show single centres.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from numpy.typing import NDArray

from client.federation import secure_sum_checks, secure_sum_store
from client.federation.secure_sum_store import (
    HeldShares,
    StoredNumbers,
    SumId,
    SumKind,
    SumState,
    compute_sum_id,
    sum_dir,
    to_byte_array,
)
from client.federation.secure_sum_store import delete_train_sum as delete_train_sum
from client.site.policy import Policy
from common.config.schema import Config
from common.learning.class_imbalance import weights_by_group
from common.modeling.model import parameter_layout
from common.modeling.parameters import EMPTY_PARAMS
from common.privacy import secure_aggregation
from common.privacy.masked_layout import anonymise_keys, empty_sums
from common.privacy.secure_aggregation import ByteArray, PublicKeys
from common.protocol.messages import (
    MaskedInputReply,
    MaskedInputRequest,
    SecureSumReply,
    SecureSumRequest,
    ShareKeysReply,
    ShareKeysRequest,
    StatisticsReply,
    StatisticsRequest,
    Sums,
    TrainReply,
    TrainRequest,
    UnmaskReply,
    UnmaskRequest,
)
from common.utils.errors import RefusalCode, Refused

NONCE_BYTES = 12  # of ChaCha20-Poly1305


# --- step 1: store the numbers and send public keys -----------------------------------------------


def mask_update(
    folder: Path,
    config: Config,
    request: TrainRequest,
    reply: TrainReply,
    label_weights: Mapping[str, float],
    known_change: NDArray[np.float32] | None = None,
) -> TrainReply:
    """Store an update as the numbers of a secure sum, and return the reply with public keys instead.

    `label_weights` is {task: this centre's weight}, which is divided by the total in the request.
    `known_change` [P] is the part of the update that needs no data and so covers nobody. Raises Refused for
    an update that is not finite, or weights that would let one centre's update show.
    """
    settings = secure_aggregation.require_secagg_config(config)
    layout = parameter_layout(config)
    if not np.isfinite(reply.delta).all():
        raise Refused("the update is not finite", RefusalCode.ERROR)
    weights = secure_sum_checks.compute_shares_of_weight(config, request, label_weights)
    group_weights = dict.fromkeys(layout.group_slices(), 0.0) | weights_by_group(weights, config.tasks)
    values, sums = secure_aggregation.quantize_weighted_update(reply.delta, group_weights, layout, settings)
    pieces = secure_aggregation.measure_update(values, sums, layout)
    if known_change is not None:
        learnt = reply.delta - known_change
        learnt_numbers = secure_aggregation.quantize_weighted_update(learnt, group_weights, layout, settings)
        pieces = pieces.minimum(secure_aggregation.measure_update(*learnt_numbers, layout))
    reply = replace(reply, delta=EMPTY_PARAMS, sum_id=compute_sum_id(request))
    if settings.scope == "all":
        int_buffers = request.weights.int_buffers
        reply = replace(reply, int_buffers=int_buffers, scans=0, steps=0, losses={}, epsilon=None)
    work_dir = sum_dir(folder, request.run_id, SumKind.TRAIN)
    fixed_point_sums = _to_fixed_point(config, sums)
    secure_sum_store.store_numbers(work_dir, StoredNumbers(values, fixed_point_sums, pieces), reply)
    return replace(reply, public_keys=secure_sum_store.start_sum(work_dir, reply.sum_id))


def cached_update(folder: Path, request: TrainRequest) -> TrainReply | None:
    """Return the reply to a round that was trained before: the same numbers, new keys. None: it was not."""
    sum_id = compute_sum_id(request)
    work_dir = sum_dir(folder, request.run_id, SumKind.TRAIN)
    reply = secure_sum_store.load_reply(work_dir)
    if reply is None or reply.sum_id != sum_id:
        return None
    return replace(reply, public_keys=secure_sum_store.start_sum(work_dir, sum_id))


def mask_statistics(
    folder: Path, config: Config, request: StatisticsRequest, reply: StatisticsReply
) -> StatisticsReply:
    """Store a query's sums as the numbers of a secure sum, and return the reply with public keys instead."""
    sums = anonymise_keys(reply.sums, empty_sums(request, config, parameter_layout(config)))
    reply = replace(reply, sums={}, sum_id=compute_sum_id(request))
    work_dir = sum_dir(folder, request.run_id, SumKind.QUERY)
    pieces = secure_aggregation.measure_sums(sums)
    numbers = StoredNumbers(np.empty(0, np.int32), _to_fixed_point(config, sums), pieces)
    secure_sum_store.store_numbers(work_dir, numbers, None)
    return replace(reply, public_keys=secure_sum_store.start_sum(work_dir, reply.sum_id))


def _to_fixed_point(config: Config, sums: Sums) -> NDArray[np.int64]:
    """Return all sums [R] as integers. Raises Refused for numbers that cannot be added."""
    flat_sums = secure_aggregation.flatten_sums(sums)
    return secure_aggregation.to_fixed_point(flat_sums, len(config.federation.centres))


# --- steps 2 to 4 ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class SumParticipant:
    """This centre in a step of a sum."""

    centre: str
    config: Config
    policy: Policy
    work_dir: Path
    state: SumState

    def require_quorum(self, num_started: int, num_present: int) -> None:
        """Raise Refused when a sum would be over too few centres."""
        min_survivors = secure_aggregation.compute_min_survivors(self.config, num_started)
        needed = max(min_survivors, self.policy.min_centres)
        if num_present < needed:
            raise Refused(
                f"a secure sum needs {needed} centres, and this one has {num_present}", RefusalCode.POLICY
            )


def handle_step(
    folder: Path, config: Config, centre: str, request: SecureSumRequest, policy: Policy
) -> SecureSumReply:
    """Take the next step of a sum. Raises Refused for a step out of turn or a sum over too few centres."""
    work_dir = sum_dir(folder, request.run_id, SumId.parse(request.sum_id).kind)
    state = secure_sum_store.load_state(work_dir)
    if state is None or state.sum_id != request.sum_id:
        raise Refused("this centre is not part of the sum any more; start the sum again")
    participant = SumParticipant(centre, config, policy, work_dir, state)
    if isinstance(request, ShareKeysRequest):
        return share_keys(participant, request)
    if isinstance(request, MaskedInputRequest):
        return mask_input(participant, request)
    return reveal_shares(participant, request)


def share_keys(participant: SumParticipant, request: ShareKeysRequest) -> ShareKeysReply:
    """Split both secrets into a share for every centre of the roster, and encrypt each for its receiver.

    With the shares goes how large this centre's part of the sum is.
    """
    state = participant.state
    roster = {centre: secure_aggregation.parse_public_keys(keys) for centre, keys in request.roster.items()}
    _require_first_time(state.roster is not None)
    participant.require_quorum(len(roster), len(roster))
    _check_roster(participant, roster)
    threshold = secure_aggregation.compute_min_survivors(participant.config, len(roster))
    seed_shares = secure_aggregation.shamir_split(state.secrets.seed, threshold, len(roster))
    key_shares = secure_aggregation.shamir_split(state.secrets.mask_key, threshold, len(roster))
    magnitudes = secure_sum_store.load_magnitudes(participant.work_dir)
    own_shares = b""
    encrypted: dict[str, ByteArray] = {}
    for peer, seed_share, key_share in zip(sorted(roster), seed_shares, key_shares, strict=True):
        shares = HeldShares(seed_share, key_share, magnitudes).pack()
        if peer == participant.centre:
            own_shares = shares
            continue
        cipher = _share_cipher(state, roster[peer], request.sum_id)
        nonce = os.urandom(NONCE_BYTES)
        direction = f"{participant.centre} to {peer}".encode()
        encrypted[peer] = to_byte_array(nonce + cipher.encrypt(nonce, shares, direction))
    public_keys = {centre: keys.tobytes() for centre, keys in request.roster.items()}
    secure_sum_store.save_state(
        participant.work_dir, replace(state, roster=public_keys, own_shares=own_shares)
    )
    return ShareKeysReply(participant.centre, encrypted)


def _check_roster(participant: SumParticipant, roster: Mapping[str, PublicKeys]) -> None:
    """Raise Refused for a roster with wrong keys of this centre, an unknown name, or the same key twice."""
    own_keys = participant.state.secrets.public_keys()
    if roster.get(participant.centre) != own_keys:
        raise Refused("the roster of the sum has other public keys for this centre")
    if not roster.keys() <= set(participant.config.federation.centres):
        raise Refused("the roster of the sum has a name that is not a centre of the run")
    distinct_keys = {keys.mask_key for keys in roster.values()} | {keys.share_key for keys in roster.values()}
    if len(distinct_keys) < 2 * len(roster):
        raise Refused("the roster of the sum has the same key twice")


def mask_input(participant: SumParticipant, request: MaskedInputRequest) -> MaskedInputReply:
    """Mask the numbers towards every centre that sent a share, if those cover them."""
    state = participant.state
    roster = {centre: to_byte_array(keys) for centre, keys in (state.roster or {}).items()}
    _require_first_time(state.shares is not None)
    participant.require_quorum(len(roster), len(request.shares) + 1)
    shares = {participant.centre: state.own_shares}
    for peer, encrypted in request.shares.items():
        if peer == participant.centre or peer not in roster:
            raise Refused("the request has a share from a centre that is not part of this sum")
        shares[peer] = _decrypt_shares(participant, peer, roster[peer], encrypted)

    numbers = secure_sum_store.load_numbers(participant.work_dir)
    held = {centre: HeldShares.unpack(data) for centre, data in shares.items()}
    min_centres = max(secure_aggregation.MIN_CENTRES, participant.policy.min_centres)
    secure_sum_checks.require_own_cover(held, participant.centre, numbers.pieces.names, min_centres)
    width = secure_aggregation.bytes_per_parameter(participant.config)
    values = numbers.values.astype(secure_aggregation.ring_dtype(width))
    fixed_point_sums = numbers.fixed_point_sums.view(np.uint64)
    own_mask = secure_aggregation.expand_seed(state.secrets.seed)
    secure_aggregation.add_mask(own_mask, 1, fixed_point_sums, values)
    purpose = b"mask" + secure_aggregation.hash_mask_context(state.sum_id, roster, shares)
    for peer in request.shares:
        peer_keys = secure_aggregation.parse_public_keys(roster[peer])
        pair_mask = secure_aggregation.derive_shared_key(state.secrets.mask_key, peer_keys.mask_key, purpose)
        sign = secure_aggregation.compute_pair_sign(participant.centre, peer)
        secure_aggregation.add_mask(pair_mask, sign, fixed_point_sums, values)

    # Saved before anything leaves: a second reply would be masked towards another set of centres.
    secure_sum_store.save_state(participant.work_dir, replace(state, shares=shares))
    packed = secure_aggregation.pack_ring_values(values, width)
    return MaskedInputReply(participant.centre, packed, fixed_point_sums)


def _decrypt_shares(
    participant: SumParticipant, peer: str, peer_keys: ByteArray, encrypted: ByteArray
) -> bytes:
    state = participant.state
    cipher = _share_cipher(state, secure_aggregation.parse_public_keys(peer_keys), state.sum_id)
    data = encrypted.tobytes()
    direction = f"{peer} to {participant.centre}".encode()
    try:
        return cipher.decrypt(data[:NONCE_BYTES], data[NONCE_BYTES:], direction)
    except (InvalidTag, ValueError) as error:
        reason = f"the share from '{peer}' was not made for this centre, or was changed on the way"
        raise Refused(reason) from error


def _share_cipher(state: SumState, peer_keys: PublicKeys, sum_id: str) -> ChaCha20Poly1305:
    """Return the cipher for shares between this centre and a peer in one sum."""
    purpose = b"shares" + sum_id.encode()
    key = secure_aggregation.derive_shared_key(state.secrets.share_key, peer_keys.share_key, purpose)
    return ChaCha20Poly1305(key)


def reveal_shares(participant: SumParticipant, request: UnmaskRequest) -> UnmaskReply:
    """Return a share of each survivor's seed and of each drop-out's key, and delete this centre's secrets."""
    state = participant.state
    held = {centre: HeldShares.unpack(data) for centre, data in (state.shares or {}).items()}
    survivors = sorted(set(request.survivors))
    if participant.centre not in survivors or not set(survivors) <= held.keys():
        raise Refused("the survivors of the sum are not among the centres that masked their numbers for it")
    participant.require_quorum(len(state.roster or {}), len(survivors))
    secure_sum_checks.require_cover_of_all(held, survivors)
    sum_id = SumId.parse(state.sum_id)
    first = secure_sum_store.record_opening(participant.work_dir, sum_id, survivors)
    if first.survivors != survivors:
        raise Refused(
            f"this sum was opened before, with {', '.join(first.survivors)}, and may be repeated with the "
            "same centres only, because the difference would show single centres; "
            "wait for those missing, then resume"
        )
    if first.digest != sum_id.digest:
        raise Refused(
            "this round was opened before with another request, and may be repeated with the same only, "
            "because the difference would show single centres; begin a new run"
        )
    secure_sum_store.delete_secrets(participant.work_dir, sum_id.kind)
    revealed: dict[str, ByteArray] = {}
    for centre, shares in held.items():
        revealed[centre] = to_byte_array(shares.seed_share if centre in survivors else shares.key_share)
    return UnmaskReply(participant.centre, revealed)


def _require_first_time(was_taken: bool) -> None:
    if was_taken:
        raise Refused("this centre has taken this step of the sum already; start the sum again")
