"""Under `privacy=patient`, keep the patients that are trained on apart from those that are scored exactly."""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray

from client.data.dataset import ScanDataset
from client.site import patient_marks
from client.site.privacy_budget import PrivacyAccount, hash_patient
from common.utils.errors import PermanentlyRefused, RefusalCode

log = logging.getLogger("consilium.centre")


def select_trainable(account: PrivacyAccount, scans: ScanDataset) -> ScanDataset:
    """Return the training scans without those of patients of whom exact statistics have left.

    Raises PermanentlyRefused when no other is left.
    """
    marks = patient_marks.read_marks(account)
    return _leave_out(
        scans,
        marks.disclosed,
        "exact statistics of all training patients have left in an earlier private run, which trained on "
        "others; keep to the splits of that run",
    )


def mark_trained(account: PrivacyAccount, scans: ScanDataset) -> None:
    """Mark the patients of a training set before the first round on it. Raises Refused."""
    patient_marks.mark_trained(account, frozenset(_hash_patient_of_each(scans)))


def select_scorable(account: PrivacyAccount, scans: ScanDataset) -> ScanDataset:
    """Return the scans that may be scored exactly, without those of patients that a private run trained on.

    Their patients are marked: no private run may train on them any more. Raises PermanentlyRefused when no
    scan is left, Refused when the marks cannot be written.
    """
    marks = patient_marks.read_marks(account)
    scorable = _leave_out(
        scans,
        marks.trained,
        "a private run trained on all patients of this split, so their exact scores do not leave; set "
        "privacy.query_noise_multiplier",
    )
    if len(scorable):
        patient_marks.mark_disclosed(account, frozenset(_hash_patient_of_each(scorable)))
    return scorable


def _leave_out(scans: ScanDataset, hashes: frozenset[str], refusal: str) -> ScanDataset:
    """Return the scans of other patients than these. Raises PermanentlyRefused when only these have scans."""
    is_other = np.array([patient not in hashes for patient in _hash_patient_of_each(scans)], dtype=bool)
    if is_other.all():
        return scans
    if not is_other.any():
        raise PermanentlyRefused(refusal, RefusalCode.POLICY)
    log.warning("%d scans are left out because of earlier private runs", int((~is_other).sum()))
    rows: NDArray[np.intp] = np.flatnonzero(is_other)
    return scans.subset(rows)


def _hash_patient_of_each(scans: ScanDataset) -> list[str]:
    """Return the digest of each scan's patient, by the identifier in the cohort's table."""
    hashes = []
    for patient, centre in zip(scans.patient_ids, scans.centres, strict=True):
        hashes.append(hash_patient(patient.removeprefix(f"{centre}/")))
    return hashes
