"""How the present weights reach the centres in few bytes: a centre that holds the last ones is sent what changed, in the run's codec.

The server rounds its own step before anybody sees it (`rounded`): the run's weights are then exactly what a centre gets that adds the codes to
what it holds, wherever and however often they are put together, and what rounding took is added to the next step. Who lacks them gets them whole.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from common.codec import changed, codec_of, encode
from common.messages import Answer, Contribution, Lacking, Mask, Query, Refusal, Request, Share, Train, Unmask
from common.weights import NONE, Weights
from server.orders import heed
from server.state import Run, reason_of
from server.transport import Received

LEFT = "left.npy"


def rounded(run: Run, after: Weights) -> Weights:
    """The next weights as the codec can say them; `after` is written over. What is lost lies in `run.moments`, which a checkpoint holds."""
    codec = codec_of(run.config)
    if codec == "fp32":
        return after
    np.subtract(after.floats, run.weights.floats, out=after.floats)
    left = run.moments.get("left")
    if not isinstance(left, np.memmap):  # a model's size, wanted once a round: on disk, from where a checkpoint takes it
        forget_left(run)
        kept, left = left, np.lib.format.open_memmap(run.folder / LEFT, "w+", np.float32, after.floats.shape)
        if kept is not None:
            left[:] = kept
    codes, run.moments["left"] = encode(after.floats, run.layout, codec, left)
    reached = Weights(changed(run.weights.floats, codes, run.layout, codec, after.floats), after.integers)
    run.change = run.weights.digest, reached.digest, codes
    return reached


def forget_left(run: Run) -> None:
    """What the last stage's rounding left is of no use to the next."""
    run.moments.pop("left", None)
    (run.folder / LEFT).unlink(missing_ok=True)


def send(run: Run, requests: Mapping[str, Request]) -> Iterator[Received]:
    """`run.transport.ask` with the run's weights as short as each centre can do with. Who lacks what they build on is asked again; who was never
    met, or runs other code, is not asked at all."""
    for centre in requests.keys() - run.presence.keys():
        run.traffic.setdefault(centre, (0, 0))
        yield Received(centre, Refusal(centre, run.refused.get(centre, "not connected")))
    requests = {c: r for c, r in requests.items() if c in run.presence}
    federated = codec_of(run.config) != "fp32" and any(_weights(r) is run.weights for r in requests.values())
    digest = run.weights.digest if federated else ""
    short = {c: shortened(run, r, run.held.get(c, ""), digest) if _weights(r) is run.weights else r for c, r in requests.items()}
    lacking: dict[str, Request] = {}
    while short:
        again, lacking = bool(lacking), {}
        for received in answers(run, short, again):
            centre, reply = received.centre, received.reply
            up, down = run.traffic.get(centre, (0, 0))
            run.traffic[centre] = up + received.bytes_up, down + received.bytes_down
            if isinstance(reply, Lacking) and short[centre] is not requests[centre]:
                lacking[centre] = requests[centre]
                continue
            if isinstance(reply, Answer | Contribution) and digest and _weights(requests[centre]) is run.weights:
                run.held[centre] = digest
            elif isinstance(reply, Refusal | Lacking):
                run.held.pop(centre, None)
            yield received
            del received, reply  # before the next is taken: its memory is wanted
        short = lacking


def answers(run: Run, requests: Mapping[str, Request], again: bool) -> Iterator[Received]:
    """`run.transport.ask`, written to the ledger as it happens; an operator who stops the run, or excludes who keeps it waiting, is heard.

    `again`: these have been asked before, and lacked what the request builds on.
    """
    (stage, round), doing = run.at, _doing(next(iter(requests.values())))
    if not again:
        run.ledger.progress(run.id, stage, round, doing, asked=list(requests))
    waiting, began = set(requests), time.monotonic()
    for received in run.transport.ask(requests, run.config.federation.deadline):
        heed(run)
        if received is None:
            if waiting <= run.excluded.keys():
                break
            continue
        waiting.discard(received.centre)
        if received.centre in run.excluded:
            received = replace(received, reply=Refusal(received.centre, run.excluded[received.centre], declined=True))
        if not isinstance(received.reply, Lacking):
            reason = reason_of(received.reply) if isinstance(received.reply, Refusal) else None
            took = {"seconds": time.monotonic() - began, "bytes_up": received.bytes_up, "bytes_down": received.bytes_down}
            run.ledger.progress(run.id, stage, round, doing, centre=received.centre, reason=reason, **took)
        yield received
    for centre in waiting:  # all of them excluded
        yield Received(centre, Refusal(centre, run.excluded[centre], declined=True))


def _doing(request: Request) -> str:
    """In the words of `tables.progress`."""
    if isinstance(request, Share | Mask | Unmask):
        return "secure sum"
    return "train" if isinstance(request, Train) else request.name if isinstance(request, Query) else "meet"


def shortened(run: Run, request: Request, held: str, digest: str) -> Request:
    """A request for a centre that holds the weights of digest `held` and shall have those of `digest`."""
    base, reached, change = run.change
    short = Weights(NONE, run.weights.integers)
    if isinstance(request, Query | Train) and held and held == digest:
        return replace(request, weights=short, base=held, digest=digest)
    if isinstance(request, Query | Train) and held and (held, digest) == (base, reached):
        return replace(request, weights=short, base=held, digest=digest, change=change)
    return request


def _weights(request: Request) -> Weights | None:
    return request.weights if isinstance(request, Query | Train) else None
