"""Mask the numbers of a secure sum with key streams that cancel out between centres."""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from common.privacy.secure_aggregation.fixed_point import RingValues
from common.privacy.secure_aggregation.key_agreement import KEY_BYTES

BLOCK_SIZE = 1 << 18  # values that are masked at a time, few enough for the processor's cache
ZERO_BYTES = bytes(8 * BLOCK_SIZE)


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
