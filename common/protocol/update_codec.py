"""Changes of weights in fewer bytes: fp32 | fp16 | int8 | int4, with error feedback.

Parameters are rounded symmetrically on a grid of their own per channel (the first dimension of a tensor; a 1-D tensor is one channel): scale =
max|x| / 127, or / 7. What rounding loses is the residual, which the sender adds to what it sends next, so that errors do not add up over rounds
(Seide et al., "1-bit SGD", Interspeech 2014; Karimireddy et al., "Error feedback fixes SignSGD", ICML 2019). Scales travel as the upper half of a
float32, rounded up: a change of 1e-5 has a scale of 8e-8, where float16 has no digits left, and a depthwise filter has a scale for nine values.
Batch-norm statistics (0.5 % of the values) travel as they are.

What a secure sum adds is not coded: it has a grid of its own (common/privacy/secure_aggregation.py). Differential privacy comes before: clip, add the noise, then encode;
what is done to private values afterwards costs no privacy. The residual belongs to the centre and is made of noised values too.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import zstandard
from numpy.typing import NDArray

from common.config.schema import Compression, Config
from common.modeling.parameters import Layout, TensorSlot

Floats = NDArray[np.float32]
Arrays = dict[str, NDArray[np.generic]]

MAX_CODES = {"fp16": 1.0, "int8": 127.0, "int4": 7.0}  # the largest code
ZERO_THRESHOLD = (
    1e-30  # a channel whose values are all smaller is sent as zero (and its values stay in the residual)
)
BLOCK_SIZE = 1 << 16  # values that are worked on at a time: they stay in the processor's cache


def encode_update(
    values: Floats, layout: Layout, codec: Compression, residual: Floats | None = None
) -> tuple[Arrays, Floats | None]:
    """Arrays for the wire, and the residual [P] to add the next time (None for fp32), which takes the place of the one given.

    `values` [P] in the layout's order. fp32: `values` [P]. Else `codes` [V] of the V parameters (float16 or int8; int4: uint8, two a byte,
    deflated), `scales` uint16 [channels], `rest` float32 [P - V], the buffers. A channel with a value that is not finite has a scale that is
    not, and is decoded as not finite.
    """
    if codec == "fp32":
        return {"values": values}, None
    top, parts = MAX_CODES[codec], [e for e in layout.floats if e.is_parameter]
    codes = np.empty(sum(e.stop - e.start for e in parts), np.float16 if codec == "fp16" else np.int8)
    found = np.empty(sum(map(count_channels, parts)), np.float32)
    lost = np.zeros(layout.size, np.float32) if residual is None else residual
    total, scratch = np.empty(BLOCK_SIZE, np.float32), np.empty(BLOCK_SIZE, np.float32)
    at = first = 0
    with np.errstate(invalid="ignore", over="ignore"):
        for e in parts:
            x, mine, left = (
                a.reshape(count_channels(e), -1)
                for a in (values[e.span], codes[at : at + e.stop - e.start], lost[e.span])
            )
            back = None if residual is None else residual[e.span].reshape(x.shape)
            for rows in split_row_blocks(x.shape):
                shape = x[rows].shape
                size = shape[0] * shape[1]
                t = total[:size] if size <= BLOCK_SIZE else np.empty(size, np.float32)
                s = scratch[:size] if size <= BLOCK_SIZE else np.empty(size, np.float32)
                t, s = t.reshape(shape), s.reshape(shape)
                np.copyto(t, x[rows]) if back is None else np.add(x[rows], back[rows], out=t)
                where = slice(first + rows.start, first + rows.start + shape[0])
                largest = np.maximum(t.max(1), -t.min(1))
                found[where] = np.where(
                    largest < ZERO_THRESHOLD, 0, from_bf16_ceil(to_bf16_ceil(largest / np.float32(top)))
                )
                found[where][~np.isfinite(largest)] = np.nan
                grid = found[where, None]
                good = grid > 0
                np.divide(t, np.where(good, grid, np.inf), out=s)
                if codec != "fp16":
                    np.rint(s, out=s)
                if not good.all():
                    s[~good[:, 0]] = 0
                np.copyto(mine[rows], s, casting="unsafe")
                if codec == "fp16":
                    np.copyto(s, mine[rows])
                np.multiply(s, grid, out=s)
                np.subtract(t, s, out=left[rows])
                if not np.isfinite(largest).all():  # said once; the next round starts clean
                    left[rows][~np.isfinite(largest)] = 0
            at, first = at + e.stop - e.start, first + count_channels(e)
    rest = []
    for e in layout.floats:
        if not e.is_parameter:
            lost[e.span] = 0
            rest.append(values[e.span])
    arrays: Arrays = {
        "codes": pack_int4(codes.view(np.int8)) if codec == "int4" else codes,
        "scales": to_bf16_ceil(found),
    }
    return arrays | {"rest": np.concatenate(rest) if rest else np.empty(0, np.float32)}, lost


def decode_update(
    arrays: Mapping[str, NDArray[np.generic]], layout: Layout, codec: Compression, out: Floats | None = None
) -> Floats:
    """The values float32 [P] that `encode` put into the arrays, rounded; in `out` where it is given.

    Raises ValueError or KeyError for arrays that are none of this layout's.
    """
    if codec == "fp32":
        return _require_array(arrays["values"], np.float32, layout.size)
    parts = [e for e in layout.floats if e.is_parameter]
    count = sum(e.stop - e.start for e in parts)
    codes = unpack_int4(arrays["codes"], count) if codec == "int4" else arrays["codes"]
    codes = _require_array(codes, np.float16 if codec == "fp16" else np.int8, count)
    scales = from_bf16_ceil(_require_array(arrays["scales"], np.uint16, sum(map(count_channels, parts))))
    rest = _require_array(arrays["rest"], np.float32, layout.size - count)
    values = np.empty(layout.size, np.float32) if out is None else out
    at = first = kept = 0
    with np.errstate(invalid="ignore", over="ignore"):
        for e in layout.floats:
            n = e.stop - e.start
            if e.is_parameter:
                k = count_channels(e)
                grid = scales[first : first + k, None]
                np.multiply(
                    codes[at : at + n].reshape(k, -1),
                    grid,
                    out=values[e.span].reshape(k, -1),
                    dtype=np.float32,
                )
                at, first = at + n, first + k
            else:
                values[e.span] = rest[kept : kept + n]
                kept += n
    return values


def apply_update(
    floats: Floats,
    encoded_delta: Mapping[str, NDArray[np.generic]],
    layout: Layout,
    codec: Compression,
    out: Floats | None = None,
) -> Floats:
    """The values [P] with an encoded change added: the same bits wherever it is done. No change: the same values.

    Raises ValueError or KeyError for a change that is none of this layout's or codec's.
    """
    if not encoded_delta:
        return floats
    after = decode_update(encoded_delta, layout, codec, out)
    np.add(_require_array(floats, np.float32, layout.size), after, out=after)
    return after


def select_codec(config: Config) -> Compression:
    """What changes travel in: pooled and local training send none to anybody, and stay exact."""
    return config.aggregation.compression if config.federation.mode == "federated" else "fp32"


def count_channels(slot: TensorSlot) -> int:
    """How many scales a tensor has."""
    return slot.shape[0] if len(slot.shape) > 1 else 1


def to_bf16_ceil(scales: Floats) -> NDArray[np.uint16]:
    """The upper 16 bits of positive float32, rounded up; infinite and NaN stay so."""
    return ((scales.view(np.uint32) + np.uint32(0xFFFF)) >> 16).astype(np.uint16)


def from_bf16_ceil(scales: NDArray[np.uint16]) -> Floats:
    """The float32 that `shortened` scales stand for."""
    return (scales.astype(np.uint32) << 16).view(np.float32)


def split_row_blocks(shape: tuple[int, ...]) -> list[slice]:
    """Rows [K, N] in slices of about BLOCK values."""
    rows = max(1, BLOCK_SIZE // max(1, shape[1]))
    return [slice(k, min(k + rows, shape[0])) for k in range(0, shape[0], rows)]


def pack_int4(codes: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Codes -7..7, two a byte, Huffman-coded by zstd: most lie near zero, which takes another quarter off."""
    nibbles = np.zeros(codes.size + codes.size % 2, np.uint8)
    np.add(codes, 8, out=nibbles[: codes.size], casting="unsafe")
    return np.frombuffer(
        zstandard.ZstdCompressor(level=1).compress((nibbles[::2] | (nibbles[1::2] << 4)).data), np.uint8
    )


def unpack_int4(data: NDArray[np.generic], num_codes: int) -> NDArray[np.int8]:
    """The inverse of `packed` for `count` codes. Raises ValueError; never unpacks more than that, whatever came."""
    size = (num_codes + 1) // 2
    try:
        frame = np.ascontiguousarray(data).tobytes()
        if zstandard.frame_content_size(frame) != size:
            raise ValueError(f"{zstandard.frame_content_size(frame)} bytes of codes instead of {size}")
        pairs = np.frombuffer(zstandard.ZstdDecompressor().decompress(frame), np.uint8)
    except zstandard.ZstdError as error:
        raise ValueError(str(error)) from None
    codes = np.empty((size, 2), np.int8)
    np.subtract(pairs & 15, 8, out=codes[:, 0], casting="unsafe")
    np.subtract(pairs >> 4, 8, out=codes[:, 1], casting="unsafe")
    return codes.reshape(-1)[:num_codes]


def _require_array(array: NDArray[np.generic], dtype: type[np.generic], size: int) -> NDArray:  # type: ignore[type-arg]
    if array.dtype != dtype or array.shape != (size,):
        raise ValueError(f"{array.dtype} {array.shape} instead of {np.dtype(dtype).name} ({size},)")
    return array
