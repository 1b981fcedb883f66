"""Which addresses are trusted for what, and from where a request comes behind a reverse proxy."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from fastapi import Request

from common.utils.errors import ConsiliumError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Networks = tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...]
FORWARDED_FOR = "x-forwarded-for"


class Forbidden(ConsiliumError):
    """The person may not do this."""


@dataclass
class ProxyTrust:
    """Which addresses are trusted for what.

    A reverse proxy says for whom it asks in X-Forwarded-For; one that has authenticated people names them in
    `user_header`. Prometheus may read /metrics without a log-in.
    """

    user_header: str = ""
    proxy_networks: Networks = ()
    scraper_networks: Networks = ()

    @classmethod
    def from_options(cls, header: str, proxies: list[str], scrapers: list[str]) -> ProxyTrust:
        """Build from command options.

        Raises ConsiliumError for an invalid address or a header without a proxy.
        """
        if header and not proxies:
            raise ConsiliumError(
                "--trust-header needs --proxy ADDRESS, because anybody else could send that header"
            )
        try:
            proxy_networks = tuple(ipaddress.ip_network(address) for address in proxies)
            scraper_networks = tuple(ipaddress.ip_network(address) for address in scrapers)
        except ValueError as error:
            raise ConsiliumError(
                f"{error}; write an address or a network, e.g. 10.0.0.5 or 10.0.0.0/24"
            ) from None
        return cls(header, proxy_networks, scraper_networks)

    def read_user_name(self, request: Request) -> str:
        """Return the person whom a trusted proxy names, or nothing.

        Raises Forbidden where the header stands there twice: one of the two may be the client's.
        """
        if not self.user_header or not _is_in_networks(_read_peer(request), self.proxy_networks):
            return ""
        names = request.headers.getlist(self.user_header)
        if len(names) > 1:
            raise Forbidden(
                f"the request has {len(names)} headers {self.user_header}; "
                "the proxy must remove the client's before it adds its own"
            )
        return names[0] if names else ""

    def read_client_address(self, request: Request) -> str:
        """Return from where a request comes: behind a trusted proxy what that says, otherwise the peer.

        Each proxy adds an address at the right, so the last one that is no proxy's is the client's. What
        stands further left is the client's own claim.
        """
        peer = _read_peer(request)
        client = peer
        for text in reversed(",".join(request.headers.getlist(FORWARDED_FOR)).split(",")):
            forwarded = _parse_address(text.strip())
            if forwarded is None or not _is_in_networks(client, self.proxy_networks):
                break
            client = forwarded
        if client is None:  # a test client's
            return request.client.host if request.client else ""
        return str(client)

    def is_scraper(self, request: Request) -> bool:
        """Return whether Prometheus asks from an address of its own; through a proxy it could be anybody."""
        peer = _read_peer(request)
        is_forwarded = FORWARDED_FOR in request.headers or _is_in_networks(peer, self.proxy_networks)
        return _is_in_networks(peer, self.scraper_networks) and not is_forwarded


def _read_peer(request: Request) -> Address | None:
    return _parse_address(request.client.host if request.client else "")


def _parse_address(text: str) -> Address | None:
    """Return a text's address, as IPv4 where it is one in the form of IPv6; None where it has none."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped:
        return address.ipv4_mapped
    return address


def _is_in_networks(address: Address | None, networks: Networks) -> bool:
    return address is not None and any(address in network for network in networks)
