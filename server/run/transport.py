"""How the coordinator reaches the centres: one protocol, so that rounds run, and are tested, without Flower."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from common.protocol.messages import Reply, Request


@dataclass
class ReceivedReply:
    """A centre's reply; no reply in time is a Refusal that says so. Bytes are those of the arrays."""

    centre: str
    reply: Reply
    bytes_up: int = 0
    bytes_down: int = 0


class Transport(Protocol):
    """Sends requests to centres by name and yields each reply as it arrives; None now and then while there is none, so that the asker can act."""

    def discover(
        self, request: Request, expected: list[str], timeout: float
    ) -> Iterator[ReceivedReply | None]:
        """Ask every node who it is, until `expected` centres are there or `wait` seconds have passed."""
        ...

    def send_and_receive(
        self, requests: Mapping[str, Request], timeout: float
    ) -> Iterator[ReceivedReply | None]:
        """Yield exactly one Received for each request, at the latest after `deadline` seconds."""
        ...
