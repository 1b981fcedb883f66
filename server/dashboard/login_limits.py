"""How often a password may be tried: by account and address, by address, and from new addresses together.

The console is one process, as the key of its sessions is, so that the counts are kept in its memory.
"""

from __future__ import annotations

import ipaddress
import threading

import sqlalchemy as sa
from limits import RateLimitItem, parse
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter

from server.dashboard.proxy_trust import Forbidden
from server.ledger import tables
from server.ledger.ledger import Ledger

LIMIT_PER_ACCOUNT = parse("5/minute")  # from one address
LIMIT_PER_ADDRESS = parse("20/minute")  # for all accounts
# For all accounts, from all addresses where their owners never logged in; no others are locked out by it.
LIMIT_OF_STRANGERS = parse("60/minute")
MAX_NAME_LENGTH = 64  # characters that are counted
IPV6_PREFIX = 64  # bits: whoever has one address of such a network has all of them
LOGIN = "login"  # the action in the audit trail


class LoginLimits:
    """Counts attempts before the password is checked, so that a parallel burst gains nothing."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self._attempts = MovingWindowRateLimiter(MemoryStorage())
        self._lock = threading.Lock()

    def count_attempt(self, name: str, address: str) -> None:
        """Count an attempt. Raises Forbidden, without counting it, where there were too many."""
        limits: list[tuple[RateLimitItem, tuple[str, ...]]] = [
            (LIMIT_PER_ACCOUNT, _account_key(name, address)),
            (LIMIT_PER_ADDRESS, (group_address(address),)),
        ]
        if not self.is_known(name, address):
            limits.append((LIMIT_OF_STRANGERS, ("strangers",)))
        with self._lock:
            for limit, identifiers in limits:
                if not self._attempts.test(limit, *identifiers):
                    raise Forbidden("too many attempts; wait a minute")
            for limit, identifiers in limits:
                self._attempts.hit(limit, *identifiers)

    def clear_account(self, name: str, address: str) -> None:
        """Forget the attempts for an account from an address: the password was right."""
        with self._lock:
            self._attempts.clear(LIMIT_PER_ACCOUNT, *_account_key(name, address))

    def is_known(self, name: str, address: str) -> bool:
        """Return whether the account's owner has logged in from the address before."""
        audit = tables.audit.c
        is_login = sa.and_(
            audit.actor == name, audit.action == LOGIN, audit.reason == describe_origin(address)
        )
        return bool(self.ledger.read(sa.select(audit.id).where(is_login).limit(1)))


def _account_key(name: str, address: str) -> tuple[str, str]:
    return name[:MAX_NAME_LENGTH], group_address(address)


def describe_origin(address: str) -> str:
    """Return how the audit trail says from where somebody logged in."""
    return f"from {address}"


def group_address(address: str) -> str:
    """Return what an address is counted as."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(parsed, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((parsed, IPV6_PREFIX), strict=False))
    return str(parsed)
