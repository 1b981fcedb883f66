"""A federation in one process: the transport calls the centres' code directly, through the wire's packing."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from client.federation.handlers import handle_request
from client.phantom.federation import write_federation
from client.site.config import Site
from common.config.compose import compose_config
from common.config.parse import parse_config
from common.config.schema import Config
from common.protocol.message_packing import pack_message, unpack_message
from common.protocol.messages import Refusal, Reply, Request
from common.utils.errors import RefusalCode
from server.run.transport import ReceivedReply


class InProcess:
    """A transport to `sites`, by the name under which each answers.

    `hook(centre, request, reply)` may change a reply, or drop it by returning None, as a fault would.
    """

    def __init__(
        self, sites: list[Site], hook: Callable[[str, Request, Reply], Reply | None] | None = None
    ) -> None:
        self.sites = sites
        self.hook = hook
        self.by_name: dict[str, Site] = {}

    def discover(self, request: Request, expected: list[str], timeout: float) -> Iterator[ReceivedReply]:
        self._write_phantoms(request)
        for site in self.sites:
            reply = self._call(site, request)
            if reply.centre:
                self.by_name[reply.centre] = site
                yield ReceivedReply(reply.centre, reply)

    def send_and_receive(self, requests: Mapping[str, Request], timeout: float) -> Iterator[ReceivedReply]:
        for centre, request in requests.items():
            if centre not in self.by_name:
                yield ReceivedReply(centre, Refusal(centre, "not connected", code=RefusalCode.OFFLINE))
                continue
            reply: Reply | None = self._call(self.by_name[centre], request)
            if self.hook:
                reply = self.hook(centre, request, reply)  # type: ignore[arg-type]
            bytes_up = count_bytes(reply) if reply else 0
            if reply is None:
                reply = Refusal(centre, f"no reply within {timeout:.0f} s", code=RefusalCode.OFFLINE)
            yield ReceivedReply(centre, reply, bytes_up, count_bytes(request))

    def _write_phantoms(self, request: Request) -> None:
        """Write the phantom federation's scans, as `consilium-centre phantom` does before a simulation."""
        federation = parse_config(request.config).federation
        if federation.phantom and any(not site.centre for site in self.sites):
            write_federation(Path(federation.data_root), federation.phantom, federation.centres)

    def _call(self, site: Site, request: Request) -> Reply:
        reply = handle_request(site, unpack_message(*pack_message(request)))  # type: ignore[arg-type]
        return unpack_message(*pack_message(reply))  # type: ignore[return-value]


def count_bytes(message: Request | Reply) -> int:
    """The bytes of a message's arrays."""
    return sum(array.nbytes for array in pack_message(message)[0].values())


def phantom_config(root: Path, *overrides: str) -> Config:
    """The configuration of a tiny phantom federation: four centres of about a dozen scans."""
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
