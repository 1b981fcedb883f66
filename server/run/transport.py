"""How the coordinator reaches the centres: a protocol, so that rounds run and are tested without Flower."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

from common.protocol.messages import Reply, Request


@dataclass
class ReceivedReply:
    """A centre's reply and the bytes of arrays that were exchanged; no reply in time is a Refusal."""

    centre: str
    reply: Reply
    bytes_up: int = 0
    bytes_down: int = 0


class Transport(Protocol):
    """Sends requests to centres by name and yields each reply as it arrives.

    It also yields None now and then while it waits, so that the caller can act in the meantime.
    """

    def discover(
        self, request: Request, expected: list[str], timeout: float
    ) -> Iterator[ReceivedReply | None]:
        """Ask every node who it is, until all `expected` centres have replied or `timeout` seconds pass."""
        ...

    def send_and_receive(
        self, requests: Mapping[str, Request], timeout: float
    ) -> Iterator[ReceivedReply | None]:
        """Yield exactly one `ReceivedReply` for each request, at the latest after `timeout` seconds."""
        ...
