"""Centres that take part in secure sums with given numbers in place of trained ones."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from client.federation import secure_aggregation
from client.site.policy import Policy
from common.config.parse import config_to_dict
from common.config.schema import Config
from common.modeling.parameters import Layout
from common.protocol.message_packing import pack_message, unpack_message
from common.protocol.messages import Refusal, Reply, Request
from common.utils.errors import RefusalCode, Refused
from server.rounds.run_lifecycle import open_ledger
from server.run.run_state import ModelState, Run
from server.run.transport import ReceivedReply
from tests.in_process_federation import count_bytes


@dataclass
class Wire:
    """A transport to the centres' half of secure sums.

    `lost` holds the (type of request, centre) that are never answered; `seen` and `asked` are all replies and
    requests.
    """

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
                yield ReceivedReply(centre, Refusal(centre, "no reply", code=RefusalCode.OFFLINE))
                continue
            try:
                reply: Reply = secure_aggregation.handle_step(
                    self.folder / centre, self.config, centre, cast(Any, send_over_wire(request)), self.policy
                )
            except Refused as refused:
                reply = Refusal(centre, str(refused), code=refused.code)
            self.seen.append(reply)
            received = cast(Reply, send_over_wire(reply))
            yield ReceivedReply(centre, received, count_bytes(reply), count_bytes(request))


def send_over_wire(message: Request | Reply) -> Request | Reply:
    """The message as it arrives: its arrays, and its other fields by way of JSON."""
    arrays, metadata = pack_message(message)
    return unpack_message(arrays, json.loads(json.dumps(metadata)))


def run_over(wire: Wire, layout: Layout) -> Run:
    """A run that asks these centres, all of them members."""
    ledger = open_ledger(wire.folder)
    if ledger.read_status("r") is None:
        ledger.add_run(
            "r", recipe="", mode="federated", config=config_to_dict(wire.config), code_fingerprint=""
        )
    run = Run("r", wire.config, wire.folder, cast(Any, wire), ledger, ModelState(layout))
    run.membership.members = dict.fromkeys(wire.config.federation.centres, cast(Any, None))
    return run
