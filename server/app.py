"""Flower's ServerApp: the run's configuration in, `server/rounds/run_lifecycle.py` to do it, Flower's grid as transport."""

from __future__ import annotations

import contextlib
import logging
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping

import httpx
from flwr.app import Context, Message, MessageType
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import RunNotRunningException

from common.config.compose import compose_config
from common.protocol.flower_records import from_records, to_records
from common.protocol.messages import (
    JoinReply,
    JoinRequest,
    Refusal,
    Reply,
    Request,
    TrainRequest,
    pack_message,
)
from common.utils.errors import ConsiliumError
from common.utils.log_setup import configure_logging
from server.rounds.cross_validation import resume_run_or_folds, start_run_or_folds
from server.rounds.run_lifecycle import generate_run_id, open_ledger, resolve_runs_dir
from server.run.run_state import RunPaused
from server.run.transport import ReceivedReply

app = ServerApp()
RECONNECT_TIMEOUT = 900.0  # seconds that a SuperLink may be away; Flower itself would try for ever
log = logging.getLogger("consilium.server")

FLOWER_ERROR_REASONS = {  # of Flower's error codes, in words an operator can act on
    2: "the client application failed; the centre's log has the reason",
    3: "the node's message was lost",
    5: "the centre's connection was lost",
}


class FlowerTransport:
    """server/run/transport.py over Flower's grid. Replies are pulled one at a time: the others wait at the SuperLink, not in this memory."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        if hasattr(grid, "_retry_invoker"):  # of a deployed run; the simulation's SuperLink is not left alone
            grid._retry_invoker.max_time = RECONNECT_TIMEOUT
        self.run_id = ""  # whose nodes these are: every run of a cross-validation meets them anew
        self.node_ids: dict[str, int] = {}
        self.ineligible_nodes: set[int] = set()  # nodes that have no part in this run

    def discover(
        self, request: Request, expected: list[str], timeout: float
    ) -> Iterator[ReceivedReply | None]:
        if request.run_id != self.run_id:
            self.run_id, self.node_ids, self.ineligible_nodes = request.run_id, {}, set()
        self.ineligible_nodes.clear()  # who refused, or is expected again, may have been mended since
        for centre in expected:
            self.node_ids.pop(centre, None)
        until = time.monotonic() + timeout
        pending: dict[str, int] = {}
        told = False
        while True:
            known = {*self.node_ids.values(), *pending.values(), *self.ineligible_nodes}
            for node in self._online_nodes():
                if node not in known:
                    pending[self._push_message(request, node, 3600.0)] = node
            for message_id in list(pending):
                for message in self._pull_messages(message_id):
                    node = pending.pop(message_id)
                    reply = _to_reply(message)
                    if isinstance(reply, JoinReply) and reply.centre:
                        self.node_ids[reply.centre] = node
                        yield ReceivedReply(reply.centre, reply)
                    else:
                        self.ineligible_nodes.add(node)
                        if isinstance(reply, Refusal):
                            yield ReceivedReply(reply.centre or f"node {node}", reply)
            ready = all(c in self.node_ids for c in expected)
            # A node that is preparing its scans is not absent: wait for it beyond `wait`, which is for nodes to appear.
            if ready or (not pending and (time.monotonic() > until or self._all_nodes_replied(expected))):
                return
            if pending and not told and time.monotonic() > until:
                told = True
                log.info(
                    "%d nodes are preparing their scans; one that did so before and never answers needs a restart",
                    len(pending),
                )
            yield None
            time.sleep(0.3)

    def _all_nodes_replied(self, expected: list[str]) -> bool:
        """Every node that could be a missing centre has said that it is not, and there are as many as expected."""
        return len(self.ineligible_nodes) > 0 and len(self.node_ids) + len(self.ineligible_nodes) >= len(
            expected
        )

    def send_and_receive(
        self, requests: Mapping[str, Request], timeout: float
    ) -> Iterator[ReceivedReply | None]:
        until = time.monotonic() + timeout
        online = self._online_nodes()
        pending: dict[str, str] = {}
        down: dict[str, int] = {}
        for centre, request in requests.items():
            if self.node_ids.get(centre) not in online:
                yield ReceivedReply(centre, Refusal(centre, "not connected"))
                continue
            down[centre] = sum(a.nbytes for a in pack_message(request)[0].values())
            pending[self._push_message(request, self.node_ids[centre], timeout)] = centre
        asked = time.monotonic()
        while pending and (looked := time.monotonic()) < until:
            came = False
            for message_id, centre in list(pending.items()):
                if received := self._poll_reply(message_id, centre, down[centre]):
                    del pending[message_id]
                    came = True
                    yield received
                    del received  # before the next is pulled: its memory is wanted
            if not came:  # looking costs a request a centre: at most half of the time, and the less often the longer it takes, by 1 %
                yield None
                time.sleep(max(0.05, time.monotonic() - looked, min(2.0, 0.01 * (looked - asked))))
        for centre in pending.values():
            yield ReceivedReply(centre, Refusal(centre, f"no reply within {timeout:.0f} s"))

    def _poll_reply(self, message_id: str, centre: str, bytes_down: int) -> ReceivedReply | None:
        """The reply to a message, if it is there."""
        for message in self._pull_messages(message_id):
            reply = _to_reply(message)
            return ReceivedReply(
                centre, reply, sum(a.nbytes for a in pack_message(reply)[0].values()), bytes_down
            )
        return None

    def _push_message(self, request: Request, node: int, ttl: float) -> str:
        kind = MessageType.TRAIN if isinstance(request, TrainRequest) else MessageType.QUERY
        message = Message(content=to_records(request), message_type=kind, dst_node_id=node, ttl=ttl)
        with superlink_errors():
            return next(iter(self.grid.push_messages([message])))

    def _pull_messages(self, message_id: str) -> list[Message]:
        with superlink_errors():
            return list(self.grid.pull_messages([message_id]))

    def _online_nodes(self) -> set[int]:
        with superlink_errors():
            return set(self.grid.get_node_ids())


@contextlib.contextmanager
def superlink_errors() -> Iterator[None]:
    """A SuperLink that is away is waited for, up to `AWAY`; one that stays away, or fails, pauses the run."""
    try:
        yield
    except RunNotRunningException:
        raise RunPaused(
            "the SuperLink has ended this run's process: it was stopped, or not heard of for a minute"
        ) from None
    except httpx.HTTPStatusError as error:
        raise RunPaused(f"the SuperLink answers {error.response.status_code}; see its log") from None
    except httpx.HTTPError as error:
        raise RunPaused(
            f"the SuperLink has been away for {RECONNECT_TIMEOUT / 60:.0f} minutes ({type(error).__name__}); start it again"
        ) from None


@contextlib.contextmanager
def pause_on_signals() -> Iterator[None]:
    """What would end this process pauses the run, so that the ledger says so: `flwr stop`, a container's stop, and a SuperLink that comes back
    after it has given the run up (Flower then sends this process SIGINT)."""

    def pause(number: int, _: object) -> None:
        raise RunPaused(
            f"its process was told to end ({signal.Signals(number).name}): by a person, or by a SuperLink back from a long outage"
        )

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, pause) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _to_reply(message: Message) -> Reply:
    """A message's reply; Flower's own errors and anything malformed become a Refusal."""
    if message.has_error():
        return Refusal("", FLOWER_ERROR_REASONS.get(message.error.code, f"Flower error {message.error.code}"))
    try:
        reply = from_records(message.content)
    except (KeyError, TypeError, ValueError) as error:
        return Refusal("", f"a malformed reply ({type(error).__name__}: {error})")
    return (
        Refusal("", "a request instead of a reply")
        if isinstance(reply, JoinRequest | TrainRequest)
        else reply
    )  # type: ignore[return-value]


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One run, new or resumed."""
    settings = {key: str(value) for key, value in context.run_config.items()}
    configure_logging()
    try:
        runs = resolve_runs_dir(settings["runs"])
        ledger = open_ledger(runs, settings["ledger"])
        transport = FlowerTransport(grid)
        with pause_on_signals():
            if settings["resume"]:
                resume_run_or_folds(settings["resume"], transport, runs, ledger)
            else:
                config = compose_config([f"recipe={settings['recipe']}", *shlex.split(settings["overrides"])])
                start_run_or_folds(
                    config, transport, runs, ledger, settings["run"] or generate_run_id(config)
                )
    except ConsiliumError as error:
        log.error("error: %s", error)
        sys.tracebacklimit = (
            0  # Flower logs what ends a run with its stack; the sentence is all a person needs
        )
        raise
