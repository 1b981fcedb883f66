"""Generate the masks of a secure sum: keys that two centres share, shares of secrets, and key streams."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from Crypto.Protocol.SecretSharing import Shamir
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from common.privacy.secure_aggregation.fixed_point import RingValues

ByteArray = NDArray[np.generic]  # uint8
KEY_BYTES = 32
PUBLIC_KEYS_BYTES = 3 * KEY_BYTES
SHAMIR_BLOCK_BYTES = 16  # PyCryptodome shares secrets of exactly this size
BLOCK_SIZE = 1 << 18  # values that are masked at a time, few enough for the processor's cache
ZERO_BYTES = bytes(8 * BLOCK_SIZE)


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


def shamir_split(secret: bytes, threshold: int, num_shares: int) -> list[bytes]:
    """Split a secret of 16 or 32 bytes into shares (Shamir, "How to share a secret", 1979).

    Any `threshold` shares restore it; fewer reveal nothing. The i-th share has the number i + 1.
    """
    shares = [b""] * num_shares
    for start in range(0, len(secret), SHAMIR_BLOCK_BYTES):
        block = secret[start : start + SHAMIR_BLOCK_BYTES]
        for number, share in Shamir.split(threshold, num_shares, block, ssss=False):
            shares[number - 1] += bytes(share)
    return shares


def shamir_combine(shares: Mapping[int, bytes]) -> bytes:
    """Restore a secret from {number of a share, from 1: share}."""
    secret = b""
    for start in range(0, len(next(iter(shares.values()))), SHAMIR_BLOCK_BYTES):
        blocks = [(number, share[start : start + SHAMIR_BLOCK_BYTES]) for number, share in shares.items()]
        secret += bytes(Shamir.combine(blocks, ssss=False))
    return secret


def add_mask(seed: bytes, sign: int, fixed_point_sums: NDArray[np.uint64], values: RingValues) -> None:
    """Add (sign 1) or subtract (sign -1) the AES-256-CTR key stream of a seed, in place."""
    stream = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor()
    zeros = memoryview(ZERO_BYTES)
    buffer = bytearray(len(ZERO_BYTES) + 15)  # the cipher needs room for one more block less a byte
    apply_sign = np.add if sign > 0 else np.subtract
    for array in (fixed_point_sums, values):
        for start in range(0, len(array), BLOCK_SIZE):
            block = array[start : start + BLOCK_SIZE]
            stream.update_into(zeros[: block.nbytes], buffer)
            mask = np.frombuffer(buffer, block.dtype, len(block))
            apply_sign(block, mask, out=block)


def expand_seed(seed: bytes) -> bytes:
    """Return the 32-byte key of a centre's own mask from its 16-byte seed."""
    return HKDF(SHA256(), KEY_BYTES, salt=None, info=b"consilium own mask").derive(seed)


def compute_pair_sign(centre: str, peer: str) -> int:
    """Return the sign with which a centre applies the mask it shares with a peer; the peer uses the other."""
    return 1 if centre < peer else -1
