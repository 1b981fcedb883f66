"""Centres that take part in secure sums with given numbers in place of trained ones: their own code, behind the packing of the wire."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from client.federation import secure_aggregation
from client.site.policy import Policy
from common.config.compose import config_to_dict
from common.config.schema import Config
from common.modeling.parameters import Layout
from common.protocol.messages import Refusal, Reply, Request, pack_message, unpack_message
from common.utils.errors import Refused
from server.rounds.run_lifecycle import open_ledger
from server.run.run_state import Run
from server.run.transport import ReceivedReply


@dataclass
class Wire:
    """`lost`: (kind of request, centre) that never answers. `seen`, `asked`: all that came and went."""

    folder: Path
    config: Config
    lost: set[tuple[type, str]] = field(default_factory=set)
    policy: Policy = field(default_factory=Policy)
    seen: list[Reply] = field(default_factory=list)
    asked: list[Request] = field(default_factory=list)

    def send_and_receive(self, requests: Mapping[str, Request], timeout: float) -> Iterator[ReceivedReply]:
        for centre, request in requests.items():
            self.asked.append(request)
            if (type(request), centre) in self.lost:
                yield ReceivedReply(centre, Refusal(centre, "no reply"))
                continue
            try:
                reply: Reply = secure_aggregation.handle_step(
                    self.folder / centre, self.config, centre, cast(Any, travelled(request)), self.policy
                )
            except Refused as refused:
                reply = Refusal(centre, str(refused))
            self.seen.append(reply)
            up, down = (
                sum(array.nbytes for array in pack_message(message)[0].values())
                for message in (reply, request)
            )
            yield ReceivedReply(centre, cast(Reply, travelled(reply)), up, down)


def travelled(message: Request | Reply) -> Request | Reply:
    """The message as it arrives."""
    arrays, facts = pack_message(message)
    return unpack_message(arrays, json.loads(json.dumps(facts)))


def run_over(wire: Wire, layout: Layout) -> Run:
    """A run that asks these centres, all of them present."""
    ledger = open_ledger(wire.folder)
    if ledger.read_status("r") is None:
        ledger.add_run("r", recipe="", mode="federated", config=config_to_dict(wire.config), code="")
    run = Run("r", wire.config, wire.folder, cast(Any, wire), ledger, layout)
    run.members = dict.fromkeys(wire.config.federation.centres, cast(Any, None))
    return run
