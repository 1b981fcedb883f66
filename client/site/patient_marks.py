"""Remember which patients private runs trained on, and of which patients exact statistics left.

Noise hides whether a patient was trained on only as long as nothing exact about that patient leaves. So no
patient is both: whoever was trained on under `privacy=patient` is never scored exactly afterwards, and
whoever was scored exactly in a private run is never trained on in one. The marks outlive the runs, because
the coordinator chooses who is in which split (`held_out_centres`, `folds`, `fold`), anew in every message.

They stand in `budget/patients.json` in the state folder, as digests of the patients' identifiers. Where the
file is missing although training was charged, all patients of the charged cohorts count as trained on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from pydantic import ConfigDict, TypeAdapter

from client.site.anchored_files import AnchoredFile, lock_folder, read_anchored_file, write_anchored_file
from client.site.privacy_budget import PrivacyAccount, list_charged_patients
from common.utils.errors import RefusalCode, Refused

MARKS_FILENAME = "patients.json"


@dataclass(frozen=True)
class PatientMarks:
    """Digests of marked patients (`privacy_budget.hash_patient`); field names are the keys in the file."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    trained: frozenset[str] = field(default_factory=frozenset)  # on, or about to be, under privacy=patient
    disclosed: frozenset[str] = field(default_factory=frozenset)  # exact statistics of them left


_MARKS_ADAPTER = TypeAdapter(PatientMarks)


def read_marks(account: PrivacyAccount) -> PatientMarks:
    """Return the marks beside the budget.

    Raises Refused for an unreadable file, and for one that is missing, edited or older than the last written.
    """
    try:
        data = read_anchored_file(_marks_file(account))
        if data is None:
            return PatientMarks(trained=list_charged_patients(account))
        return _MARKS_ADAPTER.validate_json(data)
    except (OSError, ValueError) as error:
        raise Refused(
            f"the patients marked in the centre's privacy budget cannot be read ({type(error).__name__}), so "
            "nothing that depends on them may leave; restore budget/patients.json from a backup there",
            RefusalCode.POLICY,
        ) from error


def mark_trained(account: PrivacyAccount, patients: frozenset[str]) -> None:
    """Mark patients before they are trained on.

    Raises Refused when exact statistics of one have left since they were chosen, or when nothing can be
    written.
    """
    with _exclusive_lock(account):
        marks = read_marks(account)
        if not marks.disclosed.isdisjoint(patients):
            raise _chosen_meanwhile()
        _write_marks(account, marks, dataclasses.replace(marks, trained=marks.trained | patients))


def mark_disclosed(account: PrivacyAccount, patients: frozenset[str]) -> None:
    """Mark patients before exact statistics of them leave.

    Raises Refused when one is trained on since they were chosen, or when nothing can be written.
    """
    with _exclusive_lock(account):
        marks = read_marks(account)
        if not marks.trained.isdisjoint(patients):
            raise _chosen_meanwhile()
        _write_marks(account, marks, dataclasses.replace(marks, disclosed=marks.disclosed | patients))


def _chosen_meanwhile() -> Refused:
    return Refused("another request wants the same patients for the opposite purpose; ask again")


@contextlib.contextmanager
def _exclusive_lock(account: PrivacyAccount) -> Iterator[None]:
    """Keep every other process of this machine from changing the marks."""
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock_folder(account.folder))
        except OSError as error:
            raise _not_writable(error) from error
        yield


def _write_marks(account: PrivacyAccount, old_marks: PatientMarks, marks: PatientMarks) -> None:
    """Write the marks so that their loss will be noticed, where there are new ones."""
    file = _marks_file(account)
    if marks == old_marks and file.path.exists():
        return
    lists = {"trained": sorted(marks.trained), "disclosed": sorted(marks.disclosed)}
    num_patients = len(marks.trained) + len(marks.disclosed)
    try:
        write_anchored_file(file, json.dumps(lists, indent=1).encode(), num_patients)
    except OSError as error:
        raise _not_writable(error) from error


def _marks_file(account: PrivacyAccount) -> AnchoredFile:
    name = f"{account.folder.name}/{MARKS_FILENAME}"
    return AnchoredFile(account.folder.parent, name, "list of marked patients", account.outer_anchor)


def _not_writable(error: OSError) -> Refused:
    reason = f"marks of patients in the centre's privacy budget cannot be written ({type(error).__name__})"
    return Refused(f"{reason}, and nothing leaves unmarked", RefusalCode.ERROR)
