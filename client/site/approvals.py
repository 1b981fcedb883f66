"""Keep the hospital's approvals: which recipes, by the digest of their content, it takes part in until when.

`approvals.json` in the state folder has a line for every approval. The last one of a digest counts. A lost
file approves nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict, TypeAdapter

from common.config.recipe_digest import list_recipe_digests
from common.config.schema import Config
from common.utils.atomic_files import atomic_write
from common.utils.errors import ConsiliumError, RefusalCode, Refused

APPROVALS_FILENAME = "approvals.json"
MIN_PREFIX_LENGTH = 8  # of a digest that is named by its first digits
REMEDY = "its staff can see what it would do, and approve it, with `consilium-centre approve`"


@dataclass(frozen=True)
class Approval:
    """A recipe that the hospital has approved. Its field names are the keys in the file."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    digest: str  # of the recipe's content (common/config/recipe_digest.py)
    recipe: str  # its name when it was approved, for people
    approved: date
    expires: date  # the last day on which it holds
    withdrawn: date | None = None

    def describe_state(self, today: date) -> str:
        """Return whether the approval holds, in words."""
        if self.withdrawn:
            return f"withdrawn on {self.withdrawn}"
        if today > self.expires:
            return f"expired on {self.expires}"
        return f"holds until {self.expires}"

    def is_valid(self, today: date) -> bool:
        """Return whether the approval holds."""
        return self.withdrawn is None and today <= self.expires


_APPROVALS_ADAPTER = TypeAdapter(list[Approval])


def read_approvals(folder: Path) -> dict[str, Approval]:
    """Return {digest: its last approval} of a state folder. Raises ConsiliumError for a damaged file."""
    return {approval.digest: approval for approval in _read_file(folder)}


def add_approval(folder: Path, approval: Approval) -> None:
    """Add an approval. Raises ConsiliumError for a damaged file, OSError where it cannot be written."""
    _write_file(folder, [*_read_file(folder), approval])


def withdraw_approval(folder: Path, prefix: str, today: date) -> Approval:
    """Withdraw the approval of a digest, named in full or by its first digits.

    Raises:
        ConsiliumError: There is none, or several begin so, or the file is damaged.
    """
    approvals = read_approvals(folder)
    matches = [digest for digest in approvals if digest.startswith(prefix)]
    if len(prefix) < MIN_PREFIX_LENGTH or len(matches) != 1:
        raise ConsiliumError(
            f"{len(matches)} approvals begin with '{prefix}'; give the digest, or its first "
            f"{MIN_PREFIX_LENGTH} digits or more, as `consilium-centre approve --list` shows it"
        )
    withdrawn = replace(approvals[matches[0]], withdrawn=today)
    _write_file(folder, [*_read_file(folder), withdrawn])
    return withdrawn


def require_approval(folder: Path, config: Config, today: date) -> None:
    """Raise Refused for a run whose recipe the hospital has not approved, or not any more."""
    digests = list_recipe_digests(config)
    try:
        approvals = read_approvals(folder)
    except ConsiliumError as error:
        raise Refused(
            "this hospital's approvals cannot be read, so no recipe is approved; restore them there",
            RefusalCode.POLICY,
        ) from error
    known = [approvals[digest] for digest in digests if digest in approvals]
    if not any(approval.is_valid(today) for approval in known):
        raise Refused(_explain(digests, known, today), RefusalCode.POLICY)


def _explain(digests: Sequence[str], known: Sequence[Approval], today: date) -> str:
    if known:
        approval = known[0]
        return (
            f"this hospital's approval of the recipe with digest {approval.digest} "
            f"{approval.describe_state(today).replace('withdrawn', 'was withdrawn')}; {REMEDY}"
        )
    return f"this hospital has not approved the recipe with digest {digests[0]}; {REMEDY}"


def _read_file(folder: Path) -> list[Approval]:
    path = folder / APPROVALS_FILENAME
    try:
        return _APPROVALS_ADAPTER.validate_json(path.read_bytes())
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise ConsiliumError(
            f"{path} cannot be read ({type(error).__name__}), so no recipe is approved; restore it from a "
            "backup, or remove it and approve anew"
        ) from error


def _write_file(folder: Path, approvals: Sequence[Approval]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(asdict(approval), default=str) for approval in approvals]
    atomic_write(folder / APPROVALS_FILENAME, ("[\n" + ",\n".join(lines) + "\n]\n").encode())
