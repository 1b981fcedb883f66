"""Send the global weights in few bytes: a centre that has the last ones receives the difference.

The difference is encoded with the run's codec. The coordinator quantizes its own step before anybody receives
it (`quantize_server_step`). The global weights are therefore exactly what a centre computes that adds the
encoded difference to what it holds, and what quantization took from one step is added to the next. A centre
that lacks the last weights receives all of them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from common.modeling.parameters import EMPTY_PARAMS, Weights
from common.protocol.messages import (
    BaseWeightsMissing,
    MaskedInputRequest,
    Refusal,
    Request,
    ShareKeysRequest,
    StatisticsReply,
    StatisticsRequest,
    TrainReply,
    TrainRequest,
    UnmaskRequest,
)
from common.protocol.update_codec import apply_update, encode_update, select_codec
from common.utils.errors import RefusalCode
from server.run.operator_commands import apply_pending_commands
from server.run.reply_validation import validate_reply
from server.run.run_state import Run, ServerStep
from server.run.transport import ReceivedReply

RESIDUAL_FILE = "left.npy"
RESIDUAL_KEY = "left"  # in the optimiser's state: what quantization took from the last step


def quantize_server_step(run: Run, next_weights: Weights) -> Weights:
    """Return the next weights as the run's codec can express them, and note the step for the broadcast.

    `next_weights` is overwritten. What quantization takes is kept in the optimiser's state, and so in the
    checkpoint.
    """
    codec = select_codec(run.config)
    if codec == "fp32":
        return next_weights
    weights, layout = run.model.weights, run.model.layout
    np.subtract(next_weights.floats, weights.floats, out=next_weights.floats)
    residual = _residual_on_disk(run, next_weights.floats.shape)
    encoded, run.model.optimiser_state[RESIDUAL_KEY] = encode_update(
        next_weights.floats, layout, codec, residual
    )
    floats = apply_update(weights.floats, encoded, layout, codec, next_weights.floats)
    quantized = Weights(floats, next_weights.int_buffers)
    run.broadcast.last_step = ServerStep(weights.digest, quantized.digest, encoded)
    return quantized


def _residual_on_disk(run: Run, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Return the last step's residual, in a file: it is as large as the model and needed once a round."""
    residual = run.model.optimiser_state.get(RESIDUAL_KEY)
    if isinstance(residual, np.memmap):
        return residual
    clear_residual(run)
    on_disk = np.lib.format.open_memmap(run.run_dir / RESIDUAL_FILE, "w+", np.float32, shape)
    if residual is not None:
        on_disk[:] = residual
    return on_disk


def clear_residual(run: Run) -> None:
    """Forget what quantization took from a finished stage's last step."""
    run.model.optimiser_state.pop(RESIDUAL_KEY, None)
    (run.run_dir / RESIDUAL_FILE).unlink(missing_ok=True)


def send_requests(run: Run, requests: Mapping[str, Request]) -> Iterator[ReceivedReply]:
    """Send requests with as few bytes of weights as each centre can do with, and yield the replies.

    A centre that lacks the weights that its request builds on is asked again with all of them. A centre that
    is no member of the run is not asked; it yields its refusal.
    """
    member_requests: dict[str, Request] = {}
    for centre, request in requests.items():
        if centre in run.membership.members:
            member_requests[centre] = request
    for centre in requests.keys() - member_requests.keys():
        run.traffic.add(centre)
        not_connected = Refusal(centre, "not connected", code=RefusalCode.OFFLINE)
        yield ReceivedReply(centre, run.membership.refusals.get(centre, not_connected))
    yield from _send_to_members(run, member_requests)


def _send_to_members(run: Run, requests: Mapping[str, Request]) -> Iterator[ReceivedReply]:
    digest = _broadcast_digest(run, requests)
    to_send = {centre: _shorten_request(run, centre, request, digest) for centre, request in requests.items()}
    is_retry = False
    while to_send:
        base_missing: dict[str, Request] = {}
        for received in collect_replies(run, to_send, is_retry):
            centre = received.centre
            run.traffic.add(centre, received.bytes_up, received.bytes_down)
            was_shortened = to_send[centre] is not requests[centre]
            if was_shortened and isinstance(received.reply, BaseWeightsMissing):
                base_missing[centre] = requests[centre]
                continue
            _note_held_weights(run, received, requests[centre], digest)
            yield received
            del received  # before the next reply is received: its memory is needed
        to_send = base_missing
        is_retry = True


def _broadcast_digest(run: Run, requests: Mapping[str, Request]) -> str:
    """Return the digest of the global weights; "" if they travel unquantized, or if no request has them."""
    if select_codec(run.config) == "fp32":
        return ""
    if not any(_carries_global_weights(run, request) for request in requests.values()):
        return ""
    return run.model.weights.digest


def _carries_global_weights(run: Run, request: Request) -> bool:
    return isinstance(request, StatisticsRequest | TrainRequest) and request.weights is run.model.weights


def _shorten_request(run: Run, centre: str, request: Request, digest: str) -> Request:
    if not _carries_global_weights(run, request):
        return request
    return as_delta_request(run, request, run.broadcast.held_digests.get(centre, ""), digest)


def _note_held_weights(run: Run, received: ReceivedReply, request: Request, digest: str) -> None:
    """Note which weights the centre holds now that it has replied."""
    if isinstance(received.reply, Refusal | BaseWeightsMissing):
        run.broadcast.held_digests.pop(received.centre, None)
        return
    used_weights = isinstance(received.reply, StatisticsReply | TrainReply)
    if used_weights and digest and _carries_global_weights(run, request):
        run.broadcast.held_digests[received.centre] = digest


def collect_replies(run: Run, requests: Mapping[str, Request], is_retry: bool) -> Iterator[ReceivedReply]:
    """Send requests and yield the replies, each validated and written to the ledger as it arrives.

    Operators' commands take effect in the meantime: a stop ends the run, an excluded centre is no longer
    waited for.

    Args:
        run: the run.
        requests: {centre: request}, all of one kind.
        is_retry: the same centres were asked before and lacked the weights that the request builds on.
    """
    activity = _activity_name(next(iter(requests.values())))
    if not is_retry:
        run.ledger.log_progress(run.run_id, *run.position, activity, asked_centres=list(requests))
    waiting = set(requests)
    started = time.monotonic()
    for received in run.transport.send_and_receive(requests, run.config.federation.round_timeout):
        apply_pending_commands(run)
        excluded = run.commands.excluded_centres
        if received is None:
            if waiting <= excluded.keys():
                break
            continue
        waiting.discard(received.centre)
        reply = validate_reply(run, received.centre, requests[received.centre], received.reply)
        received = replace(received, reply=reply)
        del reply
        if received.centre in excluded:
            received = replace(received, reply=_exclusion_refusal(run, received.centre))
        _log_reply(run, activity, received, time.monotonic() - started)
        yield received
        del received  # before the next reply is received: its memory is needed
    for centre in waiting:  # only excluded centres are left
        yield ReceivedReply(centre, _exclusion_refusal(run, centre))


def _exclusion_refusal(run: Run, centre: str) -> Refusal:
    reason = run.commands.excluded_centres[centre]
    return Refusal(centre, reason, permanent=True, code=RefusalCode.EXCLUDED)


def _log_reply(run: Run, activity: str, received: ReceivedReply, seconds: float) -> None:
    if isinstance(received.reply, BaseWeightsMissing):
        return  # the centre is asked again
    refusal = received.reply if isinstance(received.reply, Refusal) else None
    run.ledger.log_progress(
        run.run_id,
        *run.position,
        activity,
        centre=received.centre,
        reason=refusal.reason if refusal else None,
        code=refusal.code if refusal else None,
        seconds=seconds,
        bytes_up=received.bytes_up,
        bytes_down=received.bytes_down,
    )


def _activity_name(request: Request) -> str:
    """Return what the ledger's progress table calls a request."""
    match request:
        case ShareKeysRequest() | MaskedInputRequest() | UnmaskRequest():
            return "secure sum"
        case TrainRequest():
            return "train"
        case StatisticsRequest():
            return request.name
        case _:
            return "handshake"


def as_delta_request(run: Run, request: Request, held_digest: str, target_digest: str) -> Request:
    """Return the request with the difference in place of the weights, where the centre's weights allow it.

    Args:
        run: the run.
        request: a request with the global weights.
        held_digest: the digest of the weights that the centre holds; "" if unknown.
        target_digest: the digest of the weights that it shall use.
    """
    if not isinstance(request, StatisticsRequest | TrainRequest) or not held_digest:
        return request
    step = run.broadcast.last_step
    if held_digest == target_digest:
        encoded_delta = request.encoded_delta
    elif step and (held_digest, target_digest) == (step.base_digest, step.target_digest):
        encoded_delta = step.encoded_delta
    else:
        return request
    return replace(
        request,
        weights=Weights(EMPTY_PARAMS, run.model.weights.int_buffers),
        base_digest=held_digest,
        target_digest=target_digest,
        encoded_delta=encoded_delta,
    )
