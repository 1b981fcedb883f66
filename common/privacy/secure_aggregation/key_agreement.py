"""Agree on keys for a secure sum: each pair of centres derives a key that only they know."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

ByteArray = NDArray[np.generic]  # uint8
KEY_BYTES = 32
PUBLIC_KEYS_BYTES = 3 * KEY_BYTES


@dataclass(frozen=True)
class PublicKeys:
    """The public part of a centre's secrets for one sum."""

    mask_key: bytes  # X25519, for pairwise masks
    share_key: bytes  # X25519, for encrypting shares
    seed_digest: bytes  # SHA-256 of the seed of its own mask; reveals a wrong share


def parse_public_keys(keys: ByteArray) -> PublicKeys:
    """Read the public keys in a message.

    Raises:
        ValueError: The array is not uint8 [96].
    """
    if keys.dtype != np.uint8 or keys.shape != (PUBLIC_KEYS_BYTES,):
        raise ValueError(f"expected uint8[{PUBLIC_KEYS_BYTES}] public keys, got {keys.dtype}{keys.shape}")
    data = keys.tobytes()
    return PublicKeys(data[:KEY_BYTES], data[KEY_BYTES : 2 * KEY_BYTES], data[2 * KEY_BYTES :])


def hash_mask_context(sum_id: str, roster: Mapping[str, ByteArray], members: Iterable[str]) -> bytes:
    """Return a hash of everything that the masks of a sum must depend on."""
    keys_by_centre = {centre: keys.tobytes().hex() for centre, keys in roster.items()}
    context = [sum_id, keys_by_centre, sorted(members)]
    return hashlib.sha256(json.dumps(context, sort_keys=True).encode()).digest()


def derive_shared_key(private: bytes, other_public: bytes, purpose: bytes) -> bytes:
    """Return the 32-byte key that two centres share, from one's private and the other's public key.

    Raises:
        ValueError: The public key is not valid.
    """
    private_key = X25519PrivateKey.from_private_bytes(private)
    shared_secret = private_key.exchange(X25519PublicKey.from_public_bytes(other_public))
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=b"consilium secure sum\0" + purpose).derive(
        shared_secret
    )


def derive_public_key(private: bytes) -> bytes:
    """Return the public key of a private key."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()
