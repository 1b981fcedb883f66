"""Flower's ServerApp: the run's configuration in, `server/runs.py` to do it, Flower's grid as transport."""

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

from common.compose import compose
from common.errors import ConsiliumError
from common.logs import set_up
from common.messages import Hello, Presence, Refusal, Reply, Request, Train, pack
from common.records import from_records, to_records
from server.crossval import carry_out, take_up
from server.runs import new_id, open_ledger, runs_folder
from server.state import Paused
from server.transport import Received

app = ServerApp()
AWAY = 900.0  # seconds that a SuperLink may be away; Flower itself would try for ever
log = logging.getLogger("consilium.server")

REASONS = {  # of Flower's error codes, in words an operator can act on
    2: "the client application failed; the centre's log has the reason",
    3: "the node's message was lost",
    5: "the centre's connection was lost",
}


class FlowerTransport:
    """server/transport.py over Flower's grid. Replies are pulled one at a time: the others wait at the SuperLink, not in this memory."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        if hasattr(grid, "_retry_invoker"):  # of a deployed run; the simulation's SuperLink is not left alone
            grid._retry_invoker.max_time = AWAY
        self.run = ""  # whose nodes these are: every run of a cross-validation meets them anew
        self.nodes: dict[str, int] = {}
        self.silent: set[int] = set()  # nodes that have no part in this run

    def greet(self, request: Request, expected: list[str], wait: float) -> Iterator[Received | None]:
        if request.run != self.run:
            self.run, self.nodes, self.silent = request.run, {}, set()
        self.silent.clear()  # who refused, or is expected again, may have been mended since
        for centre in expected:
            self.nodes.pop(centre, None)
        until = time.monotonic() + wait
        pending: dict[str, int] = {}
        told = False
        while True:
            known = {*self.nodes.values(), *pending.values(), *self.silent}
            for node in self._online():
                if node not in known:
                    pending[self._push(request, node, 3600.0)] = node
            for message_id in list(pending):
                for message in self._pull(message_id):
                    node = pending.pop(message_id)
                    reply = _reply(message)
                    if isinstance(reply, Presence) and reply.centre:
                        self.nodes[reply.centre] = node
                        yield Received(reply.centre, reply)
                    else:
                        self.silent.add(node)
                        if isinstance(reply, Refusal):
                            yield Received(reply.centre or f"node {node}", reply)
            ready = all(c in self.nodes for c in expected)
            # A node that is preparing its scans is not absent: wait for it beyond `wait`, which is for nodes to appear.
            if ready or (not pending and (time.monotonic() > until or self._all_heard(expected))):
                return
            if pending and not told and time.monotonic() > until:
                told = True
                log.info("%d nodes are preparing their scans; one that did so before and never answers needs a restart", len(pending))
            yield None
            time.sleep(0.3)

    def _all_heard(self, expected: list[str]) -> bool:
        """Every node that could be a missing centre has said that it is not, and there are as many as expected."""
        return len(self.silent) > 0 and len(self.nodes) + len(self.silent) >= len(expected)

    def ask(self, requests: Mapping[str, Request], deadline: float) -> Iterator[Received | None]:
        until = time.monotonic() + deadline
        online = self._online()
        pending: dict[str, str] = {}
        down: dict[str, int] = {}
        for centre, request in requests.items():
            if self.nodes.get(centre) not in online:
                yield Received(centre, Refusal(centre, "not connected"))
                continue
            down[centre] = sum(a.nbytes for a in pack(request)[0].values())
            pending[self._push(request, self.nodes[centre], deadline)] = centre
        asked = time.monotonic()
        while pending and (looked := time.monotonic()) < until:
            came = False
            for message_id, centre in list(pending.items()):
                if received := self._received(message_id, centre, down[centre]):
                    del pending[message_id]
                    came = True
                    yield received
                    del received  # before the next is pulled: its memory is wanted
            if not came:  # looking costs a request a centre: at most half of the time, and the less often the longer it takes, by 1 %
                yield None
                time.sleep(max(0.05, time.monotonic() - looked, min(2.0, 0.01 * (looked - asked))))
        for centre in pending.values():
            yield Received(centre, Refusal(centre, f"no reply within {deadline:.0f} s"))

    def _received(self, message_id: str, centre: str, down: int) -> Received | None:
        """The reply to a message, if it is there."""
        for message in self._pull(message_id):
            reply = _reply(message)
            return Received(centre, reply, sum(a.nbytes for a in pack(reply)[0].values()), down)
        return None

    def _push(self, request: Request, node: int, ttl: float) -> str:
        kind = MessageType.TRAIN if isinstance(request, Train) else MessageType.QUERY
        message = Message(content=to_records(request), message_type=kind, dst_node_id=node, ttl=ttl)
        with reached():
            return next(iter(self.grid.push_messages([message])))

    def _pull(self, message_id: str) -> list[Message]:
        with reached():
            return list(self.grid.pull_messages([message_id]))

    def _online(self) -> set[int]:
        with reached():
            return set(self.grid.get_node_ids())


@contextlib.contextmanager
def reached() -> Iterator[None]:
    """A SuperLink that is away is waited for, up to `AWAY`; one that stays away, or fails, pauses the run."""
    try:
        yield
    except RunNotRunningException:
        raise Paused("the SuperLink has ended this run's process: it was stopped, or not heard of for a minute") from None
    except httpx.HTTPStatusError as error:
        raise Paused(f"the SuperLink answers {error.response.status_code}; see its log") from None
    except httpx.HTTPError as error:
        raise Paused(f"the SuperLink has been away for {AWAY / 60:.0f} minutes ({type(error).__name__}); start it again") from None


@contextlib.contextmanager
def paused_by_signals() -> Iterator[None]:
    """What would end this process pauses the run, so that the ledger says so: `flwr stop`, a container's stop, and a SuperLink that comes back
    after it has given the run up (Flower then sends this process SIGINT)."""

    def pause(number: int, _: object) -> None:
        raise Paused(f"its process was told to end ({signal.Signals(number).name}): by a person, or by a SuperLink back from a long outage")

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, pause) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _reply(message: Message) -> Reply:
    """A message's reply; Flower's own errors and anything malformed become a Refusal."""
    if message.has_error():
        return Refusal("", REASONS.get(message.error.code, f"Flower error {message.error.code}"))
    try:
        reply = from_records(message.content)
    except (KeyError, TypeError, ValueError) as error:
        return Refusal("", f"a malformed reply ({type(error).__name__}: {error})")
    return Refusal("", "a request instead of a reply") if isinstance(reply, Hello | Train) else reply  # type: ignore[return-value]


@app.main()
def main(grid: Grid, context: Context) -> None:
    """One run, new or resumed."""
    settings = {key: str(value) for key, value in context.run_config.items()}
    set_up()
    try:
        runs = runs_folder(settings["runs"])
        ledger = open_ledger(runs, settings["ledger"])
        transport = FlowerTransport(grid)
        with paused_by_signals():
            if settings["resume"]:
                take_up(settings["resume"], transport, runs, ledger)
            else:
                config = compose([f"recipe={settings['recipe']}", *shlex.split(settings["overrides"])])
                carry_out(config, transport, runs, ledger, settings["run"] or new_id(config))
    except ConsiliumError as error:
        log.error("error: %s", error)
        sys.tracebacklimit = 0  # Flower logs what ends a run with its stack; the sentence is all a person needs
        raise
