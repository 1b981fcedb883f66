"""How much of its patients' privacy a centre has spent, on its own disk: `budget/` in its state folder, for all runs, never reset.

`spent.json` holds a line for every round that left (noise multiplier, odds, steps: what Opacus's accountants count by) and whose patients took part.
To a cohort is charged every round in which any of its patients had a part, so that adding a scan, or leaving some out, begins no new budget.
A round is charged before it leaves, and once more when it is trained once more; only the last one (`last.safetensors`) is sent again for nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.numpy import load_file, save

from client.egress import digest_of
from common.accountant import Charge, epsilon
from common.errors import Declined, Refused
from common.files import write_whole
from common.messages import Contribution, Query, Train, facts_json, pack, unpack


@dataclass(frozen=True)
class Account:
    """Where a cohort's charges are kept, who is in it (`marks`: a digest of each patient), and the hospital's limit (0: none) at its delta."""

    folder: Path
    marks: frozenset[str]
    limit: float = 0.0
    delta: float = 1e-5

    @property
    def cohort(self) -> str:
        """The fingerprint of its patients."""
        return hashlib.sha256("".join(sorted(self.marks)).encode()).hexdigest()[:16]


def marks_of(patients: Iterable[str]) -> frozenset[str]:
    """A digest of each patient: the budget need not spell out what the cohort's table does."""
    return frozenset(hashlib.sha256(patient.encode()).hexdigest()[:16] for patient in patients)


def charges(account: Account) -> tuple[Charge, ...]:
    """All that was charged to any patient of the cohort."""
    return _charges(account, _read(account.folder))


def afford(account: Account, price: Charge) -> None:
    """Raises Declined when the hospital's limit does not allow the price on top of what is spent."""
    _afford(account, charges(account), price)


def charge(account: Account, price: Charge, request: Train | Query) -> tuple[Charge, ...]:
    """Write the price down before what it paid for leaves; returns all that is charged now. Raises Declined; Refused where it cannot be written."""
    with _alone(account.folder):
        book = _read(account.folder)
        before = _charges(account, book)
        _afford(account, before, price)  # another run may have spent meanwhile
        book["cohorts"][account.cohort] = sorted(account.marks)
        noise, odds, steps = price
        line = {"cohort": account.cohort, "run": request.run, "stage": request.stage, "round": getattr(request, "round", 0)}
        line |= {"noise": noise, "odds": odds, "steps": steps, "time": datetime.now(UTC).isoformat(timespec="seconds")}
        book["charges"].append(line)
        _write(account.folder / "spent.json", json.dumps(book, indent=1).encode())
    return (*before, price)


def keep(account: Account, request: Train, contribution: Contribution) -> None:
    """Keep what was charged, in place of the last, for the coordinator that asks again."""
    arrays, facts = pack(contribution)
    _write(account.folder / "last.safetensors", save(arrays, {"request": digest_of(request), "facts": facts_json(facts)}))


def kept(account: Account, request: Train) -> Contribution | None:
    """The same answer to the very same request, at no further price."""
    path = account.folder / "last.safetensors"
    try:
        with safe_open(path, framework="np") as file:
            said = file.metadata()
        if said["request"] != digest_of(request):
            return None
        found = unpack(load_file(path), json.loads(said["facts"]))
    except Exception:  # none, or a damaged one, fails in many ways: the round is trained and charged again
        return None
    return found if isinstance(found, Contribution) else None


def _afford(account: Account, before: Sequence[Charge], price: Charge) -> None:
    if account.limit and (after := epsilon((*before, price), account.delta)) > account.limit:
        raise Declined(
            f"this hospital's policy allows its patients a privacy loss (epsilon) of {account.limit:g}: "
            f"{epsilon(tuple(before), account.delta):.2f} is spent, and this round would make it {after:.2f}"
        )


def _charges(account: Account, book: dict[str, Any]) -> tuple[Charge, ...]:
    shared = {cohort for cohort, marks in book["cohorts"].items() if not account.marks.isdisjoint(marks)}
    return tuple((float(c["noise"]), float(c["odds"]), int(c["steps"])) for c in book["charges"] if c["cohort"] in shared)


def _read(folder: Path) -> dict[str, Any]:
    """The book; an empty one where nothing was ever charged. Raises Refused when it cannot be read: a lost book is no full purse."""
    try:
        book = json.loads((folder / "spent.json").read_text())
        return {"cohorts": dict(book["cohorts"]), "charges": list(book["charges"])}
    except FileNotFoundError:
        return {"cohorts": {}, "charges": []}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refused(
            f"its privacy budget cannot be read ({type(error).__name__}), so that nothing may be spent; restore it there"
        ) from error


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Nobody else of this machine writes meanwhile."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise Refused(f"its privacy budget cannot be written ({type(error).__name__}), and what is not charged does not leave") from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write(path: Path, data: bytes) -> None:
    """All of it under this name, or nothing, even when the power fails. Raises Refused."""
    try:
        write_whole(path, data)
    except OSError as error:
        raise Refused(f"its privacy budget cannot be written ({type(error).__name__}), and what is not charged does not leave") from error
