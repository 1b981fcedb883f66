"""Centres that take part in secure sums with given numbers in place of trained ones: their own code, behind the packing of the wire."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from client import secagg
from client.policy import Policy
from common.compose import to_dict
from common.errors import Refused
from common.messages import Refusal, Reply, Request, pack, unpack
from common.schema import Config
from common.weights import Layout
from server.runs import open_ledger
from server.state import Run
from server.transport import Received


@dataclass
class Wire:
    """`lost`: (kind of request, centre) that never answers. `seen`, `asked`: all that came and went."""

    folder: Path
    config: Config
    lost: set[tuple[type, str]] = field(default_factory=set)
    policy: Policy = field(default_factory=Policy)
    seen: list[Reply] = field(default_factory=list)
    asked: list[Request] = field(default_factory=list)

    def ask(self, requests: Mapping[str, Request], deadline: float) -> Iterator[Received]:
        for centre, request in requests.items():
            self.asked.append(request)
            if (type(request), centre) in self.lost:
                yield Received(centre, Refusal(centre, "no reply"))
                continue
            try:
                reply: Reply = secagg.step(self.folder / centre, self.config, centre, cast(Any, travelled(request)), self.policy)
            except Refused as refused:
                reply = Refusal(centre, str(refused))
            self.seen.append(reply)
            up, down = (sum(array.nbytes for array in pack(message)[0].values()) for message in (reply, request))
            yield Received(centre, cast(Reply, travelled(reply)), up, down)


def travelled(message: Request | Reply) -> Request | Reply:
    """The message as it arrives."""
    arrays, facts = pack(message)
    return unpack(arrays, json.loads(json.dumps(facts)))


def run_over(wire: Wire, layout: Layout) -> Run:
    """A run that asks these centres, all of them present."""
    ledger = open_ledger(wire.folder)
    if ledger.status("r") is None:
        ledger.start_run("r", recipe="", mode="federated", config=to_dict(wire.config), code="")
    run = Run("r", wire.config, wire.folder, cast(Any, wire), ledger, layout)
    run.presence = dict.fromkeys(wire.config.federation.centres, cast(Any, None))
    return run
