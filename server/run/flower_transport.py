"""The transport over Flower's grid. This is the only module below the app that knows Flower."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from typing import Any, NamedTuple, TypeVar

import httpx
from flwr.app import Message, MessageType
from flwr.serverapp import Grid
from flwr.supercore.run import RunNotRunningException

from common.protocol.flower_records import from_records, to_records
from common.protocol.message_packing import MalformedMessageError, pack_message
from common.protocol.messages import JoinReply, Refusal, Reply, Request, TrainRequest
from common.utils.errors import RefusalCode
from server.run.node_directory import NodeDirectory, WrongSender
from server.run.run_state import RunPaused
from server.run.stop_signal import StopSignal
from server.run.transport import ReceivedReply

RECONNECT_TIMEOUT = 900.0  # seconds that a call to the SuperLink may take; Flower itself would retry for ever
JOIN_MESSAGE_TTL = 3600.0  # seconds: a node may have to prepare its scans before it answers
DISCOVERY_INTERVAL = 0.3  # seconds between two looks for nodes
SIGNAL_INTERVAL = 0.5  # seconds between two looks at the stop signal during a call
POLL_MIN_INTERVAL = 0.05  # seconds between two looks for replies
POLL_MAX_INTERVAL = 2.0
log = logging.getLogger("consilium.server")
T = TypeVar("T")


class FlowerError(NamedTuple):
    """A Flower error in words that an operator can act on."""

    reason: str
    code: RefusalCode


FLOWER_ERRORS = {  # by Flower's error code
    2: FlowerError("the client application failed; the centre's log has the reason", RefusalCode.OFFLINE),
    3: FlowerError("the node's message was lost", RefusalCode.OFFLINE),
    5: FlowerError("the centre's connection was lost", RefusalCode.OFFLINE),
}


class FlowerTransport:
    """`server.run.transport.Transport` over Flower's grid.

    Replies are pulled one at a time: the others wait at the SuperLink, not in this process's memory.
    """

    def __init__(self, grid: Grid, stop_signal: StopSignal | None = None) -> None:
        """Use `grid`; a stop signal ends any wait with RunPaused."""
        self.grid = grid
        self.stop_signal = stop_signal or StopSignal()
        self.directory = NodeDirectory()

    # --- discovery

    def discover(
        self, request: Request, expected: list[str], timeout: float
    ) -> Iterator[ReceivedReply | None]:
        """Ask every node that is online who it is.

        A node that is preparing its scans is not absent: it is waited for beyond `timeout`, which is for
        nodes to appear.
        """
        if request.run_id != self.directory.run_id:
            self.directory = NodeDirectory(request.run_id)
        self.directory.forget_expected(expected)
        deadline = time.monotonic() + timeout
        pending: dict[str, int] = {}  # {message: node}
        is_delay_logged = False
        while True:
            self._ask_new_nodes(request, pending)
            yield from self._receive_joins(pending)
            is_late = time.monotonic() > deadline
            if self.directory.has_all(expected):
                return
            if not pending and (is_late or self.directory.is_exhausted(expected)):
                return
            if is_late and not is_delay_logged:
                is_delay_logged = True
                log.info(
                    "%d nodes are preparing their scans; restart a node that did so before and never replies",
                    len(pending),
                )
            yield None
            time.sleep(DISCOVERY_INTERVAL)

    def _ask_new_nodes(self, request: Request, pending: dict[str, int]) -> None:
        for node in self._online_nodes() - self.directory.known_node_ids - set(pending.values()):
            pending[self._push_message(request, node, JOIN_MESSAGE_TTL)] = node

    def _receive_joins(self, pending: dict[str, int]) -> Iterator[ReceivedReply]:
        """Yield the replies to join requests that have arrived, and remove them from `pending`."""
        for message_id in list(pending):
            for message in self._pull_messages(message_id):
                node = pending.pop(message_id)
                yield self._identify_sender(node, to_reply(message))

    def _identify_sender(self, node: int, reply: Reply) -> ReceivedReply:
        """Return a reply to a join request under the name of the centre that the node is."""
        try:
            centre = self.directory.identify(node, reply.centre)
        except WrongSender as error:
            self.directory.impostors.add(node)
            return ReceivedReply(error.centre, Refusal(error.centre, str(error), code=RefusalCode.BAD_REPLY))
        if isinstance(reply, JoinReply):
            self.directory.node_ids[centre] = node
        else:
            self.directory.ineligible.add(node)
        return ReceivedReply(centre, reply)

    # --- requests and replies

    def send_and_receive(
        self, requests: Mapping[str, Request], timeout: float
    ) -> Iterator[ReceivedReply | None]:
        """Send the requests and yield each reply as it arrives, or a refusal for a centre that is offline."""
        deadline = time.monotonic() + timeout
        online = self._online_nodes()
        pending: dict[str, str] = {}  # {message: centre}
        bytes_down: dict[str, int] = {}
        for centre, request in requests.items():
            node = self.directory.node_ids.get(centre)
            if node is None or node not in online:
                yield ReceivedReply(centre, Refusal(centre, "not connected", code=RefusalCode.OFFLINE))
                continue
            bytes_down[centre] = _count_bytes(request)
            pending[self._push_message(request, node, timeout)] = centre
        yield from self._poll_replies(pending, bytes_down, deadline)
        for centre in pending.values():
            reason = f"no reply within {timeout:.0f} s"
            yield ReceivedReply(centre, Refusal(centre, reason, code=RefusalCode.OFFLINE))

    def _poll_replies(
        self, pending: dict[str, str], bytes_down: Mapping[str, int], deadline: float
    ) -> Iterator[ReceivedReply | None]:
        """Yield replies until all have arrived or the deadline has passed; remove them from `pending`."""
        started = time.monotonic()
        while pending:
            poll_started = time.monotonic()
            if poll_started >= deadline:
                return
            has_reply = False
            for message_id, centre in list(pending.items()):
                received = self._poll_reply(message_id, centre, bytes_down[centre])
                if received is None:
                    continue
                del pending[message_id]
                has_reply = True
                yield received
                del received  # before the next reply is pulled: its memory is needed
            if not has_reply:
                yield None
                time.sleep(_poll_interval(started, poll_started))

    def _poll_reply(self, message_id: str, centre: str, bytes_down: int) -> ReceivedReply | None:
        """Return the reply to a message if it has arrived."""
        for message in self._pull_messages(message_id):
            reply = to_reply(message)
            return ReceivedReply(centre, reply, _count_bytes(reply), bytes_down)
        return None

    # --- calls to the SuperLink

    def _push_message(self, request: Request, node: int, ttl: float) -> str:
        message_type = MessageType.TRAIN if isinstance(request, TrainRequest) else MessageType.QUERY
        message = Message(content=to_records(request), message_type=message_type, dst_node_id=node, ttl=ttl)
        return next(iter(self._call_superlink(lambda: self.grid.push_messages([message]))))

    def _pull_messages(self, message_id: str) -> list[Message]:
        return self._call_superlink(lambda: list(self.grid.pull_messages([message_id])))

    def _online_nodes(self) -> set[int]:
        """Return the nodes that are connected, and note under which names their keys are registered."""
        nodes = self._call_superlink(lambda: list(self.grid.get_nodes()))
        self.directory.note_registrations({node.node_id: node.name for node in nodes})
        return {node.node_id for node in nodes}

    def _call_superlink(self, call: Callable[[], T]) -> T:
        """Return what the call returns.

        It runs in its own thread, because Flower retries without end while the SuperLink is away: this one
        keeps looking at the stop signal and at the clock. Raises RunPaused when the SuperLink stays away or
        fails.
        """
        future: Future[T] = Future()
        threading.Thread(target=_complete, args=(future, call), daemon=True).start()
        deadline = time.monotonic() + RECONNECT_TIMEOUT
        while not wait([future], timeout=min(SIGNAL_INTERVAL, RECONNECT_TIMEOUT)).done:
            self.stop_signal.raise_if_set()
            if time.monotonic() > deadline:
                raise RunPaused(
                    f"the SuperLink has been away for {RECONNECT_TIMEOUT / 60:.0f} minutes; start it again"
                )
        self.stop_signal.raise_if_set()
        try:
            return future.result()
        except RunNotRunningException:
            raise RunPaused(
                "the SuperLink has ended this run: it was stopped, "
                "or the SuperLink heard nothing of it for a minute"
            ) from None
        except httpx.HTTPStatusError as error:
            raise RunPaused(f"the SuperLink replied {error.response.status_code}; see its log") from None
        except httpx.HTTPError as error:
            raise RunPaused(f"the SuperLink cannot be reached ({type(error).__name__})") from None


def _complete(future: Future[Any], call: Callable[[], Any]) -> None:
    try:
        future.set_result(call())
    except Exception as error:
        future.set_exception(error)


def _poll_interval(started: float, poll_started: float) -> float:
    """Return how long to wait before looking for replies again.

    A look costs one call a centre. It takes at most half of the time, and the waits grow to 1 % of the time
    so far.
    """
    duration = time.monotonic() - poll_started
    growing = min(POLL_MAX_INTERVAL, 0.01 * (poll_started - started))
    return max(POLL_MIN_INTERVAL, duration, growing)


def _count_bytes(message: Request | Reply) -> int:
    return sum(array.nbytes for array in pack_message(message)[0].values())


def to_reply(message: Message) -> Reply:
    """Return a message's reply; a Refusal for Flower's own errors and for anything malformed."""
    if message.has_error():
        unknown = FlowerError(f"Flower error {message.error.code}", RefusalCode.ERROR)
        error = FLOWER_ERRORS.get(message.error.code, unknown)
        return Refusal("", error.reason, code=error.code)
    try:
        reply = from_records(message.content)
    except MalformedMessageError as malformed:
        return Refusal("", f"bad reply: {malformed}", code=RefusalCode.BAD_REPLY)
    if not isinstance(reply, Reply):
        return Refusal("", "bad reply: it is a request", code=RefusalCode.BAD_REPLY)
    return reply
