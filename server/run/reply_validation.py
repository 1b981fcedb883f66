"""The coordinator's gate: every reply is validated here before anything believes it.

A reply that no honest centre can have sent is replaced by a `Refusal` with the code BAD_REPLY and a reason
that names the field and the fault. Its centre is then left out of the round or query like one that refused,
and the run goes on. The messages' types have been checked when they were unpacked
(common/protocol/message_packing.py). Who sent a reply is for the transport to know: a reply that names
another centre is refused.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection
from dataclasses import replace

import numpy as np

from common.config.names import MAX_LIST_LENGTH, MAX_TEXT_LENGTH, is_plain_text
from common.config.normalise import stage_tasks
from common.config.schema import Config
from common.learning.losses import task_label_columns
from common.modeling.parameters import Layout
from common.privacy.masked_layout import SPLITS
from common.privacy.secure_aggregation import (
    ByteArray,
    derive_shared_key,
    hides_statistics,
    parse_public_keys,
    uses_secagg,
)
from common.privacy.secure_aggregation.key_agreement import KEY_BYTES, PUBLIC_KEYS_BYTES
from common.protocol.messages import (
    BaseWeightsMissing,
    JoinReply,
    JoinRequest,
    MaskedInputReply,
    MaskedInputRequest,
    Refusal,
    Reply,
    Request,
    ShareKeysReply,
    ShareKeysRequest,
    StatisticsReply,
    StatisticsRequest,
    TrainReply,
    TrainRequest,
    UnmaskReply,
    UnmaskRequest,
)
from common.protocol.update_codec import count_channels, select_codec
from common.utils.errors import RefusalCode
from server.run.expected_sums import expected_sums, require_expected_sums
from server.run.reply_fields import (
    MAX_COUNT,
    MAX_ENTRIES,
    MAX_SENTENCE_LENGTH,
    BadReply,
    make_plain,
    require_array,
    require_count,
    require_counts_by_name,
    require_finite,
    require_keys,
    require_not_negative,
    require_number,
    require_settings,
    require_text,
    require_texts,
)
from server.run.run_state import POOLED_CENTRE, Run

REPLY_TYPES: dict[type, type] = {
    JoinRequest: JoinReply,
    StatisticsRequest: StatisticsReply,
    TrainRequest: TrainReply,
    ShareKeysRequest: ShareKeysReply,
    MaskedInputRequest: MaskedInputReply,
    UnmaskRequest: UnmaskReply,
}
SUM_ID_LENGTH = 200  # characters
SEED_SHARE_BYTES = 16  # of a survivor's own mask
KEY_SHARE_BYTES = 32  # of a dropout's key to the masks that it shares with others
ENCRYPTED_SHARE_BYTES = 12 + SEED_SHARE_BYTES + KEY_SHARE_BYTES + 16  # nonce, both shares, tag
MAX_PIECES = 100_000  # of a sum; a byte for the size of each is encrypted with the shares


def validate_reply(run: Run, centre: str, request: Request, reply: Reply) -> Reply:
    """Return a reply that may be used, or else a refusal that says what is wrong with it.

    Args:
        run: the run.
        centre: who sent the reply, as the transport knows.
        request: what the centre was asked.
        reply: what it replied.
    """
    if isinstance(reply, Refusal):
        return replace(reply, centre=centre, reason=make_plain(reply.reason) or "no reason given")
    try:
        _require_kind(centre, request, reply)
        match reply:
            case JoinReply():
                _require_join(run.config, reply)
            case StatisticsReply() if isinstance(request, StatisticsRequest):
                _require_statistics(run, request, reply)
            case TrainReply() if isinstance(request, TrainRequest):
                _require_training(run, request, reply)
            case ShareKeysReply() if isinstance(request, ShareKeysRequest):
                _require_shares(reply.shares, request.roster.keys() - {centre})
            case UnmaskReply() if isinstance(request, UnmaskRequest):
                _require_revealed_shares(run.config, request, reply)
    except BadReply as fault:
        return bad_reply(centre, str(fault))
    return reply


def bad_reply(centre: str, fault: str) -> Refusal:
    """Return the refusal that takes the place of a reply which cannot be used."""
    return Refusal(centre, f"bad reply: {fault}", code=RefusalCode.BAD_REPLY)


def _require_kind(centre: str, request: Request, reply: Reply) -> None:
    """Require the kind of reply that the request asks for, in the sender's own name."""
    if isinstance(reply, BaseWeightsMissing):
        is_expected = isinstance(request, StatisticsRequest | TrainRequest) and request.base_digest != ""
    else:
        is_expected = isinstance(reply, REPLY_TYPES[type(request)])
    if not is_expected:
        raise BadReply(f"it answers a {type(request).__name__} with a {type(reply).__name__}")
    if reply.centre != centre:
        raise BadReply("it names another centre as its sender")


# --- a centre's description of itself ---------------------------------------------------------------------


def _require_join(config: Config, reply: JoinReply) -> None:
    own_cohorts = config.federation.centres if reply.centre == POOLED_CENTRE else [reply.centre]
    require_texts("cohorts", reply.cohorts, len(own_cohorts))
    require_keys("cohorts", dict.fromkeys(reply.cohorts), own_cohorts)
    if not reply.cohorts:
        raise BadReply("cohorts is empty")
    require_text("fingerprint", reply.fingerprint)
    _require_sources(config, reply.sources, len(own_cohorts))
    requested_columns: list[str] = []
    for name, task in config.tasks.items():
        requested_columns += task_label_columns(name, task)
    require_texts("columns", reply.columns, len(set(requested_columns)))
    require_keys("columns", dict.fromkeys(reply.columns), requested_columns)
    require_counts_by_name("scans", reply.scans, len(SPLITS), MAX_SENTENCE_LENGTH)
    require_keys("scans", reply.scans, SPLITS)
    require_counts_by_name("skipped", reply.skipped, MAX_ENTRIES, MAX_SENTENCE_LENGTH)
    require_texts("versions", [*reply.versions], MAX_ENTRIES)
    for version in reply.versions.values():
        require_text("versions", version)
    require_text("device", reply.device)
    require_texts("notes", reply.notes, MAX_ENTRIES, MAX_SENTENCE_LENGTH)
    require_settings("policy", reply.policy)


def _require_sources(config: Config, sources: list[str], num_cohorts: int) -> None:
    """Require names that can be classes; those of all centres together are the classes of one task."""
    most = max(1, min(MAX_ENTRIES, MAX_LIST_LENGTH // len(config.federation.centres)))
    require_texts("sources", sources, most * num_cohorts, MAX_TEXT_LENGTH)
    if not all(map(is_plain_text, sources)):
        raise BadReply("sources has a name that cannot be the name of a class")


# --- sums over scans --------------------------------------------------------------------------------------


def _require_statistics(run: Run, request: StatisticsRequest, reply: StatisticsReply) -> None:
    require_number("seconds", reply.seconds)
    is_masked = hides_statistics(run.config)
    _require_public_keys(is_masked, reply.sum_id, reply.public_keys)
    if is_masked:
        require_keys("sums", reply.sums, ())
        return
    cohorts = run.membership.members[reply.centre].cohorts
    expected = expected_sums(request, run.config, run.model.layout, cohorts)
    require_expected_sums(request, reply.sums, expected)


# --- an update --------------------------------------------------------------------------------------------


def _require_training(run: Run, request: TrainRequest, reply: TrainReply) -> None:
    config = run.config
    stage = config.stages[request.stage]
    is_masked = uses_secagg(config, request)
    _require_public_keys(is_masked, reply.sum_id, reply.public_keys)
    require_count("scans", reply.scans)
    require_count("steps", reply.steps)
    require_number("seconds", reply.seconds)
    if reply.epsilon is not None:
        if config.privacy.dp_level != "patient":
            raise BadReply("epsilon is not spent in this run")
        require_number("epsilon", reply.epsilon)
    require_keys("losses", reply.losses, stage_tasks(config, stage))
    for task, loss in reply.losses.items():
        _require_loss(task, loss)
    layout = run.model.layout
    require_array("int_buffers", reply.int_buffers, "int64", (layout.int_buffer_size,))
    require_not_negative("int_buffers", reply.int_buffers)
    if reply.int_buffers.size and int(reply.int_buffers.max()) > MAX_COUNT:
        raise BadReply(f"int_buffers has a value beyond {MAX_COUNT}")
    has_no_weights = is_masked or "all" in stage.local_layers
    _require_delta(config, layout, reply, has_no_weights)


def _require_loss(task: str, loss: object) -> None:
    field = f"losses of task '{task}'"
    if not isinstance(loss, list) or len(loss) != 2:
        raise BadReply(f"{field} is not a sum and a number of scans")
    for number in loss:
        require_number(field, number)


def _require_delta(config: Config, layout: Layout, reply: TrainReply, has_no_weights: bool) -> None:
    """Require the change of the weights in the run's codec, in arrays of the right sizes.

    Its values are checked when they have been decoded (server/aggregation/screening.py).
    """
    codec = select_codec(config)
    if has_no_weights or codec != "fp32":
        require_array("delta", reply.delta, "float32", (0,))
    else:
        require_array("delta", reply.delta, "float32", (layout.size,))
    if has_no_weights or codec == "fp32":
        require_keys("encoded_delta", reply.encoded_delta, ())
        return
    arrays = reply.encoded_delta
    if arrays.keys() != {"codes", "scales", "rest"}:
        raise BadReply("encoded_delta does not have the arrays codes, scales and rest")
    num_codes = layout.num_parameters
    num_scales = sum(map(count_channels, layout.parameter_slots))
    require_array("encoded_delta scales", arrays["scales"], "uint16", (num_scales,))
    require_array("encoded_delta rest", arrays["rest"], "float32", (layout.size - num_codes,))
    require_finite("encoded_delta rest", arrays["rest"])
    if codec == "int4":
        _require_compressed(arrays["codes"], num_codes)
    else:
        dtype = "float16" if codec == "fp16" else "int8"
        require_array("encoded_delta codes", arrays["codes"], dtype, (num_codes,))


def _require_compressed(codes: ByteArray, num_codes: int) -> None:
    """Require compressed codes that are not longer than compression can make them."""
    num_bytes = math.ceil(num_codes / 2)
    require_array("encoded_delta codes", codes, "uint8", (codes.size,))
    if codes.size > num_bytes + num_bytes // 128 + 1024:
        raise BadReply("encoded_delta codes is longer than its codes are without compression")


# --- secure sums ------------------------------------------------------------------------------------------


def _require_public_keys(is_masked: bool, sum_id: str, public_keys: ByteArray | None) -> None:
    """Require public keys where the reply is part of a secure sum, and none where it is not."""
    if not is_masked:
        if sum_id or public_keys is not None:
            raise BadReply("it is part of a secure sum, and this run has none here")
        return
    require_text("sum_id", sum_id, SUM_ID_LENGTH)
    require_array("public_keys", public_keys, "uint8", (PUBLIC_KEYS_BYTES,))
    keys = parse_public_keys(np.asarray(public_keys))
    for key in (keys.mask_key, keys.share_key):
        try:
            derive_shared_key(os.urandom(KEY_BYTES), key, b"")
        except ValueError:  # a point of low order, with which every centre's part of the sum would fail
            raise BadReply("public_keys has a key that no secret can be agreed on with") from None
    if keys.mask_key == keys.share_key:
        raise BadReply("public_keys has the same key twice")


def _require_shares(shares: dict[str, ByteArray], receivers: Collection[str]) -> None:
    if shares.keys() != set(receivers):
        raise BadReply("shares are not for the other centres of the sum")
    sizes = {share.size for share in shares.values()}
    for share in shares.values():
        require_array("shares", share, "uint8", (max(sizes),))
        if not 0 <= share.size - ENCRYPTED_SHARE_BYTES <= MAX_PIECES:
            raise BadReply("shares cannot be of two secrets and the sizes of a sum's pieces")


def _require_revealed_shares(config: Config, request: UnmaskRequest, reply: UnmaskReply) -> None:
    require_keys("shares", reply.shares, config.federation.centres)
    for centre, share in reply.shares.items():
        num_bytes = SEED_SHARE_BYTES if centre in request.survivors else KEY_SHARE_BYTES
        require_array("shares", share, "uint8", (num_bytes,))
