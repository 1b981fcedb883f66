"""How the present weights reach the centres in few bytes: a centre that holds the last ones is sent what changed, in the run's codec.

The server rounds its own step before anybody sees it (`rounded`): the run's weights are then exactly what a centre gets that adds the codes to
what it holds, wherever and however often they are put together, and what rounding took is added to the next step. Who lacks them gets them whole.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

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
from server.run.operator_commands import apply_pending_commands
from server.run.run_state import Run, refusal_reason
from server.run.transport import ReceivedReply

RESIDUAL_FILE = "left.npy"


def quantize_server_step(run: Run, next_weights: Weights) -> Weights:
    """The next weights as the codec can say them; `after` is written over. What is lost lies in `run.moments`, which a checkpoint holds."""
    codec = select_codec(run.config)
    if codec == "fp32":
        return next_weights
    np.subtract(next_weights.floats, run.weights.floats, out=next_weights.floats)
    left = run.optimiser_state.get("left")
    if not isinstance(
        left, np.memmap
    ):  # a model's size, wanted once a round: on disk, from where a checkpoint takes it
        clear_residual(run)
        kept, left = (
            left,
            np.lib.format.open_memmap(
                run.run_dir / RESIDUAL_FILE, "w+", np.float32, next_weights.floats.shape
            ),
        )
        if kept is not None:
            left[:] = kept
    codes, run.optimiser_state["left"] = encode_update(next_weights.floats, run.layout, codec, left)
    reached = Weights(
        apply_update(run.weights.floats, codes, run.layout, codec, next_weights.floats),
        next_weights.int_buffers,
    )
    run.broadcast_delta = run.weights.digest, reached.digest, codes
    return reached


def clear_residual(run: Run) -> None:
    """What the last stage's rounding left is of no use to the next."""
    run.optimiser_state.pop("left", None)
    (run.run_dir / RESIDUAL_FILE).unlink(missing_ok=True)


def send_requests(run: Run, requests: Mapping[str, Request]) -> Iterator[ReceivedReply]:
    """`run.transport.ask` with the run's weights as short as each centre can do with. Who lacks what they build on is asked again; who was never
    met, or runs other code, is not asked at all."""
    for centre in requests.keys() - run.members.keys():
        run.traffic.setdefault(centre, (0, 0))
        yield ReceivedReply(centre, Refusal(centre, run.refusals.get(centre, "not connected")))
    requests = {c: r for c, r in requests.items() if c in run.members}
    federated = select_codec(run.config) != "fp32" and any(
        _request_weights(r) is run.weights for r in requests.values()
    )
    digest = run.weights.digest if federated else ""
    short = {
        c: as_delta_request(run, r, run.held_digests.get(c, ""), digest)
        if _request_weights(r) is run.weights
        else r
        for c, r in requests.items()
    }
    lacking: dict[str, Request] = {}
    while short:
        again, lacking = bool(lacking), {}
        for received in collect_replies(run, short, again):
            centre, reply = received.centre, received.reply
            up, down = run.traffic.get(centre, (0, 0))
            run.traffic[centre] = up + received.bytes_up, down + received.bytes_down
            if isinstance(reply, BaseWeightsMissing) and short[centre] is not requests[centre]:
                lacking[centre] = requests[centre]
                continue
            if (
                isinstance(reply, StatisticsReply | TrainReply)
                and digest
                and _request_weights(requests[centre]) is run.weights
            ):
                run.held_digests[centre] = digest
            elif isinstance(reply, Refusal | BaseWeightsMissing):
                run.held_digests.pop(centre, None)
            yield received
            del received, reply  # before the next is taken: its memory is wanted
        short = lacking


def collect_replies(run: Run, requests: Mapping[str, Request], is_retry: bool) -> Iterator[ReceivedReply]:
    """`run.transport.ask`, written to the ledger as it happens; an operator who stops the run, or excludes who keeps it waiting, is heard.

    `again`: these have been asked before, and lacked what the request builds on.
    """
    (stage, round), doing = run.stage_and_round, _activity_name(next(iter(requests.values())))
    if not is_retry:
        run.ledger.log_progress(run.run_id, stage, round, doing, asked=list(requests))
    waiting, began = set(requests), time.monotonic()
    for received in run.transport.send_and_receive(requests, run.config.federation.round_timeout):
        apply_pending_commands(run)
        if received is None:
            if waiting <= run.excluded_centres.keys():
                break
            continue
        waiting.discard(received.centre)
        if received.centre in run.excluded_centres:
            received = replace(
                received,
                reply=Refusal(received.centre, run.excluded_centres[received.centre], permanent=True),
            )
        if not isinstance(received.reply, BaseWeightsMissing):
            reason = refusal_reason(received.reply) if isinstance(received.reply, Refusal) else None
            took = {
                "seconds": time.monotonic() - began,
                "bytes_up": received.bytes_up,
                "bytes_down": received.bytes_down,
            }
            run.ledger.log_progress(
                run.run_id, stage, round, doing, centre=received.centre, reason=reason, **took
            )
        yield received
        del received  # as above
    for centre in waiting:  # all of them excluded
        yield ReceivedReply(centre, Refusal(centre, run.excluded_centres[centre], permanent=True))


def _activity_name(request: Request) -> str:
    """In the words of `tables.progress`."""
    if isinstance(request, ShareKeysRequest | MaskedInputRequest | UnmaskRequest):
        return "secure sum"
    return (
        "train"
        if isinstance(request, TrainRequest)
        else request.name
        if isinstance(request, StatisticsRequest)
        else "meet"
    )


def as_delta_request(run: Run, request: Request, held_digest: str, target_digest: str) -> Request:
    """A request for a centre that holds the weights of digest `held` and shall have those of `digest`."""
    base, reached, change = run.broadcast_delta
    short = Weights(EMPTY_PARAMS, run.weights.int_buffers)
    if isinstance(request, StatisticsRequest | TrainRequest) and held_digest and held_digest == target_digest:
        return replace(request, weights=short, base_digest=held_digest, target_digest=target_digest)
    if (
        isinstance(request, StatisticsRequest | TrainRequest)
        and held_digest
        and (held_digest, target_digest) == (base, reached)
    ):
        return replace(
            request, weights=short, base_digest=held_digest, target_digest=target_digest, encoded_delta=change
        )
    return request


def _request_weights(request: Request) -> Weights | None:
    return request.weights if isinstance(request, StatisticsRequest | TrainRequest) else None
