"""Secure aggregation: what both sides must compute alike. The coordinator learns the sum of the centres' numbers, and no centre's own.

The protocol is that of Bonawitz et al., "Practical secure aggregation for privacy-preserving machine learning", CCS 2017, figure 4, in the form for
an honest but curious server, every pair of centres sharing a mask (the sparser graph of Bell et al., CCS 2020, pays beyond a hundred centres):

    Train, Query  the centre computes its numbers, keeps them, and answers with public keys made for this one sum        (client/federation/secure_aggregation.py)
    Share         it shares its two secrets (the seed of its own mask, its key to the pairs' masks) among all, encrypted
    Mask          it sends its numbers + its own mask +- a mask with each other centre, which cancel in the sum
    Unmask        of each survivor it opens a share of the own mask's seed, of each drop-out one of the key, never both   (server/run/secure_aggregation.py)

Numbers are integers on a grid, added modulo 2^(8 bytes): the sum is exact, whatever the order of arrival. Parameters (`fixed`) have a grid of
2 clip / 2^bits: half a step, clip / 2^bits, is all that a value within `clip` loses. All else (`exact`) has steps of 2^-24 in 64 bits: counts lose
nothing.

X25519, HKDF-SHA256, ChaCha20-Poly1305 and AES-256-CTR are `cryptography`'s, Shamir's shares PyCryptodome's, as in Flower. Flower's own mask generator
(`pseudo_rand_gen`) is not used: it folds the seed into 32 bits of a Mersenne twister, few enough for a server to try them all.
What is agreed is bound to the sum: to every setting, weight and centroid that came, to who takes part with which keys. Centres that were told
different things (another model for one of them: Pasquini et al., CCS 2022) share no masks, and their sum is noise.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from Crypto.Protocol.SecretSharing import Shamir
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from numpy.typing import NDArray

from common.config.schema import Config, SecureAggregationConfig
from common.modeling.parameters import Layout
from common.protocol.messages import Request, StatisticsRequest, Sums, TrainRequest
from common.utils.errors import Refused

RingValues = NDArray[np.unsignedinteger]  # [V] of a ring
ByteArray = NDArray[np.generic]  # uint8
MIN_CENTRES = 3  # of two, each could take its own numbers from the sum
FRACTION_BITS = 24  # bits behind the point of an exact number
BLOCK_SIZE = 1 << 18  # numbers that are masked at a time: they stay in the processor's cache
ZERO_BYTES = bytes(8 * BLOCK_SIZE)
COMBINED_COHORT = "all"  # the cohort that every centre's sums are said to be of


def require_secagg_config(config: Config) -> SecureAggregationConfig:
    """Raises Refused for a run without."""
    if config.privacy.secagg is None:
        raise Refused("this run uses no secure aggregation; use privacy=secagg")
    return config.privacy.secagg


def hides_statistics(config: Config) -> bool:
    """Whether no centre's counts and metrics are known either."""
    return config.privacy.secagg is not None and config.privacy.secagg.scope == "all"


def uses_secagg(config: Config, request: Request) -> bool:
    """Whether the answer to a request comes in a secure sum."""
    if isinstance(request, TrainRequest):
        return config.privacy.secagg is not None and "all" not in config.stages[request.stage].local_layers
    return isinstance(request, StatisticsRequest) and hides_statistics(config)


def compute_min_survivors(config: Config, num_started: int) -> int:
    """How many of the `began` centres must stay to the end. More than half: no two of such groups can open different secrets of one centre."""
    return max(
        MIN_CENTRES, num_started // 2 + 1, math.ceil(require_secagg_config(config).threshold * num_started)
    )


# --- numbers on a grid ----------------------------------------------------------------------------------------------------------------


def quantization_step(settings: SecureAggregationConfig) -> float:
    """Between neighbours on the parameters' grid."""
    return float(2 * settings.clip_value / 2**settings.quantization_bits)


def bytes_per_parameter(config: Config) -> int:
    """Bytes of a parameter: its bits and those that a sum of all centres takes more."""
    return math.ceil(
        (
            require_secagg_config(config).quantization_bits
            + math.ceil(math.log2(len(config.federation.centres)))
        )
        / 8
    )


def quantize(
    values: NDArray[np.floating], settings: SecureAggregationConfig
) -> tuple[NDArray[np.int32], int]:
    """The values [V] on the grid, and how many lay beyond `clip`."""
    top = 2 ** (settings.quantization_bits - 1) - 1
    on_grid = np.rint(values / np.float64(quantization_step(settings)))
    beyond = np.abs(on_grid) > top
    return np.clip(on_grid, -top, top).astype(np.int32), int(beyond.sum())


def to_fixed_point(values: NDArray[np.floating], num_centres: int) -> NDArray[np.int64]:
    """The values [R] in steps of 2^-24. Raises Refused for one that so many centres cannot add."""
    with np.errstate(invalid="ignore"):
        if not (np.abs(values) < 2.0 ** (62 - FRACTION_BITS) / num_centres).all():  # NaN neither
            raise Refused("its answer has a number that is not finite, or too large for a secure sum")
    return np.asarray(np.rint(np.ldexp(values, FRACTION_BITS)), np.int64)


def from_fixed_point(values: NDArray[np.uint64]) -> NDArray[np.float64]:
    """The numbers that a sum of `exact` ones stands for."""
    return np.ldexp(values.view(np.int64).astype(np.float64), -FRACTION_BITS)


def ring_dtype(num_bytes: int) -> type[np.unsignedinteger]:
    """What numbers of `width` bytes are added in."""
    return np.uint32 if num_bytes <= 4 else np.uint64


def pack_ring_values(values: RingValues, num_bytes: int) -> NDArray[np.uint8]:
    """The lower `width` bytes of each value [V * width]."""
    return np.ascontiguousarray(values.view(np.uint8).reshape(-1, values.itemsize)[:, :num_bytes]).reshape(-1)


def unpack_ring_values(data: ByteArray, num_bytes: int) -> RingValues:
    """The inverse. Raises ValueError for what is none."""
    if data.dtype != np.uint8 or data.ndim != 1 or len(data) % num_bytes:
        raise ValueError(f"{data.dtype} {data.shape} are no numbers of {num_bytes} bytes")
    values = np.zeros(len(data) // num_bytes, ring_dtype(num_bytes))
    values.view(np.uint8).reshape(-1, values.itemsize)[:, :num_bytes] = data.reshape(-1, num_bytes)
    return values


def to_signed_integers(values: RingValues, num_bytes: int) -> NDArray[np.signedinteger]:
    """Numbers modulo 2^(8 width) as the integers nearest to zero."""
    size = values.dtype.itemsize
    shift = 8 * (size - num_bytes)
    return np.asarray(np.right_shift(np.left_shift(values, shift).view(f"i{size}"), shift))


def flatten_sums(sums: Mapping[str, NDArray[np.floating]]) -> NDArray[np.float64]:
    """All sums as one vector [R], by their names."""
    return np.concatenate([np.empty(0), *(np.ravel(sums[key]) for key in sorted(sums))])


def unflatten_sums(vector: NDArray[np.float64], template: Sums) -> Sums:
    """The sums of the vector; `blank` has their names and shapes."""
    ends = np.cumsum([template[key].size for key in sorted(template)])
    return {
        key: vector[end - template[key].size : end].reshape(template[key].shape)
        for key, end in zip(sorted(template), ends, strict=True)
    }


# --- a change of weights --------------------------------------------------------------------------------------------------------------


def empty_update_sums(layout: Layout) -> Sums:
    """What goes with the parameters: the buffers' change times the weight, the weight itself in each group, values that were cut off."""
    buffers = sum(e.stop - e.start for e in layout.floats if not e.is_parameter)
    return {
        "buffers": np.zeros(buffers),
        "weights": np.zeros(len(layout.group_slices())),
        "clipped": np.zeros(1),
    }


def quantize_weighted_update(
    delta: NDArray[np.float32],
    weights: Mapping[str, float],
    layout: Layout,
    settings: SecureAggregationConfig,
) -> tuple[NDArray[np.int32], Sums]:
    """A centre's change [P], times its weight in each group of the layout: the parameters on their grid [V], and what goes with them."""
    sums = empty_update_sums(layout)
    values, at, buffers = [np.empty(0, np.int32)], 0, sums["buffers"]
    for e in layout.floats:
        weighted = delta[e.span] * np.float64(weights[e.group])
        if e.is_parameter:
            on_grid, clipped = quantize(weighted, settings)
            values.append(on_grid)
            sums["clipped"] += clipped
        else:
            buffers[at : at + len(weighted)] = weighted
            at += len(weighted)
    sums["weights"][:] = [weights[group] for group in layout.group_slices()]
    return np.concatenate(values), sums


def dequantize_mean(
    values: NDArray[np.signedinteger], sums: Sums, layout: Layout, settings: SecureAggregationConfig
) -> NDArray[np.float32]:
    """The weighted mean [P] of the changes whose `weighed` were added. A group that nobody gives weight does not move."""
    weights = dict(zip(layout.group_slices(), sums["weights"], strict=True))
    mean, at, kept = np.zeros(layout.size, np.float32), 0, 0
    for e in layout.floats:
        size, weight = e.stop - e.start, weights[e.group]
        if weight > 0:
            summed = (
                values[at : at + size] * quantization_step(settings)
                if e.is_parameter
                else sums["buffers"][kept : kept + size]
            )
            mean[e.span] = summed / weight
        at, kept = (at + size, kept) if e.is_parameter else (at, kept + size)
    return mean


# --- secrets --------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PublicKeys:
    """A centre's public part of one sum: two X25519 keys, and the SHA-256 of its own mask's seed, by which a wrong share is found out."""

    mask_key: bytes
    share_key: bytes
    seed_digest: bytes


def parse_public_keys(keys: ByteArray) -> PublicKeys:
    """From a message. Raises ValueError."""
    if keys.dtype != np.uint8 or keys.shape != (96,):
        raise ValueError("its public keys are none")
    whole = keys.tobytes()
    return PublicKeys(whole[:32], whole[32:64], whole[64:])


def hash_mask_context(sum_id: str, roster: Mapping[str, ByteArray], members: Iterable[str]) -> bytes:
    """What the masks of a sum are bound to."""
    told = [sum_id, {c: keys.tobytes().hex() for c, keys in roster.items()}, sorted(members)]
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).digest()


def derive_shared_key(private: bytes, other_public: bytes, purpose: bytes) -> bytes:
    """The 32 bytes that two centres have in common, each from its private key and the other's public one. Raises ValueError."""
    shared = X25519PrivateKey.from_private_bytes(private).exchange(
        X25519PublicKey.from_public_bytes(other_public)
    )
    return HKDF(SHA256(), 32, salt=None, info=b"consilium secure sum\0" + purpose).derive(shared)


def derive_public_key(private: bytes) -> bytes:
    """The public key of a private one."""
    return X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()


def shamir_split(secret: bytes, threshold: int, num_shares: int) -> list[bytes]:
    """`count` shares of a secret of 16 or 32 bytes, any `needed` of which give it back, fewer nothing (Shamir 1979)."""
    parts = [
        dict(Shamir.split(threshold, num_shares, secret[at : at + 16], ssss=False))
        for at in range(0, len(secret), 16)
    ]
    return [b"".join(bytes(part[number]) for part in parts) for number in range(1, num_shares + 1)]


def shamir_combine(shares: Mapping[int, bytes]) -> bytes:
    """The secret, from {a share's number, from 1 on: share}."""
    size = len(next(iter(shares.values())))
    return b"".join(
        bytes(Shamir.combine([(n, share[at : at + 16]) for n, share in shares.items()], ssss=False))
        for at in range(0, size, 16)
    )


def add_mask(seed: bytes, sign: int, fixed_point_sums: NDArray[np.uint64], values: RingValues) -> None:
    """Add (sign 1) or take away (-1) the mask of a seed, an AES-256-CTR key stream, in place."""
    stream = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor()
    zeros, buffer = memoryview(ZERO_BYTES), bytearray(len(ZERO_BYTES) + 15)
    for numbers in (fixed_point_sums, values):
        for start in range(0, len(numbers), BLOCK_SIZE):
            part = numbers[start : start + BLOCK_SIZE]
            stream.update_into(zeros[: part.nbytes], buffer)
            mask = np.frombuffer(buffer, part.dtype, len(part))
            (np.add if sign > 0 else np.subtract)(part, mask, out=part)


def expand_seed(seed: bytes) -> bytes:
    """The key of a centre's own mask, from its seed of 16 bytes."""
    return HKDF(SHA256(), 32, salt=None, info=b"consilium own mask").derive(seed)


def compute_pair_sign(one: str, other: str) -> int:
    """How `one` uses the mask it shares with `other`: the other way round there."""
    return 1 if one < other else -1
