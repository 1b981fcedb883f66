"""Split a secret into shares, of which a threshold restores it (Shamir, "How to share a secret", 1979)."""

from __future__ import annotations

from collections.abc import Mapping

from Crypto.Protocol.SecretSharing import Shamir

SHAMIR_BLOCK_BYTES = 16  # PyCryptodome shares secrets of exactly this size


def shamir_split(secret: bytes, threshold: int, num_shares: int) -> list[bytes]:
    """Split a secret of 16 or 32 bytes into shares.

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
