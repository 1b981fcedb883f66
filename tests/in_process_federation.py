"""A federation in one process: the coordinator's transport calls the centres' answers directly, through the same packing as the wire."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from client.federation.handlers import handle_request
from client.site.config import Site
from common.config.compose import compose_config
from common.config.schema import Config
from common.protocol.messages import Refusal, Reply, Request, pack_message, unpack_message
from server.run.transport import ReceivedReply


class InProcess:
    """`sites` by the name they answer under; `hook(centre, request, reply)` may change or drop (None) a reply, as an accident would."""

    def __init__(
        self, sites: list[Site], hook: Callable[[str, Request, Reply], Reply | None] | None = None
    ) -> None:
        self.sites = sites
        self.hook = hook
        self.by_name: dict[str, Site] = {}

    def discover(self, request: Request, expected: list[str], timeout: float) -> Iterator[ReceivedReply]:
        for site in self.sites:
            reply = self._call(site, request)
            if reply.centre:
                self.by_name[reply.centre] = site
                yield ReceivedReply(reply.centre, reply)

    def send_and_receive(self, requests: Mapping[str, Request], timeout: float) -> Iterator[ReceivedReply]:
        for centre, request in requests.items():
            if centre not in self.by_name:
                yield ReceivedReply(centre, Refusal(centre, "not connected"))
                continue
            reply: Reply | None = self._call(self.by_name[centre], request)
            if self.hook:
                reply = self.hook(centre, request, reply)  # type: ignore[arg-type]
            up, down = (
                sum(a.nbytes for a in pack_message(message)[0].values()) if message else 0
                for message in (reply, request)
            )
            yield ReceivedReply(
                centre, reply or Refusal(centre, f"no reply within {timeout:.0f} s"), up, down
            )

    def _call(self, site: Site, request: Request) -> Reply:
        reply = handle_request(site, unpack_message(*pack_message(request)))  # type: ignore[arg-type]
        return unpack_message(*pack_message(reply))  # type: ignore[return-value]


def phantom_config(root: Path, *overrides: str) -> Config:
    """A tiny phantom federation: four centres of about a dozen scans."""
    tiny = [
        "federation.phantom.scale=0.03",
        "federation.phantom.num_slices=12",
        "federation.phantom.image_size=64",
        "preprocess.image_size=32",
        "stage.rounds=2",
    ]
    return compose_config([*tiny, f"federation.data_root={root}", *overrides])


def sites(count: int = 4, threads: int = 1) -> list[Site]:
    """The nodes of a simulation."""
    return [Site(index=i, threads=threads, device="cpu") for i in range(count)]
