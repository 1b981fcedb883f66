"""A federation in one process: the coordinator's transport calls the centres' answers directly, through the same packing as the wire."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from client.answer import answer
from client.site import Site
from common.compose import compose
from common.messages import Refusal, Reply, Request, pack, unpack
from common.schema import Config
from server.transport import Received


class InProcess:
    """`sites` by the name they answer under; `hook(centre, request, reply)` may change or drop (None) a reply, as an accident would."""

    def __init__(self, sites: list[Site], hook: Callable[[str, Request, Reply], Reply | None] | None = None) -> None:
        self.sites = sites
        self.hook = hook
        self.by_name: dict[str, Site] = {}

    def greet(self, request: Request, expected: list[str], wait: float) -> Iterator[Received]:
        for site in self.sites:
            reply = self._call(site, request)
            if reply.centre:
                self.by_name[reply.centre] = site
                yield Received(reply.centre, reply)

    def ask(self, requests: Mapping[str, Request], deadline: float) -> Iterator[Received]:
        for centre, request in requests.items():
            if centre not in self.by_name:
                yield Received(centre, Refusal(centre, "not connected"))
                continue
            reply: Reply | None = self._call(self.by_name[centre], request)
            if self.hook:
                reply = self.hook(centre, request, reply)  # type: ignore[arg-type]
            up, down = (sum(a.nbytes for a in pack(message)[0].values()) if message else 0 for message in (reply, request))
            yield Received(centre, reply or Refusal(centre, f"no reply within {deadline:.0f} s"), up, down)

    def _call(self, site: Site, request: Request) -> Reply:
        reply = answer(site, unpack(*pack(request)))  # type: ignore[arg-type]
        return unpack(*pack(reply))  # type: ignore[return-value]


def phantom_config(root: Path, *overrides: str) -> Config:
    """A tiny phantom federation: four centres of about a dozen scans."""
    tiny = [
        "federation.phantom.scale=0.03",
        "federation.phantom.slices=12",
        "federation.phantom.pixels=64",
        "preprocess.size=32",
        "stage.rounds=2",
    ]
    return compose([*tiny, f"federation.root={root}", *overrides])


def sites(count: int = 4, threads: int = 1) -> list[Site]:
    """The nodes of a simulation."""
    return [Site(index=i, threads=threads, device="cpu") for i in range(count)]
