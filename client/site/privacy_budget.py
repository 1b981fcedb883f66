"""Keep the privacy budget: what the hospital's patients have lost of their privacy in all runs.

`budget/spent.json` in the state folder holds a line for every charge (noise multiplier, sampling rate and
steps, which is what Opacus's accountants count by) and the patients of each cohort that was charged. A cohort
is charged for every round that any of its patients took part in, so that adding or leaving out a scan does
not open a new budget. The egress log vouches for the file (client/site/anchored_files.py): one that is
missing, rolled back or edited is refused.

A round is charged before its reply leaves, and again when it is trained again. Only the last reply
(`last.safetensors`) may be sent again without a charge.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict, TypeAdapter
from safetensors import safe_open
from safetensors.numpy import load_file, save

from client.site.anchored_files import AnchoredFile, lock_folder, read_anchored_file, write_anchored_file
from client.site.egress_log import hash_message
from common.privacy.accountant import Charge, compute_epsilon
from common.protocol.message_packing import metadata_to_json, pack_message, unpack_message
from common.protocol.messages import StatisticsRequest, TrainReply, TrainRequest
from common.utils.atomic_files import atomic_write
from common.utils.errors import PermanentlyRefused, RefusalCode, Refused

BUDGET_FILENAME = "spent.json"
REPLY_FILENAME = "last.safetensors"


@dataclass(frozen=True)
class PrivacyAccount:
    """A cohort's account: where charges are kept, who is in the cohort, and the hospital's limit."""

    folder: Path
    patient_hashes: frozenset[str]  # as by `hash_patients`
    max_epsilon: float = 0.0  # 0: no limit
    delta: float = 1e-5  # at which the limit holds
    outer_anchor: Path | None = None  # as by `client.site.config.outer_anchor`

    @property
    def cohort_id(self) -> str:
        """Return a digest of the cohort's patients."""
        return hashlib.sha256("".join(sorted(self.patient_hashes)).encode()).hexdigest()[:16]


@dataclass
class SpentCharge:
    """A charge in `spent.json`. Its field names are the keys in the file, and no other key is read."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    cohort: str  # `PrivacyAccount.cohort_id`
    run: str
    stage: str
    round: int
    noise: float  # noise multiplier
    odds: float  # sampling rate: each patient's probability to take part in a step
    steps: int
    time: str  # ISO 8601, UTC


@dataclass
class SpentBudget:
    """The content of `spent.json`. Its field names are the keys in the file, and no other key is read."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    cohorts: dict[str, list[str]]  # {cohort: hashes of its patients}
    charges: list[SpentCharge]

    def select_charges(self, patient_hashes: frozenset[str]) -> tuple[Charge, ...]:
        """Return the charges of all cohorts that share a patient with those given."""
        shared = set()
        for cohort, hashes in self.cohorts.items():
            if not patient_hashes.isdisjoint(hashes):
                shared.add(cohort)
        return tuple(Charge(c.noise, c.odds, c.steps) for c in self.charges if c.cohort in shared)


_BUDGET_ADAPTER = TypeAdapter(SpentBudget)


def hash_patient(patient_id: str) -> str:
    """Return a digest of a patient's identifier, so that files of the state folder hold none."""
    return hashlib.sha256(patient_id.encode()).hexdigest()[:16]


def hash_patients(patient_ids: Iterable[str]) -> frozenset[str]:
    """Return the digest of each patient."""
    return frozenset(map(hash_patient, patient_ids))


def list_charged_patients(account: PrivacyAccount) -> frozenset[str]:
    """Return the digests of all patients of the cohorts that a round of training was charged to."""
    budget = _read_budget(account)
    charged_patients: set[str] = set()
    for charge in budget.charges:
        if charge.round:
            charged_patients.update(budget.cohorts.get(charge.cohort, []))
    return frozenset(charged_patients)


def read_charges(account: PrivacyAccount) -> tuple[Charge, ...]:
    """Return what was charged to any patient of the cohort."""
    return _read_budget(account).select_charges(account.patient_hashes)


def check_affordable(account: PrivacyAccount, new_charge: Charge) -> None:
    """Raise PermanentlyRefused when a charge on top of those made would exceed the hospital's limit."""
    _check_limit(account, read_charges(account), new_charge)


def record_charge(
    account: PrivacyAccount, new_charge: Charge, request: TrainRequest | StatisticsRequest
) -> tuple[Charge, ...]:
    """Write a charge before its reply leaves, and return all charges of the cohort.

    Raises PermanentlyRefused when it exceeds the hospital's limit, Refused when it cannot be written.
    """
    with _exclusive_lock(account.folder):
        budget = _read_budget(account)
        earlier_charges = budget.select_charges(account.patient_hashes)
        _check_limit(account, earlier_charges, new_charge)  # another run may have spent since the first check
        charge = SpentCharge(
            cohort=account.cohort_id,
            run=request.run_id,
            stage=request.stage,
            round=getattr(request, "round", 0),
            noise=new_charge.noise_multiplier,
            odds=new_charge.sampling_rate,
            steps=new_charge.steps,
            time=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        budget.cohorts[account.cohort_id] = sorted(account.patient_hashes)
        budget.charges.append(charge)
        text = json.dumps(dataclasses.asdict(budget), indent=1)
        _write_budget(account, text.encode(), len(budget.charges))
    return (*earlier_charges, new_charge)


def cache_reply(account: PrivacyAccount, request: TrainRequest, reply: TrainReply) -> None:
    """Keep a reply that was charged, in place of the last one, in case the coordinator asks again."""
    arrays, metadata = pack_message(reply)
    header = {"request": hash_message(request), "facts": metadata_to_json(metadata)}
    _write_file(account.folder / REPLY_FILENAME, save(arrays, header))


def cached_reply(account: PrivacyAccount, request: TrainRequest) -> TrainReply | None:
    """Return the reply to the very same request, if it was the last: it costs nothing more."""
    path = account.folder / REPLY_FILENAME
    try:
        with safe_open(path, framework="np") as file:
            header = file.metadata()
        if header["request"] != hash_message(request):
            return None
        reply = unpack_message(load_file(path), json.loads(header["facts"]))
    except Exception:  # a missing or damaged file fails in many ways: the round is trained and charged again
        return None
    return reply if isinstance(reply, TrainReply) else None


def _check_limit(account: PrivacyAccount, charges: Sequence[Charge], new_charge: Charge) -> None:
    if not account.max_epsilon:
        return
    epsilon_after = compute_epsilon((*charges, new_charge), account.delta)
    if epsilon_after <= account.max_epsilon:
        return
    epsilon_before = compute_epsilon(tuple(charges), account.delta)
    raise PermanentlyRefused(
        f"this hospital's policy allows its patients a privacy loss (epsilon) of {account.max_epsilon:g}: "
        f"{epsilon_before:.2f} is spent, and this round would make it {epsilon_after:.2f}",
        RefusalCode.POLICY,
    )


def _read_budget(account: PrivacyAccount) -> SpentBudget:
    """Return the budget; an empty one when nothing was charged yet.

    Raises Refused for an unreadable file, and for one that is missing, edited or older than the last written.
    """
    try:
        data = read_anchored_file(_budget_file(account))
        if data is None:
            return SpentBudget(cohorts={}, charges=[])
        return _BUDGET_ADAPTER.validate_json(data)
    except (OSError, ValueError) as error:
        raise Refused(
            f"the centre's privacy budget cannot be read ({type(error).__name__}), so nothing may be spent; "
            "restore it from a backup at the centre",
            RefusalCode.POLICY,
        ) from error


def _write_budget(account: PrivacyAccount, data: bytes, num_charges: int) -> None:
    """Write the budget so that its loss will be noticed. Raises Refused."""
    try:
        write_anchored_file(_budget_file(account), data, num_charges)
    except OSError as error:
        raise _not_writable(error) from error


def _budget_file(account: PrivacyAccount) -> AnchoredFile:
    name = f"{account.folder.name}/{BUDGET_FILENAME}"
    return AnchoredFile(account.folder.parent, name, "privacy budget", account.outer_anchor)


@contextlib.contextmanager
def _exclusive_lock(folder: Path) -> Iterator[None]:
    """Keep every other process of this machine from changing the budget. Raises Refused."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock_folder(folder))
        except OSError as error:
            raise _not_writable(error) from error
        yield


def _write_file(path: Path, data: bytes) -> None:
    """Write a file completely or not at all, even when the power fails. Raises Refused."""
    try:
        atomic_write(path, data)
    except OSError as error:
        raise _not_writable(error) from error


def _not_writable(error: OSError) -> Refused:
    reason = f"the centre's privacy budget cannot be written ({type(error).__name__})"
    return Refused(f"{reason}, and nothing leaves uncharged", RefusalCode.ERROR)
