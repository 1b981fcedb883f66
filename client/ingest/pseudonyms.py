"""Pseudonyms of patients, studies and images, made with a site's secret key.

They are HMAC-SHA-256 (RFC 2104) over kind and value: the same pseudonym each time, and no way back without
the key. Whoever has the key can confirm guessed identifiers, so it never leaves the state folder.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import uuid
from pathlib import Path

from pydicom.uid import UID

from client.ingest.journal import JOURNAL_FILENAME
from common.utils.errors import ConsiliumError

KEY_FILENAME = "key"
KEY_LENGTH = 32  # bytes
PSEUDONYM_LENGTH = 10  # bytes: 80 bits


def load_site_key(folder: Path) -> bytes:
    """Load the folder's key, which is created at first use and readable by its owner only.

    Raises ConsiliumError when the key is damaged, when others can read it, or when it is missing although
    studies were ingested with it: they would be ingested again under other pseudonyms.
    """
    path = folder / KEY_FILENAME
    if not path.exists():
        if (folder / JOURNAL_FILENAME).exists():
            raise ConsiliumError(
                f"{path} is missing, but studies were ingested with it; restore it, or remove {folder} and "
                "the ingested studies"
            )
        _create_key(path)
    if path.stat().st_mode & 0o077:
        raise ConsiliumError(f"{path} can be read by others; run `chmod 600` on it")
    key = path.read_bytes()
    if len(key) != KEY_LENGTH:
        raise ConsiliumError(
            f"{path} is damaged ({len(key)} bytes instead of {KEY_LENGTH}); restore it from a backup"
        )
    return key


def _create_key(path: Path) -> None:
    """Write a new key; a process that is killed leaves a complete key or none."""
    incomplete = path.with_name(f"{path.name}.{os.getpid()}")
    descriptor = os.open(incomplete, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "wb") as file:
        file.write(secrets.token_bytes(KEY_LENGTH))
        file.flush()
        os.fsync(file.fileno())
    incomplete.rename(path)


def _keyed_hash(key: bytes, kind: str, value: str) -> bytes:
    return hmac.new(key, f"{kind}\0{value.strip()}".encode(), hashlib.sha256).digest()


def make_pseudonym(key: bytes, kind: str, value: str) -> str:
    """Return the pseudonym of a "study", "patient" or "accession": the kind's first letter and 80 bits."""
    return kind[0] + _keyed_hash(key, kind, value)[:PSEUDONYM_LENGTH].hex()


def make_patient_pseudonym(key: bytes, patient_id: str, study_uid: str) -> str:
    """Return a patient's pseudonym; each study without a PatientID is taken for a patient of its own."""
    if patient_id.strip():
        return make_pseudonym(key, "patient", patient_id)
    return make_pseudonym(key, "patient", f"of study {study_uid}")


def make_uid(key: bytes, old_uid: str) -> UID:
    """Return the UID below 2.25 (PS3.5 B.2) that replaces `old_uid`."""
    digest = _keyed_hash(key, "uid", old_uid)
    return UID(f"2.25.{uuid.UUID(bytes=digest[:16], version=5).int}")
