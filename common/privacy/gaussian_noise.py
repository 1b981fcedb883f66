"""Noise that nobody can draw again: its bits are the operating system's and AES's, never those of a seed."""

from __future__ import annotations

import math
import os

import torch
from torch import Tensor


def secure_gaussian(count: int, chunk_size: int = 1 << 16) -> Tensor:
    """[count] standard normal float32, by Box & Muller (1958): the radius from 63 bits, so that the tail is there, the angle from 32.

    The bits are AES-CTR's under a key of the operating system's, four times as fast as the operating system itself. In chunks that stay in the cache.
    """
    from cryptography.hazmat.primitives.ciphers import (  # a machine that trains plainly need not have it
        Cipher,
        algorithms,
        modes,
    )

    stream = Cipher(algorithms.AES256(os.urandom(32)), modes.CTR(os.urandom(16))).encryptor()
    out = torch.empty(-(-count // 2) * 2)
    for part in torch.split(out, chunk_size):
        half = len(part) // 2
        bits = bytearray(stream.update(bytes(12 * half)))
        uniform = (
            torch.frombuffer(bits, dtype=torch.int64, count=half)
            .bitwise_and_(2**63 - 1)
            .double()
            .add_(0.5)
            .mul_(2.0**-63)
        )
        angle = torch.frombuffer(bits, dtype=torch.int32, offset=8 * half).float().mul_(math.pi * 2.0**-31)
        radius = uniform.log_().mul_(-2).sqrt_().float()
        torch.cos(angle, out=part[:half]).mul_(radius)
        torch.sin(angle, out=part[half:]).mul_(radius)
    return out[:count]
