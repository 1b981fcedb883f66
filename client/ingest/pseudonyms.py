"""Names for patients, studies and images that a site's secret key makes: the same name each time, and no way back without the key.

HMAC (RFC 2104) with SHA-256 over (kind, value). Whoever holds the key can try out identifiers, so it never leaves the state folder.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import uuid
from pathlib import Path

from pydicom.uid import UID

from common.utils.errors import ConsiliumError


def load_site_key(folder: Path) -> bytes:
    """The key of `folder`, 32 bytes, made at first use and readable by its owner only.

    Raises ConsiliumError when it was lost although studies were named by it: they would come in again under other names.
    """
    path = folder / "key"
    if not path.exists():
        if (folder / "journal.jsonl").exists():
            raise ConsiliumError(
                f"{path} is lost, and studies were named by it; restore it, or remove {folder} and what was ingested"
            )
        fresh = folder / f"key.{os.getpid()}"
        with open(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(secrets.token_bytes(32))
            file.flush()
            os.fsync(file.fileno())
        fresh.rename(path)  # whole or not at all
    if path.stat().st_mode & 0o077:
        raise ConsiliumError(f"{path} can be read by others; run `chmod 600` on it")
    key = path.read_bytes()
    if len(key) != 32:
        raise ConsiliumError(f"{path} is damaged ({len(key)} bytes, not 32); restore it from a copy")
    return key


def _keyed_hash(key: bytes, kind: str, value: str) -> bytes:
    return hmac.new(key, f"{kind}\0{value.strip()}".encode(), hashlib.sha256).digest()


def make_pseudonym(key: bytes, kind: str, value: str) -> str:
    """A name for a "study", "patient" or "accession": its first letter and 80 bits."""
    return kind[0] + _keyed_hash(key, kind, value)[:10].hex()


def make_patient_pseudonym(key: bytes, patient: str, study: str) -> str:
    """The patient's name; a study without a PatientID is a patient of its own."""
    return (
        make_pseudonym(key, "patient", patient)
        if patient.strip()
        else make_pseudonym(key, "patient", f"of study {study}")
    )


def make_uid(key: bytes, old: str) -> UID:
    """A UID below 2.25 (PS3.5 B.2) in place of `old`."""
    return UID(f"2.25.{uuid.UUID(bytes=_keyed_hash(key, 'uid', old)[:16], version=5).int}")
