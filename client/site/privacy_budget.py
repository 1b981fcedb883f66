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

from client.site.egress_log import hash_message
from common.privacy.accountant import Charge, compute_epsilon
from common.protocol.messages import (
    StatisticsRequest,
    TrainReply,
    TrainRequest,
    metadata_to_json,
    pack_message,
    unpack_message,
)
from common.utils.atomic_files import atomic_write
from common.utils.errors import PermanentlyRefused, Refused


@dataclass(frozen=True)
class PrivacyAccount:
    """Where a cohort's charges are kept, who is in it (`marks`: a digest of each patient), and the hospital's limit (0: none) at its delta."""

    folder: Path
    patient_hashes: frozenset[str]
    max_epsilon: float = 0.0
    delta: float = 1e-5

    @property
    def cohort_id(self) -> str:
        """The fingerprint of its patients."""
        return hashlib.sha256("".join(sorted(self.patient_hashes)).encode()).hexdigest()[:16]


def hash_patients(patient_ids: Iterable[str]) -> frozenset[str]:
    """A digest of each patient: the budget need not spell out what the cohort's table does."""
    return frozenset(hashlib.sha256(patient.encode()).hexdigest()[:16] for patient in patient_ids)


def read_charges(account: PrivacyAccount) -> tuple[Charge, ...]:
    """All that was charged to any patient of the cohort."""
    return _select_charges(account, _read_spent(account.folder))


def check_affordable(account: PrivacyAccount, new_charge: Charge) -> None:
    """Raises Declined when the hospital's limit does not allow the price on top of what is spent."""
    _check_limit(account, read_charges(account), new_charge)


def record_charge(
    account: PrivacyAccount, new_charge: Charge, request: TrainRequest | StatisticsRequest
) -> tuple[Charge, ...]:
    """Write the price down before what it paid for leaves; returns all that is charged now. Raises Declined; Refused where it cannot be written."""
    with _exclusive_lock(account.folder):
        book = _read_spent(account.folder)
        before = _select_charges(account, book)
        _check_limit(account, before, new_charge)  # another run may have spent meanwhile
        book["cohorts"][account.cohort_id] = sorted(account.patient_hashes)
        noise, odds, steps = new_charge
        line = {
            "cohort": account.cohort_id,
            "run": request.run_id,
            "stage": request.stage,
            "round": getattr(request, "round", 0),
        }
        line |= {
            "noise": noise,
            "odds": odds,
            "steps": steps,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        book["charges"].append(line)
        _write_file(account.folder / "spent.json", json.dumps(book, indent=1).encode())
    return (*before, new_charge)


def cache_reply(account: PrivacyAccount, request: TrainRequest, reply: TrainReply) -> None:
    """Keep what was charged, in place of the last, for the coordinator that asks again."""
    arrays, facts = pack_message(reply)
    _write_file(
        account.folder / "last.safetensors",
        save(arrays, {"request": hash_message(request), "facts": metadata_to_json(facts)}),
    )


def cached_reply(account: PrivacyAccount, request: TrainRequest) -> TrainReply | None:
    """The same answer to the very same request, at no further price."""
    path = account.folder / "last.safetensors"
    try:
        with safe_open(path, framework="np") as file:
            said = file.metadata()
        if said["request"] != hash_message(request):
            return None
        found = unpack_message(load_file(path), json.loads(said["facts"]))
    except Exception:  # none, or a damaged one, fails in many ways: the round is trained and charged again
        return None
    return found if isinstance(found, TrainReply) else None


def _check_limit(account: PrivacyAccount, spent: Sequence[Charge], new_charge: Charge) -> None:
    if (
        account.max_epsilon
        and (after := compute_epsilon((*spent, new_charge), account.delta)) > account.max_epsilon
    ):
        raise PermanentlyRefused(
            f"this hospital's policy allows its patients a privacy loss (epsilon) of {account.max_epsilon:g}: "
            f"{compute_epsilon(tuple(spent), account.delta):.2f} is spent, and this round would make it {after:.2f}"
        )


def _select_charges(account: PrivacyAccount, spent: dict[str, Any]) -> tuple[Charge, ...]:
    shared = {
        cohort for cohort, marks in spent["cohorts"].items() if not account.patient_hashes.isdisjoint(marks)
    }
    return tuple(
        (float(c["noise"]), float(c["odds"]), int(c["steps"]))
        for c in spent["charges"]
        if c["cohort"] in shared
    )


def _read_spent(folder: Path) -> dict[str, Any]:
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
def _exclusive_lock(folder: Path) -> Iterator[None]:
    """Nobody else of this machine writes meanwhile."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise Refused(
            f"its privacy budget cannot be written ({type(error).__name__}), and what is not charged does not leave"
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _write_file(path: Path, data: bytes) -> None:
    """All of it under this name, or nothing, even when the power fails. Raises Refused."""
    try:
        atomic_write(path, data)
    except OSError as error:
        raise Refused(
            f"its privacy budget cannot be written ({type(error).__name__}), and what is not charged does not leave"
        ) from error
