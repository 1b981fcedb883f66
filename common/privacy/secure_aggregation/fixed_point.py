"""Represent real numbers as integers that can be added modulo a power of two."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from common.config.schema import Config, SecureAggregationConfig
from common.privacy.secure_aggregation.settings import require_secagg_config
from common.utils.errors import RefusalCode, Refused

RingValues = NDArray[np.unsignedinteger]  # [V] integers modulo 2^(8 bytes)
FRACTION_BITS = 24  # bits after the binary point of a fixed-point number


class QuantizedValues(NamedTuple):
    """Values in steps of the parameters' grid."""

    values: NDArray[np.int32]  # [V]
    num_clipped: int  # how many values lay beyond the clip


def quantization_step(settings: SecureAggregationConfig) -> float:
    """Return the distance between neighbours on the parameters' grid."""
    return float(2 * settings.clip_value / 2**settings.quantization_bits)


def bytes_per_parameter(config: Config) -> int:
    """Return the bytes that a parameter needs: its own bits and those by which a sum of all centres grows."""
    carry_bits = math.ceil(math.log2(len(config.federation.centres)))
    return math.ceil((require_secagg_config(config).quantization_bits + carry_bits) / 8)


def quantize(values: NDArray[np.floating], settings: SecureAggregationConfig) -> QuantizedValues:
    """Round values [V] to the parameters' grid and clip them to its range."""
    largest = 2 ** (settings.quantization_bits - 1) - 1
    steps = np.rint(values / np.float64(quantization_step(settings)))
    num_clipped = int((np.abs(steps) > largest).sum())
    return QuantizedValues(np.clip(steps, -largest, largest).astype(np.int32), num_clipped)


def to_fixed_point(values: NDArray[np.floating], num_centres: int) -> NDArray[np.int64]:
    """Convert values [R] to integers in steps of 2^-24.

    Raises:
        Refused: A value is not finite, or so large that the sum over all centres could overflow.
    """
    limit = 2.0 ** (62 - FRACTION_BITS) / num_centres
    with np.errstate(invalid="ignore"):
        fits = np.abs(values) < limit  # False for NaN
    if not fits.all():
        raise Refused(
            "the reply contains a number that is not finite, or too large for a secure sum",
            RefusalCode.BAD_REPLY,
        )
    return np.asarray(np.rint(np.ldexp(values, FRACTION_BITS)), np.int64)


def from_fixed_point(values: NDArray[np.uint64]) -> NDArray[np.float64]:
    """Convert a sum of fixed-point integers back to real numbers."""
    return np.ldexp(values.view(np.int64).astype(np.float64), -FRACTION_BITS)


def ring_dtype(num_bytes: int) -> type[np.unsignedinteger]:
    """Return the type in which integers of so many bytes are added."""
    return np.uint32 if num_bytes <= 4 else np.uint64


def pack_ring_values(values: RingValues, num_bytes: int) -> NDArray[np.uint8]:
    """Return the low-order `num_bytes` of each value, [V * num_bytes]."""
    all_bytes = values.view(np.uint8).reshape(-1, values.itemsize)
    return np.ascontiguousarray(all_bytes[:, :num_bytes]).reshape(-1)


def unpack_ring_values(data: NDArray[np.generic], num_bytes: int) -> RingValues:
    """Return the values [V] whose low-order bytes were packed.

    Raises:
        ValueError: The data are not a whole number of values.
    """
    if data.dtype != np.uint8 or data.ndim != 1 or len(data) % num_bytes:
        raise ValueError(f"expected uint8 values of {num_bytes} bytes each, got {data.dtype} {data.shape}")
    values = np.zeros(len(data) // num_bytes, ring_dtype(num_bytes))
    values.view(np.uint8).reshape(-1, values.itemsize)[:, :num_bytes] = data.reshape(-1, num_bytes)
    return values


def to_signed_integers(values: RingValues, num_bytes: int) -> NDArray[np.signedinteger]:
    """Interpret integers modulo 2^(8 num_bytes) as the integers nearest to zero."""
    item_size = values.dtype.itemsize
    unused_bits = 8 * (item_size - num_bytes)
    sign_in_top_bit = np.left_shift(values, unused_bits).view(f"i{item_size}")
    return np.asarray(np.right_shift(sign_in_top_bit, unused_bits))
