"""Who may use the console: a name, a role, and Argon2id's hash of a password. No account is there by default, and no password is chosen for anybody
but at random."""

from __future__ import annotations

import re
import secrets
from typing import Literal, get_args

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from common.utils.errors import ConsiliumError, suggest
from server.ledger.ledger import Ledger, Row

Role = Literal["viewer", "operator"]
DISABLED_ROLE = "none"
MIN_PASSWORD_LENGTH = 12  # characters of a password that a person chose
_hasher = PasswordHasher()
_dummy_hash = _hasher.hash(
    secrets.token_urlsafe()
)  # compared with where there is no account: as slow, and never right


def find_account(ledger: Ledger, name: str) -> Row | None:
    """An open account."""
    return next(
        (row for row in ledger.read_accounts() if row["name"] == name and row["role"] != DISABLED_ROLE), None
    )


def create_account(ledger: Ledger, name: str, role: str, actor: str, uses_proxy: bool = False) -> str:
    """A new account, or one with a new role and password. Returns the password, which is kept nowhere; of a `proxied` account, whose person a
    reverse proxy has asked already, none. Raises ConsiliumError."""
    if role not in get_args(Role):
        raise ConsiliumError(f"role '{role}' is unknown{suggest(role, get_args(Role))}")
    if not re.fullmatch(r"[A-Za-z0-9._@-]{1,64}", name):
        raise ConsiliumError(f"'{name}' is no account's name: 1 to 64 letters, digits and . _ @ -")
    password = "" if uses_proxy else secrets.token_urlsafe(15)
    ledger.add_account(name, role, _hasher.hash(password) if password else None)
    ledger.log_audit(actor, "account", f"{name}: {role}{', by proxy' if uses_proxy else ''}")
    return password


def disable_account(ledger: Ledger, name: str, actor: str) -> None:
    """No way in by this name from now on. Raises ConsiliumError for an unknown one and for the last operator."""
    known = [row for row in ledger.read_accounts() if row["role"] != DISABLED_ROLE]
    if name not in [row["name"] for row in known]:
        raise ConsiliumError(f"there is no account '{name}'{suggest(name, [row['name'] for row in known])}")
    if [row["name"] for row in known if row["role"] == "operator"] == [name]:
        raise ConsiliumError(f"'{name}' is the last operator; give somebody else that role first")
    ledger.add_account(name, DISABLED_ROLE, None)
    ledger.log_audit(actor, "account", f"{name}: closed")


def change_password(ledger: Ledger, name: str, old_password: str, new_password: str) -> None:
    """A person's own choice of password. Raises ConsiliumError."""
    account = authenticate(ledger, name, old_password)
    if account is None:
        raise ConsiliumError("the present password is another one")
    if len(new_password) < MIN_PASSWORD_LENGTH:
        raise ConsiliumError(
            f"the new password has {len(new_password)} characters; {MIN_PASSWORD_LENGTH} are the fewest"
        )
    ledger.add_account(name, account["role"], _hasher.hash(new_password))
    ledger.log_audit(name, "account", f"{name}: new password")


def authenticate(ledger: Ledger, name: str, password: str) -> Row | None:
    """The account, where the password is its own."""
    account = find_account(ledger, name)
    try:
        _hasher.verify((account and account["password"]) or _dummy_hash, password[:256])
    except (VerificationError, InvalidHashError):
        return None
    return account
