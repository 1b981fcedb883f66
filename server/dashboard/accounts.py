"""Accounts of the console: a name, a role, and an Argon2id hash of a password.

There is no account by default, and every password that is set for somebody else is random.
"""

from __future__ import annotations

import re
import secrets
from typing import Literal, get_args

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from common.utils.errors import ConsiliumError, suggest
from server.ledger.ledger import Ledger
from server.ledger.reader import Row

Role = Literal["viewer", "operator"]
DISABLED_ROLE = "none"
MIN_PASSWORD_LENGTH = 12  # characters of a password that a person chose
MAX_PASSWORD_LENGTH = 256  # characters that are hashed
NAME_PATTERN = re.compile(r"[A-Za-z0-9._@-]{1,64}")
_hasher = PasswordHasher()
# Verified where there is no account, so that the answer takes as long; no password matches it.
_dummy_hash = _hasher.hash(secrets.token_urlsafe())


def find_account(ledger: Ledger, name: str) -> Row | None:
    """Return an enabled account, or None."""
    for row in _list_enabled(ledger):
        if row["name"] == name:
            return row
    return None


def create_account(ledger: Ledger, name: str, role: str, actor: str, uses_proxy: bool = False) -> str:
    """Create an account, or give one a new role and password.

    Returns the password, which is stored nowhere; nothing for an account that a reverse proxy authenticates.

    Raises:
        ConsiliumError: the name or role is invalid, or the last operator would become a viewer.
    """
    if role not in get_args(Role):
        raise ConsiliumError(f"role '{role}' is unknown{suggest(role, get_args(Role))}")
    if not NAME_PATTERN.fullmatch(name):
        raise ConsiliumError(f"'{name}' cannot be an account's name; use 1 to 64 letters, digits and . _ @ -")
    password = ""
    password_hash = None
    if not uses_proxy:
        password = secrets.token_urlsafe(15)
        password_hash = _hasher.hash(password)
    ledger.add_account(name, role, password_hash)
    ledger.log_audit(actor, "account", f"{name}: {role}{', by proxy' if uses_proxy else ''}")
    return password


def disable_account(ledger: Ledger, name: str, actor: str) -> None:
    """Disable an account.

    Raises:
        ConsiliumError: there is no such account, or it is the last operator's.
    """
    names = [row["name"] for row in _list_enabled(ledger)]
    if name not in names:
        raise ConsiliumError(f"there is no account '{name}'{suggest(name, names)}")
    ledger.add_account(name, DISABLED_ROLE, None)
    ledger.log_audit(actor, "account", f"{name}: closed")


def change_password(ledger: Ledger, name: str, old_password: str, new_password: str) -> None:
    """Set a password that the account's owner chose.

    Raises:
        ConsiliumError: the present password is wrong, or the new one too short.
    """
    account = authenticate(ledger, name, old_password)
    if account is None:
        raise ConsiliumError("the present password is wrong")
    if len(new_password) < MIN_PASSWORD_LENGTH:
        raise ConsiliumError(
            f"the new password has {len(new_password)} characters; use at least {MIN_PASSWORD_LENGTH}"
        )
    ledger.add_account(name, account["role"], _hasher.hash(new_password), previous_id=account["id"])
    ledger.log_audit(name, "account", f"{name}: new password")


def authenticate(ledger: Ledger, name: str, password: str) -> Row | None:
    """Return the account if the password is right, otherwise None."""
    account = find_account(ledger, name)
    password_hash = _dummy_hash
    if account and account["password_hash"]:
        password_hash = account["password_hash"]
    try:
        _hasher.verify(password_hash, password[:MAX_PASSWORD_LENGTH])
    except (VerificationError, InvalidHashError):
        return None
    return account


def _list_enabled(ledger: Ledger) -> list[Row]:
    return [row for row in ledger.read_accounts() if row["role"] != DISABLED_ROLE]
